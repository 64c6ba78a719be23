// What norm_conv_depthwise.cuh and gated_feed_forward/sm90.cu work on.
#pragma once

#include <cuda_fp16.h>

namespace trt_graft {

// Channels and outputs are multiples of 8.
struct NormConvDepthwiseArguments {
    const __half* x;                                  // an image of `channels`
    const __half *norm_weight, *norm_bias;            // (channels)
    const __half *weight, *bias;                      // (outputs, channels), (outputs)
    const __half *depthwise_weight, *depthwise_bias;  // (outputs, 9), (outputs)
    int channels, height, width;
    float epsilon;
    bool subtract_mean;
};

}  // namespace trt_graft
