#pragma once

#include "common/launch.h"

namespace trt_graft {

// y[p, :] = residual[p, :] + weight · x[p, :] + bias.
//
// x            image of `pixels` in all, of `channels` each
// weight       (outputs, channels), bias (outputs)
// residual, y  images of `pixels` in all, of `outputs` channels each
TRT_GRAFT_API cudaError_t launch_pointwise_conv_residual(DataType type, const void* x, const void* weight,
                                                         const void* bias, const void* residual, void* y,
                                                         int64_t pixels, int64_t channels, int64_t outputs,
                                                         cudaStream_t stream);

}  // namespace trt_graft
