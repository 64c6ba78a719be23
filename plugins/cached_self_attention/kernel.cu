// One decoding step of causal self-attention, with a cache of keys and values.
//
// Floor: the slots in use are read once, one slot is written; see common/decode_attention.cuh.  Where the present cache
// is not the cache itself, all of it is copied as well.  The block that owns a head does all of this for it, and takes
// the new slot from key and value: no block waits for memory that another one writes.
#include "cached_self_attention/kernel.cuh"
#include "common/decode_attention.cuh"

namespace trt_graft {
namespace {

// Writes rows begin … end − 1 of a head, a team for each.
template <typename T, int N, int PACKS, typename Row>
__device__ void write_rows(const Team<T, N, PACKS>& team, T* present, Row row, int64_t begin, int64_t end) {
    for (int64_t slot = begin + team.index(); slot < end; slot += team.count()) {
        Pack<T, N> part[PACKS];
        team.load(part, row(slot));
        team.store(present + slot * team.head_dim, part);
    }
}

template <typename T, int N, int PACKS>
__global__ void __launch_bounds__(kDecodeThreads)
    cached_self_attention_kernel(Team<T, N, PACKS> team, const T* query, const T* key, const T* value,
                                 const T* key_cache, const T* value_cache, const int32_t* position, T* y,
                                 T* present_key, T* present_value, int64_t capacity, float scale) {
    const int64_t now = max(int64_t{0}, min(int64_t{*position}, capacity - 1));
    const int64_t head = blockIdx.x * int64_t{team.head_dim};  // the block's head in query, key, value and y
    const auto row = [=](const T* cache, const T* fresh) {
        return
            [=](int64_t slot) { return slot == now ? fresh + head : cache + head * capacity + slot * team.head_dim; };
    };
    const auto key_row = row(key_cache, key), value_row = row(value_cache, value);
    decode_attention(team, query + head, key_row, value_row, y + head, now + 1, scale);

    const auto write = [&](T* present, const T* cache, auto source) {
        const bool in_place = present == cache;
        write_rows(team, present + head * capacity, source, in_place ? now : 0, in_place ? now + 1 : capacity);
    };
    write(present_key, key_cache, key_row);
    write(present_value, value_cache, value_row);
}

}  // namespace

cudaError_t launch_cached_self_attention(DataType type, const void* query, const void* key, const void* value,
                                         const void* key_cache, const void* value_cache, const int32_t* position,
                                         void* y, void* present_key, void* present_value, int64_t batch, int64_t heads,
                                         int64_t capacity, int64_t head_dim, float scale, cudaStream_t stream) {
    if (batch * heads * head_dim == 0) return cudaSuccess;
    if (capacity < 1 || head_dim > kDecodeMaxHeadDim || batch * heads > INT32_MAX) return cudaErrorInvalidValue;
    return dispatch(type, [&](auto tag) {
        using T = decltype(tag);
        dispatch_team<T>(head_dim, [&](auto team) {
            cached_self_attention_kernel<<<batch * heads, kDecodeThreads, 0, stream>>>(
                team, static_cast<const T*>(query), static_cast<const T*>(key), static_cast<const T*>(value),
                static_cast<const T*>(key_cache), static_cast<const T*>(value_cache), position, static_cast<T*>(y),
                static_cast<T*>(present_key), static_cast<T*>(present_value), capacity, scale);
        });
    });
}

}  // namespace trt_graft
