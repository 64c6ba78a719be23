// One token's attention to keys and values that the prefill has computed.
//
// Floor: key and value are read once; see common/decode_attention.cuh.
#include "common/decode_attention.cuh"
#include "cross_attention/kernel.cuh"

namespace trt_graft {
namespace {

template <typename T, int N, int PACKS>
__global__ void __launch_bounds__(kDecodeThreads)
    cross_attention_kernel(Team<T, N, PACKS> team, const T* query, const T* key, const T* value, T* y, int64_t tokens,
                           float scale) {
    const int64_t head = blockIdx.x * int64_t{team.head_dim};  // the block's head in query and y
    const auto key_row = [=](int64_t token) { return key + head * tokens + token * team.head_dim; };
    const auto value_row = [=](int64_t token) { return value + head * tokens + token * team.head_dim; };
    decode_attention(team, query + head, key_row, value_row, y + head, tokens, scale);
}

}  // namespace

cudaError_t launch_cross_attention(DataType type, const void* query, const void* key, const void* value, void* y,
                                   int64_t batch, int64_t heads, int64_t tokens, int64_t head_dim, float scale,
                                   cudaStream_t stream) {
    if (batch * heads * head_dim == 0) return cudaSuccess;
    if (tokens < 1 || head_dim > kDecodeMaxHeadDim || batch * heads > INT32_MAX) return cudaErrorInvalidValue;
    return dispatch(type, [&](auto tag) {
        using T = decltype(tag);
        dispatch_team<T>(head_dim, [&](auto team) {
            cross_attention_kernel<<<batch * heads, kDecodeThreads, 0, stream>>>(
                team, static_cast<const T*>(query), static_cast<const T*>(key), static_cast<const T*>(value),
                static_cast<T*>(y), tokens, scale);
        });
    });
}

}  // namespace trt_graft
