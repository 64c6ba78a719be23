// One decoding step of causal self-attention, with a cache of keys and values: cached_self_attention and
// beam_self_attention, which differ in where a row's past is.
//
// Floor: the slots in use are read once, one slot is written; see decode_attention.cuh.  Where the present cache is not
// the cache itself, all of it is copied as well.  The new slot is taken from key and value, and each slot is written by
// the team that has loaded it: no block waits for memory that another one writes.
#pragma once

#include "common/decode_attention.cuh"

namespace trt_graft {

// A row's past is in its own part of the cache.
struct OwnPast {
    static constexpr int kBlocksAtOnce = 3;  // that a multiprocessor has registers for
    // Of one head of a row, of those of all rows.
    struct Head {
        int64_t first;  // the row of the cache (…, capacity, head_dim) from which places are counted
        __device__ int place(int slot) const { return slot; }
    };
    __device__ Head of(int64_t head, int capacity) const { return {head * capacity}; }

    // Brings the slots that a block reads first into L2.
    template <int BLOCKS, typename T, int N, int PACKS>
    __device__ static void prefetch(const Team<T, N, PACKS>& team, const Head& head, const TokenShare<BLOCKS>& share,
                                    const T* cache) {
        team.prefetch(cache + share.begin * int64_t{team.head_dim}, share.first_batch(team));
    }
};

// A beam's past is in the parts of the beams that it comes from.
struct AncestorsPast {
    static constexpr int kBlocksAtOnce = 2;
    const int32_t* ancestors;  // (images, beams, capacity)
    int beams, heads;

    struct Head {
        int64_t first;
        const int32_t* ancestors;  // of the beam
        int beams, beam_rows, capacity;
        // Past L1: a kernel before this one may just be writing it.
        __device__ int place(int slot) const {
            const int owner = __ldcg(ancestors + min(slot, capacity - 1));
            return max(0, min(owner, beams - 1)) * beam_rows + slot;
        }
    };
    __device__ Head of(int64_t head, int capacity) const {
        const int64_t row = head / heads;
        const int64_t first = (row / beams * beams * heads + head % heads) * capacity;
        return {first, ancestors + row * capacity, beams, heads * capacity, capacity};
    }

    template <int BLOCKS, typename T, int N, int PACKS>
    __device__ static void prefetch(const Team<T, N, PACKS>& team, const Head& head, const TokenShare<BLOCKS>& share,
                                    const T* cache) {
        const int count = share.first_batch(team);
        for (int token = team.index(); token < count; token += team.count()) {
            team.prefetch_row(cache + head.place(share.begin + token) * int64_t{team.head_dim});
        }
    }
};

// Past L1: a kernel before this one may just be writing it.
__device__ inline int load_position(const int32_t* position, int capacity) {
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

template <int BLOCKS, typename Past, typename T, int N, int PACKS>
__global__ void __launch_bounds__(kDecodeThreads, Past::kBlocksAtOnce)
    cached_attention_kernel(Team<T, N, PACKS> team, const T* query, const T* key, const T* value, const T* key_cache,
                            const T* value_cache, Past past, const int32_t* position, T* y, T* present_key,
                            T* present_value, int capacity, float scale) {
    if (BLOCKS > 1 && !clusters_exist()) return;  // never launched
    allow_dependents();
    if (BLOCKS > 1) cluster_begin();
    const int64_t unit = blockIdx.x / BLOCKS;
    const int64_t head = unit * team.head_dim;  // the block's head in query, key, value and y
    const auto found = past.of(unit, capacity);
    const int64_t own = head * capacity;  // the head in the caches
    const int64_t inherited = own - found.first * team.head_dim;
    key_cache += found.first * team.head_dim, value_cache += found.first * team.head_dim;
    present_key += own, present_value += own;
    {
        // What an earlier kernel left at `position` may be out of date: good enough to choose what to prefetch.
        const TokenShare<BLOCKS> share(load_position(position, capacity) + 1);
        Past::prefetch(team, found, share, key_cache);
        Past::prefetch(team, found, share, value_cache);
    }
    wait_for_previous();

    const int now = load_position(position, capacity);
    const TokenShare<BLOCKS> share(now + 1);
    const auto place = [=](int token) { return found.place(share.begin + token); };
    const auto row = [=](const T* cache, const T* fresh) {
        return [=](int token, int at) {
            return share.begin + token == now ? fresh + head : cache + at * int64_t{team.head_dim};
        };
    };
    const auto take = [=](int token, const auto& key_part, const auto& value_part) {
        if (share.begin + token != now) return;
        team.store(present_key + now * int64_t{team.head_dim}, key_part);
        team.store(present_value + now * int64_t{team.head_dim}, value_part);
    };
    decode_attention<BLOCKS, 1>(team, query + head, 0, 1, place, row(key_cache, key), row(value_cache, value), take,
                                y + head, share.count, scale);
    key_cache += inherited, value_cache += inherited;  // its own slots, which are the same where it has no other
    if (present_key != key_cache) copy_slots<BLOCKS>(team, present_key, key_cache, now, capacity);
    if (present_value != value_cache) copy_slots<BLOCKS>(team, present_value, value_cache, now, capacity);
}

template <typename Past>
cudaError_t launch_cached_attention(DataType type, const void* query, const void* key, const void* value,
                                    const void* key_cache, const void* value_cache, Past past, const int32_t* position,
                                    void* y, void* present_key, void* present_value, int64_t rows, int64_t heads,
                                    int64_t capacity, int64_t head_dim, float scale, cudaStream_t stream) {
    if (rows * heads * head_dim == 0) return cudaSuccess;
    if (capacity < 1 || head_dim > kDecodeMaxHeadDim ||
        std::max(rows * heads * kMaxClusterBlocks, rows * heads * capacity) > INT32_MAX)
        return cudaErrorInvalidValue;
    cudaError_t error = cudaSuccess;
    const cudaError_t launched = dispatch(type, [&](auto tag) {
        using T = decltype(tag);
        dispatch_team<T>(head_dim, [&](auto team) {
            using Rows = decltype(team);
            const auto kernel = [](auto blocks) {
                return cached_attention_kernel<blocks, Past, T, Rows::kWidth, Rows::kPacks>;
            };
            const auto one = reinterpret_cast<const void*>(kernel(std::integral_constant<int, 1>{}));
            error = dispatch_blocks(one, team, rows * heads, capacity, Past::kBlocksAtOnce, [&](auto blocks) {
                return launch_decode_attention<blocks>(
                    kernel(blocks), rows * heads, stream, team, static_cast<const T*>(query),
                    static_cast<const T*>(key), static_cast<const T*>(value), static_cast<const T*>(key_cache),
                    static_cast<const T*>(value_cache), past, position, static_cast<T*>(y),
                    static_cast<T*>(present_key), static_cast<T*>(present_value), static_cast<int>(capacity), scale);
            });
        });
    });
    return error ? error : launched;
}

}  // namespace trt_graft
