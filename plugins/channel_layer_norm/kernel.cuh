#pragma once

#include "common/launch.h"

namespace trt_graft {

// y[p, :] = (x[p, :] − s·mean) / √(variance + epsilon) · weight + bias, s = 1 if subtract_mean, else 0.
//
// x, y    images of `pixels` in all, of `channels` ≤ 2048 each
// weight  (channels), bias (channels)
TRT_GRAFT_API cudaError_t launch_channel_layer_norm(DataType type, const void* x, const void* weight, const void* bias,
                                                    void* y, int64_t pixels, int64_t channels, float epsilon,
                                                    int32_t subtract_mean, cudaStream_t stream);

}  // namespace trt_graft
