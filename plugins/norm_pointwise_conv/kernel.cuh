#pragma once

#include "common/launch.h"

namespace trt_graft {

// y[p, :] = weight · normalised[p, :] + bias, with the layer normalisation of each pixel
// normalised[p, :] = (x[p, :] − s·mean) / √(variance + epsilon) · norm_weight + norm_bias, s = 1 if subtract_mean, else
// 0, rounded to `type`.
//
// x            image of `pixels` in all, of `channels` each
// norm_weight  (channels), norm_bias (channels)
// weight       (outputs, channels), bias (outputs)
// y            image of `pixels` in all, of `outputs` channels each
TRT_GRAFT_API cudaError_t launch_norm_pointwise_conv(DataType type, const void* x, const void* norm_weight,
                                                     const void* norm_bias, const void* weight, const void* bias,
                                                     void* y, int64_t pixels, int64_t channels, int64_t outputs,
                                                     float epsilon, int32_t subtract_mean, cudaStream_t stream);

}  // namespace trt_graft
