#pragma once

#include "common/launch.h"

namespace trt_graft {

// y = x + project_out · (gelu(z[:, :hidden]) · z[:, hidden:]) + project_out_bias, where z is project_in · normalised +
// project_in_bias, convolved channel by channel with zeros around the image, and
// normalised = (x − s·mean) / √(variance + epsilon) · norm_weight + norm_bias over a pixel's channels, s = 1 if
// subtract_mean, else 0.
//
// x, y          images (batch, height, width, channels)
// norm_weight   (channels), norm_bias (channels)
// project_in    (2·hidden, channels), project_in_bias (2·hidden)
// depthwise     (2·hidden, 9), depthwise_bias (2·hidden)
// project_out   (channels, hidden), project_out_bias (channels)
// workspace     gated_feed_forward_workspace_bytes(…) bytes, or more, on a 16-byte boundary
TRT_GRAFT_API cudaError_t launch_gated_feed_forward(
    DataType type, const void* x, const void* norm_weight, const void* norm_bias, const void* project_in,
    const void* project_in_bias, const void* depthwise, const void* depthwise_bias, const void* project_out,
    const void* project_out_bias, void* y, void* workspace, int64_t batch, int64_t height, int64_t width,
    int64_t channels, int64_t hidden, float epsilon, int32_t subtract_mean, cudaStream_t stream);

// Never falls when a size grows: what the largest image needs is enough for smaller ones.
TRT_GRAFT_API int64_t gated_feed_forward_workspace_bytes(int64_t batch, int64_t height, int64_t width, int64_t hidden);

}  // namespace trt_graft
