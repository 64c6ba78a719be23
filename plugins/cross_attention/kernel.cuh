#pragma once

#include "common/launch.h"

namespace trt_graft {

// y = softmax(query · scale · keyᵀ) · value per head, for one token of each row.
//
// query, y    (rows, 1, heads·head_dim), head_dim ≤ 128
// key, value  (images, heads, tokens, head_dim), tokens ≥ 1; rows / images rows that follow each other share an image's
TRT_GRAFT_API cudaError_t launch_cross_attention(DataType type, const void* query, const void* key, const void* value,
                                                 void* y, int64_t rows, int64_t images, int64_t heads, int64_t tokens,
                                                 int64_t head_dim, float scale, cudaStream_t stream);

}  // namespace trt_graft
