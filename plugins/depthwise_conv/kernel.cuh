#pragma once

#include "common/launch.h"

namespace trt_graft {

// y = x convolved channel by channel, with zeros around the image.
//
// x, y    images (batch, height, width, channels)
// weight  (channels, 9), bias (channels)
TRT_GRAFT_API cudaError_t launch_depthwise_conv(DataType type, const void* x, const void* weight, const void* bias,
                                                void* y, int64_t batch, int64_t height, int64_t width, int64_t channels,
                                                cudaStream_t stream);

}  // namespace trt_graft
