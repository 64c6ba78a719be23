#pragma once

#include "common/launch.h"

namespace trt_graft {

// y[p, :] = x[p, :] + weight · attended[p, :] + bias, where attended = softmax(q̂ · k̂ᵀ · temperature) · v for each head,
// q̂ and k̂ being q and k with rows divided by max(‖row‖, 1e-12), and
//
//   (q, k, v) = qkv_weight · normalised[p, :] + qkv_bias, convolved channel by channel, with zeros around the image
//   normalised[p, :] = (x[p, :] − s·mean) / √(variance + epsilon) · norm_weight + norm_bias, s = 1 if subtract_mean,
//   else 0
//
// each rounded to `type`.
//
// x, y              images (batch, height, width, channels), channels = heads · head_channels, head_channels ≤ 128
// norm_weight       (channels), norm_bias (channels)
// qkv_weight        (3·channels, channels), qkv_bias (3·channels): the channels of q, then those of k and v
// depthwise_weight  (3·channels, 9), depthwise_bias (3·channels)
// temperature       (heads)
// weight            (channels, channels), bias (channels)
// workspace         transposed_attention_block_workspace_bytes(…) bytes, or more, on a 256-byte boundary
TRT_GRAFT_API cudaError_t launch_transposed_attention_block(
    DataType type, const void* x, const void* norm_weight, const void* norm_bias, const void* qkv_weight,
    const void* qkv_bias, const void* depthwise_weight, const void* depthwise_bias, const void* temperature,
    const void* weight, const void* bias, void* y, void* workspace, int64_t batch, int64_t heads, int64_t head_channels,
    int64_t height, int64_t width, float epsilon, int32_t subtract_mean, cudaStream_t stream);

// Never falls when a size grows: what the largest image needs is enough for smaller ones.
TRT_GRAFT_API int64_t transposed_attention_block_workspace_bytes(DataType type, int64_t batch, int64_t heads,
                                                                 int64_t head_channels, int64_t height, int64_t width);

}  // namespace trt_graft
