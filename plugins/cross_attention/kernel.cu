// One token's attention to keys and values that the prefill has computed.
//
// Floor: key and value are read once; see common/decode_attention.cuh.
#include "common/decode_attention.cuh"
#include "cross_attention/kernel.cuh"

namespace trt_graft {
namespace {

constexpr int kBlocksAtOnce = 4;  // that a multiprocessor has registers for

template <int BLOCKS, typename T, int N, int PACKS>
__global__ void __launch_bounds__(kDecodeThreads, kBlocksAtOnce)
    cross_attention_kernel(Team<T, N, PACKS> team, const T* query, const T* key, const T* value, T* y, int tokens,
                           float scale) {
    if (BLOCKS > 1 && !clusters_exist()) return;  // never launched
    allow_dependents();
    if (BLOCKS > 1) cluster_begin();
    const int64_t head = blockIdx.x / BLOCKS * int64_t{team.head_dim};  // the block's head in query and y
    const TokenShare<BLOCKS> share(tokens);
    key += head * tokens + share.begin * int64_t{team.head_dim};
    value += head * tokens + share.begin * int64_t{team.head_dim};
    team.prefetch(key, share.first_batch(team));
    team.prefetch(value, share.first_batch(team));
    wait_for_previous();
    const auto rows = [&team](const T* first) {
        return [=](int token) { return first + token * int64_t{team.head_dim}; };
    };
    const auto take = [](int, const auto&, const auto&) {};
    decode_attention<BLOCKS>(team, query + head, rows(key), rows(value), take, y + head, share.count, scale);
}

}  // namespace

cudaError_t launch_cross_attention(DataType type, const void* query, const void* key, const void* value, void* y,
                                   int64_t batch, int64_t heads, int64_t tokens, int64_t head_dim, float scale,
                                   cudaStream_t stream) {
    if (batch * heads * head_dim == 0) return cudaSuccess;
    if (tokens < 1 || head_dim > kDecodeMaxHeadDim || std::max(batch * heads * kMaxClusterBlocks, tokens) > INT32_MAX)
        return cudaErrorInvalidValue;
    cudaError_t error = cudaSuccess;
    const cudaError_t launched = dispatch(type, [&](auto tag) {
        using T = decltype(tag);
        dispatch_team<T>(head_dim, [&](auto team) {
            using Rows = decltype(team);
            const auto kernel = [](auto blocks) {
                return cross_attention_kernel<blocks, T, Rows::kWidth, Rows::kPacks>;
            };
            const auto one = reinterpret_cast<const void*>(kernel(std::integral_constant<int, 1>{}));
            error = dispatch_blocks(one, team, batch * heads, tokens, kBlocksAtOnce, [&](auto blocks) {
                return launch_decode_attention<blocks>(kernel(blocks), batch * heads, stream, team,
                                                       static_cast<const T*>(query), static_cast<const T*>(key),
                                                       static_cast<const T*>(value), static_cast<T*>(y),
                                                       static_cast<int>(tokens), scale);
            });
        });
    });
    return error ? error : launched;
}

}  // namespace trt_graft
