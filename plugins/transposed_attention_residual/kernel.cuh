#pragma once

#include "common/launch.h"

namespace trt_graft {

// y[p, :] = residual[p, :] + weight · attended[p, :] + bias, where attended = softmax(q̂ · k̂ᵀ · temperature) · v for
// each head, q̂ and k̂ being q and k with rows divided by max(‖row‖, 1e-12).
//
// qkv          `batch` images of `pixels` pixels, with channels (3, heads, head_channels); head_channels at most 128
// temperature  (heads)
// weight       (channels, channels), bias (channels): channels = heads · head_channels
// residual, y  as many images and pixels as qkv, of `channels` each
// workspace    transposed_attention_residual_workspace_bytes(…) bytes, or more, on a 16-byte boundary
TRT_GRAFT_API cudaError_t launch_transposed_attention_residual(DataType type, const void* qkv, const void* temperature,
                                                               const void* weight, const void* bias,
                                                               const void* residual, void* y, void* workspace,
                                                               int64_t batch, int64_t heads, int64_t head_channels,
                                                               int64_t pixels, cudaStream_t stream);

// Never falls when a size grows: what the largest image needs is enough for smaller ones.
TRT_GRAFT_API int64_t transposed_attention_residual_workspace_bytes(int64_t batch, int64_t heads, int64_t head_channels,
                                                                    int64_t pixels);

// The same for FP16 and heads of whole packs of 16 bytes, where something else has made v and what the first kernel,
// gram, leaves behind (see transposed_attention/gram.cuh).
//
// v         `batch` images of `pixels` pixels, with channels (heads, head_channels)
// partials  the sums of `shares` shares of the pixels, per head; space for the attention follows, of
//           batch · heads · (padded head_channels)² FP16 values
cudaError_t launch_behind_gram(const void* v, const void* temperature, const void* weight, const void* bias,
                               const void* residual, void* y, float* partials, int64_t shares, int64_t batch,
                               int64_t heads, int64_t head_channels, int64_t pixels, cudaStream_t stream);

}  // namespace trt_graft
