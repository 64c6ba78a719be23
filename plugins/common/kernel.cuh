// What the kernels share: element types, packed loads, reductions, sizes of grids.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/launch.h"

namespace trt_graft {

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
    return x;
}
// Rounds to nearest; values beyond FP16 become infinite, as in PyTorch.
template <>
__device__ inline __half from_float<__half>(float x) {
    return __float2half_rn(x);
}

// N elements that are loaded and stored as one word.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
    T values[N];
};

template <int N, typename T>
__device__ Pack<T, N> load_pack(const T* pointer) {
    return *reinterpret_cast<const Pack<T, N>*>(pointer);
}

template <int N, typename T>
__device__ void store_pack(T* pointer, const Pack<T, N>& pack) {
    // The compiler may cut a store of eight halves into smaller ones.
    if constexpr (sizeof(pack) == 16) {
        *reinterpret_cast<uint4*>(pointer) = *reinterpret_cast<const uint4*>(&pack);
    } else {
        *reinterpret_cast<Pack<T, N>*>(pointer) = pack;
    }
}

// Sum over the 32 lanes of a warp; every lane gets it.
__device__ inline float warp_sum(float x) {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

__device__ inline float warp_max(float x) {
    for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

// Calls launch(T{}) with T the C++ type of `type`; the value is a tag only.
template <typename Launch>
cudaError_t dispatch(DataType type, Launch launch) {
    switch (type) {
        case DataType::kFloat:
            launch(float{});
            break;
        case DataType::kHalf:
            launch(__half{});
            break;
        default:
            return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
}

}  // namespace trt_graft
