// Activations: GELU, x · Φ(x) with Φ the normal distribution function, exact and as fast as FP16 results need it; ReLU.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/launch.h"

namespace trt_graft {

// ½x · (1 + erf(x / √2)).
__device__ inline float exact_gelu(float x) {
    const float half = 0.5f * x;
    return fmaf(half, erff(x * 0.70710678f), half);
}

// ½x · (1 + tanh(x · P(x²))), seven FP32 instructions and tanh.approx in place of erff's forty.
//
// P is the minimax fit, of degree 2 and within |x| ≤ 6, of the error in x · Φ(x) relative to max(1, |x|): at most
// 1.6e-5 with an exact tanh.  The instruction's own error, 2⁻¹¹ of tanh, makes 2.6e-4 of it.  Beyond |x| = 6, P stays
// as it is and tanh is ±1: x or zero is left.  −∞ becomes NaN, as in the exact formula.
__device__ inline float fast_gelu(float x) {
    const float square = fminf(x * x, 36.f);
    const float p = fmaf(fmaf(-3.2851034e-4f, square, 3.6878236e-2f), square, 0.79762519f);
    float tanh;
    asm("tanh.approx.f32 %0, %1;" : "=f"(tanh) : "f"(x * p));
    const float half = 0.5f * x;
    return fmaf(half, tanh, half);
}

// Compute capability 7.5 and later.
__device__ inline __half2 fast_tanh(__half2 x) {
    uint32_t y;
    asm("tanh.approx.f16x2 %0, %1;" : "=r"(y) : "r"(*reinterpret_cast<const uint32_t*>(&x)));
    return *reinterpret_cast<const __half2*>(&y);
}

// Of pairs of FP16 values, in FP16, where the fit may be of degree 1: within 1.4e-4 of max(1, |x|) with an exact tanh.
// Of −∞ nothing is left.
template <int N>
__device__ void apply_fast_gelu(__half2 (&x)[N]) {
    __half2 tanh[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        x[i] = __hmax2_nan(x[i], __float2half2_rn(-65504.f));
        const __half2 p = __hfma2(__hmul2(x[i], x[i]), __float2half2_rn(0.0352f), __float2half2_rn(0.7991f));
        tanh[i] = __hmul2(x[i], p);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) tanh[i] = fast_tanh(tanh[i]);  // all are on their way before the first is needed
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const __half2 half = __hmul2(x[i], __float2half2_rn(0.5f));
        x[i] = __hfma2(half, tanh[i], half);
    }
}

__device__ inline float activated(float x, Activation activation) {
    if (activation == Activation::kGelu) return exact_gelu(x);
    return activation == Activation::kRelu && x < 0 ? 0 : x;  // NaN stays
}

}  // namespace trt_graft
