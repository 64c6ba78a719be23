// One decoding step of causal self-attention of beams, whose caches stay where they are: see
// common/cached_attention.cuh.  What beams have in common comes from L2 after the first of them has read it.
#include "beam_self_attention/kernel.cuh"
#include "common/cached_attention.cuh"

namespace trt_graft {

cudaError_t launch_beam_self_attention(DataType type, const void* query, const void* key, const void* value,
                                       const void* key_cache, const void* value_cache, const int32_t* ancestors,
                                       const int32_t* position, void* y, void* present_key, void* present_value,
                                       int64_t images, int64_t beams, int64_t heads, int64_t capacity, int64_t head_dim,
                                       float scale, cudaStream_t stream) {
    const AncestorsPast past{ancestors, static_cast<int>(beams), static_cast<int>(heads)};
    return launch_cached_attention(type, query, key, value, key_cache, value_cache, past, position, y, present_key,
                                   present_value, images * beams, heads, capacity, head_dim, scale, stream);
}

}  // namespace trt_graft
