// Moves blocks of pixels into channels.
//
// Floor: x is read once and y written once.  A thread makes one pack of a pixel of y and the threads beside it the
// packs beside it, so that a warp writes whole sectors of memory.  Threads that took a pack of x each would write four
// packs, every one of them half a sector.
#include "common/kernel.cuh"
#include "pixel_unshuffle/kernel.cuh"

namespace trt_graft {
namespace {

constexpr int kThreads = 256;

// Factor 2: a pack of 16 bytes holds one or two channels of four pixels of x.  A pixel of y is `packs` of them, however
// odd the channels of x.  blockIdx.x is the row of y, columns its width.
template <typename T>
__global__ void unshuffle_blocks_kernel(const T* x, T* y, int channels, int pitch, int packs, int columns) {
    constexpr int N = 16 / sizeof(T);
    const int index = blockIdx.y * kThreads + threadIdx.x;
    const int column = index / packs;
    const int pack = index % packs;
    if (column >= columns) return;
    const int64_t row = blockIdx.x;
    const int channel = pack * (N / 4);
    Pack<T, N / 4> pixels[4];
    for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 2; ++j) {
            const int64_t pixel = (row * 2 + i) * columns * 2 + column * 2 + j;
            pixels[2 * i + j] = load_pack<N / 4>(x + pixel * pitch + channel);
        }
    }
    Pack<T, N> block;
    for (int n = 0; n < N; ++n) {
        // the second channel may be padding
        block.values[n] = channel + n / 4 < channels ? pixels[n % 4].values[n / 4] : T(0);
    }
    store_pack(y + ((row * columns + column) * packs + pack) * N, block);
}

// Any factor: a thread makes an element of y, or of its padding.
template <typename T>
__global__ void unshuffle_kernel(const T* x, T* y, int channels, int pitch_x, int pitch_y, int columns, int factor) {
    const int index = blockIdx.y * kThreads + threadIdx.x;
    const int column = index / pitch_y;
    const int to = index % pitch_y;
    if (column >= columns) return;
    const int64_t row = blockIdx.x;
    const int channel = to / (factor * factor), i = to / factor % factor, j = to % factor;
    const int64_t pixel = (row * factor + i) * columns * factor + column * factor + j;
    y[(row * columns + column) * pitch_y + to] = channel < channels ? x[pixel * pitch_x + channel] : T(0);
}

}  // namespace

cudaError_t launch_pixel_unshuffle(DataType type, const void* x, void* y, int64_t batch, int64_t height, int64_t width,
                                   int64_t channels, int64_t factor, cudaStream_t stream) {
    if (batch * height * width * channels == 0) return cudaSuccess;
    if (factor < 1 || height % factor != 0 || width % factor != 0) return cudaErrorInvalidValue;
    return dispatch(type, [&](auto tag) {
        using T = decltype(tag);
        const T* source = static_cast<const T*>(x);
        T* target = static_cast<T*>(y);
        const int64_t rows = batch * height / factor, columns = width / factor;
        const int64_t pitch_x = pitch(type, channels), pitch_y = pitch(type, channels * factor * factor);
        const auto blocks = [&](int64_t packs) { return dim3(rows, ceil_div(columns * packs, kThreads)); };
        if (factor == 2) {
            const int64_t packs = pitch_y * sizeof(T) / 16;
            unshuffle_blocks_kernel<<<blocks(packs), kThreads, 0, stream>>>(source, target, channels, pitch_x, packs,
                                                                            columns);
        } else {
            unshuffle_kernel<<<blocks(pitch_y), kThreads, 0, stream>>>(source, target, channels, pitch_x, pitch_y,
                                                                       columns, factor);
        }
    });
}

}  // namespace trt_graft
