#pragma once

#include "common/launch.h"

namespace trt_graft {

// y = activation(x · weightᵀ + bias).  Sums are FP32, and rounded once.
//
// x             (rows, inputs)
// weight, bias  (outputs, inputs), (outputs)
// y             (rows, outputs)
// activation    0 none, 1 GELU, 2 ReLU
TRT_GRAFT_API cudaError_t launch_linear(DataType type, const void* x, const void* weight, const void* bias, void* y,
                                        int64_t rows, int64_t inputs, int64_t outputs, int64_t activation,
                                        cudaStream_t stream);

}  // namespace trt_graft
