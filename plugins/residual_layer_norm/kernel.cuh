#pragma once

#include "common/launch.h"

namespace trt_graft {

// sum = x + residual,  y = (sum − mean) / √(variance + epsilon) · weight + bias, over the last axis; mean and variance
// are those of the FP32 sum, before it is rounded.
//
// x, residual, sum, y  (rows, dim), dim ≤ 2048; sum may be x or residual itself
// weight, bias         (dim)
TRT_GRAFT_API cudaError_t launch_residual_layer_norm(DataType type, const void* x, const void* residual,
                                                     const void* weight, const void* bias, void* sum, void* y,
                                                     int64_t rows, int64_t dim, float epsilon, cudaStream_t stream);

}  // namespace trt_graft
