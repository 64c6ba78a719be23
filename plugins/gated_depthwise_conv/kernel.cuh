#pragma once

#include "common/launch.h"

namespace trt_graft {

// y[:, c] = gelu(z[:, c]) · z[:, channels + c], where z is x convolved channel by channel, with zeros around the image.
//
// x       an image (batch, height, width, 2·channels)
// weight  (2·channels, 9), bias (2·channels)
// y       an image (batch, height, width, channels)
TRT_GRAFT_API cudaError_t launch_gated_depthwise_conv(DataType type, const void* x, const void* weight,
                                                      const void* bias, void* y, int64_t batch, int64_t height,
                                                      int64_t width, int64_t channels, cudaStream_t stream);

}  // namespace trt_graft
