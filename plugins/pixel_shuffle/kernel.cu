// Spreads channels over blocks of pixels.
//
// Floor: x is read once and y written once.  A thread takes a pixel of each of the `factor` channels that share a row
// of y, where they become neighbours; the threads beside it continue the rows of x and of y alike.
#include "common/kernel.cuh"
#include "pixel_shuffle/kernel.cuh"

namespace trt_graft {
namespace {

constexpr int kThreads = 256;

// Factor 2: N neighbours of each of two channels become 2·N of y.  rows is the height of y, width that of x.
template <typename T, int N>
__global__ void shuffle_pairs_kernel(const T* x, T* y, int64_t planes, int64_t rows, int64_t width) {
    // (plane of y, row of y, columns of x)
    const int64_t index = blockIdx.x * int64_t{kThreads} + threadIdx.x;
    const int64_t column = index % (width / N) * N;
    const int64_t row = index / (width / N) % rows;
    const int64_t plane = index / (width / N) / rows;
    if (plane >= planes) return;
    const int64_t channel = plane * 4 + row % 2 * 2;
    Pack<T, 2 * N> pairs;
    for (int j = 0; j < 2; ++j) {
        const auto pack = load_pack<N>(x + ((channel + j) * (rows / 2) + row / 2) * width + column);
        for (int n = 0; n < N; ++n) pairs.values[2 * n + j] = pack.values[n];
    }
    store_pack(y + ((plane * rows + row) * width + column) * 2, pairs);
}

template <typename T>
__global__ void shuffle_kernel(const T* x, T* y, int64_t planes, int64_t rows, int64_t width, int64_t factor) {
    const int64_t index = blockIdx.x * int64_t{kThreads} + threadIdx.x;
    const int64_t column = index % width;
    const int64_t row = index / width % rows;
    const int64_t plane = index / width / rows;
    if (plane >= planes) return;
    const int64_t channel = (plane * factor + row % factor) * factor;
    T* target = y + ((plane * rows + row) * width + column) * factor;
    for (int64_t j = 0; j < factor; ++j) {
        target[j] = x[((channel + j) * (rows / factor) + row / factor) * width + column];
    }
}

}  // namespace

cudaError_t launch_pixel_shuffle(DataType type, const void* x, void* y, int64_t batch, int64_t channels, int64_t height,
                                 int64_t width, int64_t factor, cudaStream_t stream) {
    if (batch * channels * height * width == 0) return cudaSuccess;
    if (factor < 1) return cudaErrorInvalidValue;
    return dispatch(type, [&](auto tag) {
        using T = decltype(tag);
        constexpr int kPack = 8 / sizeof(T);  // 8 bytes of each channel, 16 bytes of y
        const T* source = static_cast<const T*>(x);
        T* target = static_cast<T*>(y);
        const int64_t planes = batch * channels, rows = height * factor;
        const auto blocks = [&](int64_t packed) { return ceil_div(planes * rows * (width / packed), kThreads); };
        if (factor != 2) {
            shuffle_kernel<<<blocks(1), kThreads, 0, stream>>>(source, target, planes, rows, width, factor);
        } else if (width % kPack == 0) {
            shuffle_pairs_kernel<T, kPack><<<blocks(kPack), kThreads, 0, stream>>>(source, target, planes, rows, width);
        } else {
            shuffle_pairs_kernel<T, 1><<<blocks(1), kThreads, 0, stream>>>(source, target, planes, rows, width);
        }
    });
}

}  // namespace trt_graft
