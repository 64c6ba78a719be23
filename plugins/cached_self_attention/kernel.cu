// One decoding step of causal self-attention, with a cache of keys and values: see common/cached_attention.cuh.
#include "cached_self_attention/kernel.cuh"
#include "common/cached_attention.cuh"

namespace trt_graft {

cudaError_t launch_cached_self_attention(DataType type, const void* query, const void* key, const void* value,
                                         const void* key_cache, const void* value_cache, const int32_t* position,
                                         void* y, void* present_key, void* present_value, int64_t batch, int64_t heads,
                                         int64_t capacity, int64_t head_dim, float scale, cudaStream_t stream) {
    return launch_cached_attention(type, query, key, value, key_cache, value_cache, OwnPast{}, position, y, present_key,
                                   present_value, batch, heads, capacity, head_dim, scale, stream);
}

}  // namespace trt_graft
