// Layer normalisation of each pixel over its channels, in NCHW.
//
// Floor: x is read once and y written once.  A block takes a strip of neighbouring pixels with all their channels, so
// that loads along a warp are contiguous; mean, variance and result each go over the strip again, which is then in L1.
#include "channel_layer_norm/kernel.cuh"
#include "common/kernel.cuh"

namespace trt_graft {
namespace {

constexpr int kLanes = 32;  // threads along the pixels
constexpr int kRows = 8;    // threads along the channels

// Sums each of N values over the rows of a block; every thread gets the sums of its lane.
template <int N>
__device__ void sum_over_rows(float (&sums)[N]) {
    __shared__ float partial[kRows][kLanes][N];
    __syncthreads();  // the sums of an earlier call may still be read
    for (int n = 0; n < N; ++n) partial[threadIdx.y][threadIdx.x][n] = sums[n];
    __syncthreads();
    for (int n = 0; n < N; ++n) {
        sums[n] = 0;
        for (int row = 0; row < kRows; ++row) sums[n] += partial[row][threadIdx.x][n];
    }
}

template <typename T, int N>
__global__ void channel_layer_norm_kernel(const T* x, const T* weight, const T* bias, T* y, int64_t channels,
                                          int64_t pixels, float epsilon, bool subtract_mean) {
    const int64_t pixel = (blockIdx.x * int64_t{kLanes} + threadIdx.x) * N;
    const bool inside = pixel < pixels;  // all threads reach the barriers
    const int64_t image = blockIdx.y * channels * pixels;
    const T* source = x + image + pixel;

    float mean[N] = {};
    if (inside) {
        for (int64_t c = threadIdx.y; c < channels; c += kRows) {
            const auto values = load_pack<N>(source + c * pixels);
            for (int n = 0; n < N; ++n) mean[n] += to_float(values.values[n]);
        }
    }
    sum_over_rows(mean);
    for (int n = 0; n < N; ++n) mean[n] /= channels;

    float scale[N] = {};
    if (inside) {
        for (int64_t c = threadIdx.y; c < channels; c += kRows) {
            const auto values = load_pack<N>(source + c * pixels);
            for (int n = 0; n < N; ++n) {
                const float deviation = to_float(values.values[n]) - mean[n];
                scale[n] += deviation * deviation;
            }
        }
    }
    sum_over_rows(scale);
    if (!inside) return;
    for (int n = 0; n < N; ++n) {
        scale[n] = rsqrtf(scale[n] / channels + epsilon);
        if (!subtract_mean) mean[n] = 0;
    }

    for (int64_t c = threadIdx.y; c < channels; c += kRows) {
        const float gamma = to_float(weight[c]), beta = to_float(bias[c]);
        const auto values = load_pack<N>(source + c * pixels);
        Pack<T, N> result;
        for (int n = 0; n < N; ++n) {
            result.values[n] = from_float<T>((to_float(values.values[n]) - mean[n]) * scale[n] * gamma + beta);
        }
        store_pack(y + image + c * pixels + pixel, result);
    }
}

}  // namespace

cudaError_t launch_channel_layer_norm(DataType type, const void* x, const void* weight, const void* bias, void* y,
                                      int64_t batch, int64_t channels, int64_t pixels, float epsilon,
                                      int32_t subtract_mean, cudaStream_t stream) {
    if (batch * channels * pixels == 0) return cudaSuccess;
    return dispatch(type, [&](auto tag) {
        using T = decltype(tag);
        const auto launch = [&](auto kernel, int64_t packed) {
            const dim3 grid(ceil_div(pixels, kLanes * packed), batch);
            kernel<<<grid, dim3(kLanes, kRows), 0, stream>>>(static_cast<const T*>(x), static_cast<const T*>(weight),
                                                             static_cast<const T*>(bias), static_cast<T*>(y), channels,
                                                             pixels, epsilon, subtract_mean != 0);
        };
        // Packs of four need rows of pixels that begin on their boundaries.
        if (pixels % 4 == 0) {
            launch(channel_layer_norm_kernel<T, 4>, 4);
        } else {
            launch(channel_layer_norm_kernel<T, 1>, 1);
        }
    });
}

}  // namespace trt_graft
