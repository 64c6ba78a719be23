#pragma once

#include "common/launch.h"

namespace trt_graft {

// present = cache, with each beam's key and value written to its slot `position`;
// y = softmax(query · scale · past_keyᵀ) · past_value per head, over the slots 0 … position, of which a beam finds slot
// s < position in the cache of the beam ancestors[image, beam, s], and slot `position` in its own.
//
// query, key, value, y         (images·beams, 1, heads·head_dim), head_dim ≤ 128
// key_cache, value_cache,
// present_key, present_value   (images, beams, heads, capacity, head_dim), capacity ≥ 1
// ancestors                    (images, beams, capacity), clamped to 0 … beams − 1
// position                     one int32 on the device, clamped to 0 … capacity − 1
//
// A present cache may be the cache itself, and then only its slots `position` are written; otherwise they do not
// overlap.
TRT_GRAFT_API cudaError_t launch_beam_self_attention(DataType type, const void* query, const void* key,
                                                     const void* value, const void* key_cache, const void* value_cache,
                                                     const int32_t* ancestors, const int32_t* position, void* y,
                                                     void* present_key, void* present_value, int64_t images,
                                                     int64_t beams, int64_t heads, int64_t capacity, int64_t head_dim,
                                                     float scale, cudaStream_t stream);

}  // namespace trt_graft
