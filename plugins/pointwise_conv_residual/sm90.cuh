// The same on Hopper's own tensor-core instructions; only where the library is compiled for compute capability 9.0, see
// CMakeLists.txt.
#pragma once

#include "pointwise_conv_residual/tensor_core.cuh"

namespace trt_graft {

// launch_pointwise_conv_residual in FP16 on the current device, whose compute capability must be 9.0.  False, and
// nothing launched, for sizes that it does not take, or where the driver lacks what is needed; otherwise `error` is
// what became of it.
bool launch_pointwise_conv_residual_sm90(const PointwiseArguments& a, const Gpu& gpu, cudaStream_t stream,
                                         cudaError_t& error);

}  // namespace trt_graft
