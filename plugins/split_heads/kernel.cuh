#pragma once

#include "common/launch.h"

namespace trt_graft {

// y[b, h, t, d] = x[b, t, h, d].
//
// x  (batch, tokens, heads, head_dim)
// y  (batch, heads, tokens, head_dim)
TRT_GRAFT_API cudaError_t launch_split_heads(DataType type, const void* x, void* y, int64_t batch, int64_t tokens,
                                             int64_t heads, int64_t head_dim, cudaStream_t stream);

}  // namespace trt_graft
