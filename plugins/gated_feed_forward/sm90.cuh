// The first of gated_feed_forward's two kernels on Hopper.
#pragma once

#include "common/norm_conv_depthwise.h"

namespace trt_graft {

// gelu(z[:, :hidden]) · z[:, hidden:] → gated (batch, height, width, hidden), FP16, on the current device, whose
// compute capability must be 9.0.  Channels and hidden are multiples of 8.  False if it does not take the sizes, or
// where the driver lacks what is needed; else `error` is what became of it.
bool launch_gate_sm90(const NormConvDepthwiseArguments& a, void* gated, int64_t batch, int64_t hidden,
                      int multiprocessors, int shared_bytes, cudaStream_t stream, cudaError_t& error);

}  // namespace trt_graft
