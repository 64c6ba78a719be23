#pragma once

#include "common/launch.h"

namespace trt_graft {

// h = (x − mean) / √(variance + epsilon) · gamma + beta over the last axis,  (y0, y1, y2) = h · weightᵀ + bias.
//
// x, h          (rows, inputs)
// gamma, beta   (inputs)
// weight, bias  (3·width, inputs), (3·width)
// y0, y1, y2    (rows, width)
//
// gamma, beta, weight and bias are constants: they may be read before kernels ahead in the stream have ended.
TRT_GRAFT_API cudaError_t launch_layer_norm_qkv(DataType type, const void* x, const void* gamma, const void* beta,
                                                const void* weight, const void* bias, void* h, void* y0, void* y1,
                                                void* y2, int64_t rows, int64_t inputs, int64_t width, float epsilon,
                                                cudaStream_t stream);

}  // namespace trt_graft
