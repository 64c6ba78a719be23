// LayerNorm of a warp's 16 pixels in half2: the sums are products on tensor cores.
//
// Of each 16 channels a lane has four words, as in a fragment a (see tensor_core.cuh): word n is of pixel
// `group` + 8 · (n % 2), channels 2 · pair and 2 · pair + 1, plus 8 · (n / 2).
#pragma once

#include "common/pointwise.cuh"

namespace trt_graft {

// First add_sum of all words; then find_means; then `deviation` of each word and add_squares of those; then
// find_scales; then `normalised` of each deviation.
class PixelNorm {
  public:
    __device__ void add_sum(const uint32_t (&x)[4], int step) { multiply_add(sums_[step % 2], x, kOnes, kOnes); }

    __device__ void find_means(int channels) {
        inverse_ = 1.0f / channels;
        for (int i = 0; i < 2; ++i) {
            const float sum = sums_[0][2 * i] + sums_[1][2 * i], quotient = sum * inverse_;
            // exact, where the values are all the same
            mean_[i] = fmaf(fmaf(-quotient, channels, sum), inverse_, quotient);
            minus_[i] = __float2half2_rn(-0.5f * mean_[i]);
            rest_[i] = 0.5f * mean_[i] + __low2float(minus_[i]);
        }
    }

    // Half of the deviation, which FP16 can always hold: x / 2 − half, where `half` is the mean's, rounded.  What that
    // leaves out, `rest`, is subtracted later.
    __device__ uint32_t deviation(uint32_t x, int n) const {
        return as_word(__hfma2(as_pair(x), __float2half2_rn(0.5f), minus_[n % 2]));
    }

    // Products of all pixels: the squares are on the diagonal.
    __device__ void add_squares(const uint32_t (&deviations)[4]) {
        multiply_add(upper_, deviations, deviations[0], deviations[2]);
        multiply_add(lower_, deviations, deviations[1], deviations[3]);
    }

    __device__ void find_scales(float epsilon, bool subtract_mean) {
        const int group = threadIdx.x % 32 / 4;
        const float squares[] = {group % 2 == 0 ? upper_[0] : upper_[1], group % 2 == 0 ? lower_[2] : lower_[3]};
        for (int i = 0; i < 2; ++i) {
            const float sum = __shfl_sync(0xffffffffu, squares[i], group * 4 + group / 2);
            const float factor = rsqrtf(fmaxf(4 * (sum * inverse_ - rest_[i] * rest_[i]), 0.0f) + epsilon);
            // A factor of FP16 would be off for all channels alike: `more` is what it lacks.
            scale_[i] = __float2half2_rn(2 * factor);
            more_[i] = __float2half2_rn(2 * factor - __low2float(scale_[i]));
            shift_[i] = __float2half2_rn(((subtract_mean ? 0 : mean_[i]) - 2 * rest_[i]) * factor);
        }
    }

    // `factors` are the channels' pairs of gamma and of beta.
    __device__ uint32_t normalised(uint32_t deviation, int n, uint2 factors) const {
        const __half2 x = as_pair(deviation);
        const __half2 scaled = __hfma2(x, scale_[n % 2], __hfma2(x, more_[n % 2], shift_[n % 2]));
        return as_word(__hfma2(scaled, as_pair(factors.x), as_pair(factors.y)));
    }

  private:
    float sums_[2][4] = {}, upper_[4] = {}, lower_[4] = {};  // two sums, for shorter chains
    float inverse_, mean_[2], rest_[2];
    __half2 minus_[2], scale_[2], more_[2], shift_[2];
};

// All of that, for pixels whose `channels` channels, a multiple of 8, are followed by zeros up to STEPS · 16.  The
// factors are pairs of gamma, then of beta, for each pair of channels.
template <int STEPS>
__device__ void normalise_pixels(uint32_t (&x)[STEPS][4], const uint2* factors, int channels, float epsilon,
                                 bool subtract_mean) {
    PixelNorm norm;
#pragma unroll
    for (int k = 0; k < STEPS; ++k) norm.add_sum(x[k], k);
    norm.find_means(channels);
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            x[k][n] = norm.deviation(x[k][n], n);
            if (k * 16 + n / 2 * 8 >= channels) x[k][n] = 0;
        }
        norm.add_squares(x[k]);
    }
    norm.find_scales(epsilon, subtract_mean);
    const int pair = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
#pragma unroll
        for (int n = 0; n < 4; ++n) x[k][n] = norm.normalised(x[k][n], n, factors[k * 8 + n / 2 * 4 + pair]);
    }
}

}  // namespace trt_graft
