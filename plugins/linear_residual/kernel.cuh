#pragma once

#include "common/launch.h"

namespace trt_graft {

// y = x · weightᵀ + bias + residual.
//
// x             (rows, inputs)
// weight, bias  (outputs, inputs), (outputs)
// residual, y   (rows, outputs)
//
// weight and bias may be read before the kernels ahead in the stream have ended.
TRT_GRAFT_API cudaError_t launch_linear_residual(DataType type, const void* x, const void* weight, const void* bias,
                                                 const void* residual, void* y, int64_t rows, int64_t inputs,
                                                 int64_t outputs, cudaStream_t stream);

}  // namespace trt_graft
