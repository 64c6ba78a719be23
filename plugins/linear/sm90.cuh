// Linear layers on Hopper's own tensor-core instructions; only where CMake has found CUTLASS, see CMakeLists.txt.
#pragma once

#include "common/launch.h"

namespace trt_graft {

// y = activation(x · weightᵀ + bias) in FP16, on the current device, whose compute capability must be 9.0.
//
// x, weight and y begin on boundaries of 16 bytes; inputs and outputs are multiples of 8.
cudaError_t launch_linear_sm90(const void* x, const void* weight, const void* bias, void* y, int rows, int inputs,
                               int outputs, Activation activation, int multiprocessors, cudaStream_t stream);

}  // namespace trt_graft
