#pragma once

#include "common/launch.h"

namespace trt_graft {

// y = softmax(q̂ · k̂ᵀ · temperature) · v for each head, q̂ and k̂ being q and k with rows divided by max(‖row‖, 1e-12).
//
// qkv          `batch` images of `pixels` pixels, with channels (3, heads, head_channels); head_channels at most 128
// temperature  (heads)
// y            as many images and pixels, with channels (heads, head_channels)
// workspace    transposed_attention_workspace_bytes(…) bytes, or more, on a 16-byte boundary
TRT_GRAFT_API cudaError_t launch_transposed_attention(DataType type, const void* qkv, const void* temperature, void* y,
                                                      void* workspace, int64_t batch, int64_t heads,
                                                      int64_t head_channels, int64_t pixels, cudaStream_t stream);

// Never falls when a size grows: what the largest image needs is enough for smaller ones.
TRT_GRAFT_API int64_t transposed_attention_workspace_bytes(int64_t batch, int64_t heads, int64_t head_channels,
                                                           int64_t pixels);

}  // namespace trt_graft
