// One decoding step of causal self-attention, with a cache of keys and values.
//
// Floor: the slots in use are read once, one slot is written; see common/decode_attention.cuh.  Where the present cache
// is not the cache itself, all of it is copied as well.  The new slot is taken from key and value, and each slot is
// written by the team that has loaded it: no block waits for memory that another one writes.
#include "cached_self_attention/kernel.cuh"
#include "common/decode_attention.cuh"

namespace trt_graft {
namespace {

constexpr int kBlocksAtOnce = 3;  // that a multiprocessor has registers for

// Past L1: a kernel before this one may just be writing it.
__device__ int load_position(const int32_t* position, int capacity) {
    return max(0, min(__ldcg(position), capacity - 1));
}

// Copies all slots of a head but `now`, a team for each.
template <int BLOCKS, typename T, int N, int PACKS>
__device__ void copy_slots(const Team<T, N, PACKS>& team, T* present, const T* cache, int now, int capacity) {
    const int first = blockIdx.x % BLOCKS * team.count() + team.index();
    for (int slot = first; slot < capacity; slot += BLOCKS * team.count()) {
        if (slot == now) continue;
        Pack<T, N> part[PACKS];
        team.load(part, cache + slot * int64_t{team.head_dim});
        team.store(present + slot * int64_t{team.head_dim}, part);
    }
}

template <int BLOCKS, typename T, int N, int PACKS>
__global__ void __launch_bounds__(kDecodeThreads, kBlocksAtOnce)
    cached_self_attention_kernel(Team<T, N, PACKS> team, const T* query, const T* key, const T* value,
                                 const T* key_cache, const T* value_cache, const int32_t* position, T* y,
                                 T* present_key, T* present_value, int capacity, float scale) {
    if (BLOCKS > 1 && !clusters_exist()) return;  // never launched
    allow_dependents();
    if (BLOCKS > 1) cluster_begin();
    const int64_t head = blockIdx.x / BLOCKS * int64_t{team.head_dim};  // the block's head in query, key, value and y
    key_cache += head * capacity, value_cache += head * capacity;
    present_key += head * capacity, present_value += head * capacity;
    {
        // What an earlier kernel left at `position` may be out of date: good enough to choose what to prefetch.
        const TokenShare<BLOCKS> share(load_position(position, capacity) + 1);
        team.prefetch(key_cache + share.begin * int64_t{team.head_dim}, share.first_batch(team));
        team.prefetch(value_cache + share.begin * int64_t{team.head_dim}, share.first_batch(team));
    }
    wait_for_previous();

    const int now = load_position(position, capacity);
    const TokenShare<BLOCKS> share(now + 1);
    const auto slots = [=](auto* cache) { return cache + share.begin * int64_t{team.head_dim}; };
    const auto row = [=](const T* cache, const T* fresh) {
        return [=](int token) {
            return share.begin + token == now ? fresh + head : slots(cache) + token * int64_t{team.head_dim};
        };
    };
    const auto take = [=](int token, const auto& key_part, const auto& value_part) {
        if (share.begin + token != now) return;
        team.store(present_key + now * int64_t{team.head_dim}, key_part);
        team.store(present_value + now * int64_t{team.head_dim}, value_part);
    };
    decode_attention<BLOCKS>(team, query + head, row(key_cache, key), row(value_cache, value), take, y + head,
                             share.count, scale);
    if (present_key != key_cache) copy_slots<BLOCKS>(team, present_key, key_cache, now, capacity);
    if (present_value != value_cache) copy_slots<BLOCKS>(team, present_value, value_cache, now, capacity);
}

}  // namespace

cudaError_t launch_cached_self_attention(DataType type, const void* query, const void* key, const void* value,
                                         const void* key_cache, const void* value_cache, const int32_t* position,
                                         void* y, void* present_key, void* present_value, int64_t batch, int64_t heads,
                                         int64_t capacity, int64_t head_dim, float scale, cudaStream_t stream) {
    if (batch * heads * head_dim == 0) return cudaSuccess;
    if (capacity < 1 || head_dim > kDecodeMaxHeadDim ||
        std::max(batch * heads * kMaxClusterBlocks, capacity) > INT32_MAX)
        return cudaErrorInvalidValue;
    cudaError_t error = cudaSuccess;
    const cudaError_t launched = dispatch(type, [&](auto tag) {
        using T = decltype(tag);
        dispatch_team<T>(head_dim, [&](auto team) {
            using Rows = decltype(team);
            const auto kernel = [](auto blocks) {
                return cached_self_attention_kernel<blocks, T, Rows::kWidth, Rows::kPacks>;
            };
            const auto one = reinterpret_cast<const void*>(kernel(std::integral_constant<int, 1>{}));
            error = dispatch_blocks(one, team, batch * heads, capacity, kBlocksAtOnce, [&](auto blocks) {
                return launch_decode_attention<blocks>(
                    kernel(blocks), batch * heads, stream, team, static_cast<const T*>(query),
                    static_cast<const T*>(key), static_cast<const T*>(value), static_cast<const T*>(key_cache),
                    static_cast<const T*>(value_cache), position, static_cast<T*>(y), static_cast<T*>(present_key),
                    static_cast<T*>(present_value), static_cast<int>(capacity), scale);
            });
        });
    });
    return error ? error : launched;
}

}  // namespace trt_graft
