#pragma once

#include "common/launch.h"

namespace trt_graft {

// y[:, c] = gelu(z[:, c]) · z[:, channels + c], where z is x convolved channel by channel, with zeros around the image.
//
// x       (batch, 2·channels, height, width)
// weight  (2·channels, 9), bias (2·channels)
// y       (batch, channels, height, width)
TRT_GRAFT_API cudaError_t launch_gated_depthwise_conv(DataType type, const void* x, const void* weight,
                                                      const void* bias, void* y, int64_t batch, int64_t channels,
                                                      int64_t height, int64_t width, cudaStream_t stream);

}  // namespace trt_graft
