// The same on Hopper's own tensor-core instructions; only where the library is compiled for compute capability 9.0, see
// CMakeLists.txt.
#pragma once

#include "common/launch.h"

namespace trt_graft {

// launch_norm_pointwise_conv in FP16 on the current device, whose compute capability must be 9.0.  False, and nothing
// launched, for numbers of channels that it does not take, or where the driver lacks what is needed; otherwise `error`
// is what became of it.
bool launch_norm_pointwise_conv_sm90(const void* x, const void* norm_weight, const void* norm_bias, const void* weight,
                                     const void* bias, void* y, int64_t pixels, int64_t channels, int64_t outputs,
                                     float epsilon, bool subtract_mean, int multiprocessors, int shared_bytes,
                                     cudaStream_t stream, cudaError_t& error);

}  // namespace trt_graft
