// Spreads channels over blocks of pixels.
//
// Floor: x is read once and y written once.  A thread takes one pack of a pixel of x; the threads beside it take the
// packs beside it, and write the channels beside it to the same pixels of y.
#include "common/kernel.cuh"
#include "pixel_shuffle/kernel.cuh"

namespace trt_graft {
namespace {

constexpr int kThreads = 256;

// Factor 2: a pack of 16 bytes holds one or two channels of four pixels of y, whose padding may take more packs than x
// has: `packs` in all.  blockIdx.x is the row of x, columns its width.
template <typename T>
__global__ void shuffle_blocks_kernel(const T* x, T* y, int channels, int pitch_x, int pitch_y, int packs,
                                      int columns) {
    constexpr int N = 16 / sizeof(T);
    const int index = blockIdx.y * kThreads + threadIdx.x;
    const int column = index / packs;
    const int pack = index % packs;
    if (column >= columns) return;
    const int64_t row = blockIdx.x;
    const int channel = pack * (N / 4);
    Pack<T, N> block = {};
    if (channel < channels) block = load_pack<N>(x + (row * columns + column) * pitch_x + pack * N);
    for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 2; ++j) {
            Pack<T, N / 4> pixel;
            for (int n = 0; n < N / 4; ++n) {
                // the second channel may be padding
                pixel.values[n] = channel + n < channels ? block.values[4 * n + 2 * i + j] : T(0);
            }
            store_pack(y + ((row * 2 + i) * columns * 2 + column * 2 + j) * pitch_y + channel, pixel);
        }
    }
}

// Any factor: a thread makes an element of y, or of its padding.  blockIdx.x is the row of y, columns its width.
template <typename T>
__global__ void shuffle_kernel(const T* x, T* y, int channels, int pitch_x, int pitch_y, int columns, int factor) {
    const int index = blockIdx.y * kThreads + threadIdx.x;
    const int column = index / pitch_y;
    const int channel = index % pitch_y;
    if (column >= columns) return;
    const int row = blockIdx.x;
    const int64_t pixel = int64_t{row / factor} * (columns / factor) + column / factor;
    const int from = (channel * factor + row % factor) * factor + column % factor;
    y[(int64_t{row} * columns + column) * pitch_y + channel] = channel < channels ? x[pixel * pitch_x + from] : T(0);
}

}  // namespace

cudaError_t launch_pixel_shuffle(DataType type, const void* x, void* y, int64_t batch, int64_t height, int64_t width,
                                 int64_t channels, int64_t factor, cudaStream_t stream) {
    if (batch * height * width * channels == 0) return cudaSuccess;
    if (factor < 1) return cudaErrorInvalidValue;
    return dispatch(type, [&](auto tag) {
        using T = decltype(tag);
        const T* source = static_cast<const T*>(x);
        T* target = static_cast<T*>(y);
        const int64_t rows = batch * height;
        const int64_t pitch_x = pitch(type, channels * factor * factor), pitch_y = pitch(type, channels);
        const auto blocks = [](int64_t rows, int64_t items) { return dim3(rows, ceil_div(items, kThreads)); };
        if (factor == 2) {
            const int64_t packs = pitch_y * sizeof(T) / 4;
            shuffle_blocks_kernel<<<blocks(rows, width * packs), kThreads, 0, stream>>>(source, target, channels,
                                                                                        pitch_x, pitch_y, packs, width);
        } else {
            const int64_t columns = width * factor;
            shuffle_kernel<<<blocks(rows * factor, columns * pitch_y), kThreads, 0, stream>>>(
                source, target, channels, pitch_x, pitch_y, columns, factor);
        }
    });
}

}  // namespace trt_graft
