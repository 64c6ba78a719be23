#pragma once

#include "common/launch.h"

namespace trt_graft {

// h = (x − mean) / √(variance + epsilon) · gamma + beta over the last axis,  y = activation(h · weightᵀ + bias).
//
// x, h          (rows, inputs)
// gamma, beta   (inputs)
// weight, bias  (outputs, inputs), (outputs)
// y             (rows, outputs)
// activation    0 none, 1 GELU, 2 ReLU
//
// gamma, beta, weight and bias are constants: they may be read before kernels ahead in the stream have ended.
TRT_GRAFT_API cudaError_t launch_layer_norm_linear(DataType type, const void* x, const void* gamma, const void* beta,
                                                   const void* weight, const void* bias, void* h, void* y, int64_t rows,
                                                   int64_t inputs, int64_t outputs, float epsilon, int64_t activation,
                                                   cudaStream_t stream);

}  // namespace trt_graft
