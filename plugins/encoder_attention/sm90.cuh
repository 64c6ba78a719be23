// Self-attention on Hopper's own tensor-core instructions; only where the library is compiled for compute capability
// 9.0, see CMakeLists.txt.
#pragma once

#include "common/launch.h"

namespace trt_graft {

// launch_encoder_attention in FP16 for heads of 64 columns, on the current device, whose compute capability must
// be 9.0. `taken` becomes false where the driver lacks what is needed.
cudaError_t launch_encoder_attention_sm90(const void* q, const void* k, const void* v, void* y, int64_t batch,
                                          int64_t tokens, int64_t heads, float scale, int multiprocessors,
                                          cudaStream_t stream, bool& taken);

}  // namespace trt_graft
