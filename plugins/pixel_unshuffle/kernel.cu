// Moves blocks of pixels into channels.
//
// Floor: x is read once and y written once.  A thread takes pixels that are neighbours in a row of x, and gives one to
// each of the `factor` channels that they belong to; the threads beside it continue the rows of x and of y alike.
#include "common/kernel.cuh"
#include "pixel_unshuffle/kernel.cuh"

namespace trt_graft {
namespace {

constexpr int kThreads = 256;

// Factor 2: 2·N neighbours of x become N of each of two channels.  columns is the width of y.
template <typename T, int N>
__global__ void unshuffle_pairs_kernel(const T* x, T* y, int64_t planes, int64_t height, int64_t columns) {
    // (plane of x, row of x, columns of y)
    const int64_t index = blockIdx.x * int64_t{kThreads} + threadIdx.x;
    const int64_t column = index % (columns / N) * N;
    const int64_t row = index / (columns / N) % height;
    const int64_t plane = index / (columns / N) / height;
    if (plane >= planes) return;
    const auto pairs = load_pack<2 * N>(x + ((plane * height + row) * columns + column) * 2);
    const int64_t channel = plane * 4 + row % 2 * 2;
    for (int j = 0; j < 2; ++j) {
        Pack<T, N> pack;
        for (int n = 0; n < N; ++n) pack.values[n] = pairs.values[2 * n + j];
        store_pack(y + ((channel + j) * (height / 2) + row / 2) * columns + column, pack);
    }
}

template <typename T>
__global__ void unshuffle_kernel(const T* x, T* y, int64_t planes, int64_t height, int64_t columns, int64_t factor) {
    const int64_t index = blockIdx.x * int64_t{kThreads} + threadIdx.x;
    const int64_t column = index % columns;
    const int64_t row = index / columns % height;
    const int64_t plane = index / columns / height;
    if (plane >= planes) return;
    const T* source = x + ((plane * height + row) * columns + column) * factor;
    const int64_t channel = (plane * factor + row % factor) * factor;
    for (int64_t j = 0; j < factor; ++j) {
        y[((channel + j) * (height / factor) + row / factor) * columns + column] = source[j];
    }
}

}  // namespace

cudaError_t launch_pixel_unshuffle(DataType type, const void* x, void* y, int64_t batch, int64_t channels,
                                   int64_t height, int64_t width, int64_t factor, cudaStream_t stream) {
    if (batch * channels * height * width == 0) return cudaSuccess;
    if (factor < 1 || height % factor != 0 || width % factor != 0) return cudaErrorInvalidValue;
    return dispatch(type, [&](auto tag) {
        using T = decltype(tag);
        constexpr int kPack = 8 / sizeof(T);  // 16 bytes of x, 8 bytes of each channel
        const T* source = static_cast<const T*>(x);
        T* target = static_cast<T*>(y);
        const int64_t planes = batch * channels, columns = width / factor;
        const auto blocks = [&](int64_t packed) { return ceil_div(planes * height * (columns / packed), kThreads); };
        if (factor != 2) {
            unshuffle_kernel<<<blocks(1), kThreads, 0, stream>>>(source, target, planes, height, columns, factor);
        } else if (columns % kPack == 0) {
            unshuffle_pairs_kernel<T, kPack>
                <<<blocks(kPack), kThreads, 0, stream>>>(source, target, planes, height, columns);
        } else {
            unshuffle_pairs_kernel<T, 1><<<blocks(1), kThreads, 0, stream>>>(source, target, planes, height, columns);
        }
    });
}

}  // namespace trt_graft
