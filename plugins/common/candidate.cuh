// Places with scores, put in an order: what argmax and the best of many are found with.
#pragma once

#include "common/kernel.cuh"

namespace trt_graft {

// A place and its score as one integer: the greatest is that of the highest score, and of the first place among equals;
// NaN counts as higher than all else.  All are greater than 0.
using Candidate = unsigned long long;

__device__ inline Candidate candidate(float score, uint32_t place) {
    constexpr uint32_t kSign = 0x80000000u;
    const uint32_t bits = score == 0 ? 0 : __float_as_uint(score);  // −0 is 0
    const uint32_t ordered = isnan(score) ? 0xffffffffu : bits & kSign ? ~bits : bits | kSign;
    return Candidate{ordered} << 32 | ~place;
}

__device__ inline uint32_t place_of(Candidate candidate) { return ~static_cast<uint32_t>(candidate); }

__device__ inline float score_of(Candidate candidate) {
    constexpr uint32_t kSign = 0x80000000u;
    const auto ordered = static_cast<uint32_t>(candidate >> 32);
    return __uint_as_float(ordered & kSign ? ordered ^ kSign : ~ordered);
}

// The greatest of a warp; every lane gets it.
__device__ inline Candidate warp_max(Candidate x) {
#if __CUDA_ARCH__ >= 800
    const auto high = __reduce_max_sync(0xffffffffu, static_cast<uint32_t>(x >> 32));
    const auto low = __reduce_max_sync(0xffffffffu, x >> 32 == high ? static_cast<uint32_t>(x) : 0);
    return Candidate{high} << 32 | low;
#else
    for (int offset = 16; offset > 0; offset /= 2) x = max(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
#endif
}

}  // namespace trt_graft
