#pragma once

#include "common/launch.h"

namespace trt_graft {

// y = softmax(q · kᵀ · scale) · v per head.
//
// q, k, v, y  (batch, tokens, heads·head_dim), head_dim ≤ 128
TRT_GRAFT_API cudaError_t launch_encoder_attention(DataType type, const void* q, const void* k, const void* v, void* y,
                                                   int64_t batch, int64_t tokens, int64_t heads, int64_t head_dim,
                                                   float scale, cudaStream_t stream);

}  // namespace trt_graft
