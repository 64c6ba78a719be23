// 1 × 1 convolutions of channel-last images, y = x · weightᵀ for every pixel: what norm_pointwise_conv,
// pointwise_conv_residual and transposed_attention_residual share.
//
// On tensor cores a warp multiplies 16 pixels by a tile of 8 outputs, 16 channels at a time.  Pixels and weights come
// from shared memory, as rows of channels.  Outputs may have any order at all: the rows of weights have one in which
// the outputs that two or four tiles give to a lane, two each, are neighbours in memory, 8 or 16 bytes.
//
// Kernels that keep pixels in registers number the channels so that a lane has neighbours of them, too:
//
//   granule  32 channels, two instructions: lane (group, pair) has channels 8·pair … 8·pair + 7 of it
//
// All other types and sizes are multiplied on FP32 units, see multiply_block.
#pragma once

#include <cuda_pipeline.h>

#include <type_traits>

#include "common/dependent_launch.cuh"
#include "common/kernel.cuh"
#include "common/tensor_core.cuh"

namespace trt_graft {

template <int N>
using Int = std::integral_constant<int, N>;

constexpr int kGranule = 32;         // channels
constexpr int kFragmentBytes = 512;  // a granule of a tile: 16 bytes for each lane
constexpr int kMaxWidth = 1 << 20;   // channels or outputs: their products with what a block takes are int

// The GPU that the caller has chosen.
struct Gpu {
    int multiprocessors = 1, shared_bytes = 0;  // shared memory that one block may have
    bool is_hopper = false;                     // compute capability 9.0: it runs what is compiled for sm_90a
};

inline cudaError_t find_gpu(Gpu& gpu) {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (!error) error = cudaDeviceGetAttribute(&gpu.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (!error) error = cudaDeviceGetAttribute(&gpu.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    int major = 0, minor = 0;
    if (!error) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (!error) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    gpu.is_hopper = major == 9 && minor == 0;
    return error;
}

// ---- Tensor cores ---------------------------------------------------------------------------------------------------

// Eight FP16 values in four words.
__device__ inline void unpack(const uint4& words, float (&values)[8]) {
    const uint32_t pairs[] = {words.x, words.y, words.z, words.w};
    for (int i = 0; i < 4; ++i) {
        const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&pairs[i]));
        values[2 * i] = pair.x;
        values[2 * i + 1] = pair.y;
    }
}

__device__ inline uint4 pack(const float (&values)[8]) {
    uint32_t pairs[4];
    for (int i = 0; i < 4; ++i) pairs[i] = as_word(__floats2half2_rn(values[2 * i], values[2 * i + 1]));
    return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

// c += x · weights over a granule; `upper` and `lower` are the lane's channels of pixels `group` and `group + 8`.
__device__ inline void multiply_granule(float (&c)[4], const uint4& upper, const uint4& lower, const uint4& weights) {
    multiply_add(c, {upper.x, lower.x, upper.y, lower.y}, weights.x, weights.y);
    multiply_add(c, {upper.z, lower.z, upper.w, lower.w}, weights.z, weights.w);
}

// ---- Tiles in shared memory -----------------------------------------------------------------------------------------
//
// Where a block multiplies, shared memory holds rows of channels: of pixels, and of weights, one for each output.  A
// row is an odd number of 16 bytes, so that eight rows, which ldmatrix reads at once, are in different banks.

template <int STEPS>
constexpr int kRowPitch = STEPS * 16 + 8;  // of STEPS times 16 channels

// Starts to copy ROWS rows of STEPS·16 channels, and zeros where rows or channels end: `rows` and `channels` exist.
// Row r of shared memory is row order(r) of `from`, where order(r + 16) is order(r) + 16, or the same with 32 if a
// block copies 32 rows at once.
template <int ROWS, int STEPS, int PITCH, int THREADS, typename F>
__device__ void copy_rows(__half* to, const __half* __restrict__ from, int64_t rows, int pitch, int channels,
                          bool aligned, F order) {
    constexpr int kUnits = 2 * STEPS, kAtOnce = THREADS / (kUnits * 16) * 16;  // 16 bytes are a thread's
    static_assert(kAtOnce > 0 && ROWS % kAtOnce == 0);
    const int place = threadIdx.x / kUnits, channel = threadIdx.x % kUnits * 8, row = order(place);
    if (kAtOnce * kUnits < THREADS && place >= kAtOnce) return;
    const __half* source = from + int64_t{row} * pitch + channel;
    const int64_t step = int64_t{kAtOnce} * pitch;
    to += place * PITCH + channel;
    if (aligned && rows >= ROWS && channels >= STEPS * 16) {
#pragma unroll
        for (int i = 0; i < ROWS; i += kAtOnce, source += step) copy_or_clear(to + i * PITCH, source, true);
        return;
    }
#pragma unroll 1
    for (int i = 0; i < ROWS; i += kAtOnce, source += step) {
        if (aligned) {
            copy_or_clear(to + i * PITCH, source, row + i < rows && channel < channels);
        } else {  // rows that do not begin on boundaries, or whose last 16 bytes are not whole
            Pack<__half, 8> values = {};
            for (int n = 0; n < 8; ++n) {
                if (row + i < rows && channel + n < channels) values.values[n] = source[n];
            }
            store_pack(to + i * PITCH, values);
        }
    }
}

// The output whose weights are row `place` of shared memory, so that a lane gets 2·TILES neighbours of TILES tiles.
template <int TILES>
__device__ int output_at(int place) {
    const int tile = place / 8 % TILES;
    return place / (TILES * 8) * (TILES * 8) + place % 8 / 2 * (2 * TILES) + tile * 2 + place % 2;
}

// The row and the first channel that a lane passes to load_matrices: for a fragment of 16 pixels, and for two of eight
// outputs each.
__device__ inline int pixel_place(int lane, int pitch) { return lane % 16 * pitch + lane / 16 * 8; }
__device__ inline int output_place(int lane, int pitch) {
    return (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8;
}

// c += x · weights over 16 channels; x[i] and `weights` are the lane's places.
template <int STRIPS, int TILES>
__device__ void multiply_step(float (&c)[STRIPS][TILES][4], const __half* const (&x)[STRIPS], const __half* weights,
                              int pitch) {
    static_assert(TILES % 2 == 0);
    uint32_t rows[STRIPS][4];
    for (int i = 0; i < STRIPS; ++i) load_matrices(rows[i], x[i]);
#pragma unroll
    for (int j = 0; j < TILES; j += 2) {
        uint32_t columns[4];
        load_matrices(columns, weights + j * 8 * pitch);
        for (int i = 0; i < STRIPS; ++i) {
            multiply_add(c[i][j], rows[i], columns[0], columns[1]);
            multiply_add(c[i][j + 1], rows[i], columns[2], columns[3]);
        }
    }
}

// c = a · b.  What sums begin with is a product, too: one instruction for a tile instead of a conversion, an addition
// and a move for each of a lane's values.
__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    // volatile: the compiler would rather copy what is the same for two strips
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %10, %10, %10};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
#else
    for (int n = 0; n < 4; ++n) c[n] = 0;
    multiply_add(c, a, b0, b1);
#endif
}

// A row of the first factor of a bias: 1 in one of its columns, of the first or the second half of a word.
__device__ inline uint32_t one_in(int half) { return threadIdx.x % 4 > 0 ? 0 : half > 0 ? 0x3c000000 : 0x3c00; }

constexpr uint32_t kOnes = 0x3c003c00;  // both halves of a word

// One store of 8 or 16 bytes.  The compiler makes single words of a store_pack here.
__device__ inline void store_words(__half* target, const uint32_t (&words)[2]) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(target), "r"(words[0]), "r"(words[1]) : "memory");
}

__device__ inline void store_words(__half* target, const uint32_t (&words)[4]) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(words[0]), "r"(words[1]), "r"(words[2]),
                 "r"(words[3])
                 : "memory");
}

// Rounds a lane's outputs of a pixel, TILES tiles from c[0] on, and stores them: columns 2·half and 2·half + 1.
template <int TILES>
__device__ void store_outputs(__half* target, const float (*c)[4], int half) {
    uint32_t words[TILES];
    for (int j = 0; j < TILES; ++j) words[j] = as_word(__floats2half2_rn(c[j][2 * half], c[j][2 * half + 1]));
    store_words(target, words);
}

// ---- FP32 multiply-adds ---------------------------------------------------------------------------------------------

constexpr int kSide = 16;                 // a block is 16 threads along the outputs × 16 along the pixels
constexpr int kBlockOutputs = 4 * kSide;  // four neighbours for each thread
constexpr int kFewPixels = 8192;          // up to which blocks should be small, to be many

// One block's product: ROWS·16 pixels by 64 outputs from `first` on.
//
// x(row, channel)       the value of the block's pixel `row`
// y(row, output, sums)  takes four outputs from `output` on
template <int ROWS, typename T, typename X, typename Y>
__device__ void multiply_block(const T* __restrict__ weight, int64_t first, int outputs, int channels, X x, Y y) {
    constexpr int kDepth = 16;  // channels at a time
    // Rows are 16 bytes longer than they need be: two threads that store one column of them meet other banks.
    __shared__ alignas(16) float pixels[kDepth][ROWS * kSide + 4], weights[kDepth][kBlockOutputs + 4];

    const int across = threadIdx.x % kSide, down = threadIdx.x / kSide;
    float next_pixels[ROWS], next_weights[4];  // what the thread loads while it multiplies
    const auto load = [&](int begin) {
        const int channel = begin + across;
        for (int i = 0; i < ROWS; ++i) next_pixels[i] = channel < channels ? x(down + i * kSide, channel) : 0;
        for (int i = 0; i < 4; ++i) {
            const int64_t output = first + down + i * kSide;
            const bool inside = channel < channels && output < outputs;
            next_weights[i] = inside ? to_float(weight[output * channels + channel]) : 0;
        }
    };

    float sums[ROWS][4] = {};
    load(0);
    for (int begin = 0; begin < channels; begin += kDepth) {
        __syncthreads();  // nobody reads what the last channels left
        for (int i = 0; i < ROWS; ++i) pixels[across][down + i * kSide] = next_pixels[i];
        for (int i = 0; i < 4; ++i) weights[across][down + i * kSide] = next_weights[i];
        __syncthreads();
        if (begin + kDepth < channels) load(begin + kDepth);
        for (int k = 0; k < kDepth; ++k) {
            const auto factors = load_pack<4>(&weights[k][4 * across]);
            for (int r = 0; r < ROWS; r += 4) {
                const auto values = load_pack<4>(&pixels[k][ROWS * down + r]);
                for (int i = 0; i < 4; ++i) {
                    for (int n = 0; n < 4; ++n) sums[r + i][n] += values.values[i] * factors.values[n];
                }
            }
        }
    }
    for (int r = 0; r < ROWS; ++r) y(ROWS * down + r, static_cast<int>(first) + 4 * across, sums[r]);
}

// Rounds four outputs of a pixel, `output` and the next ones, and stores them; zeros in the pixel's padding.
template <typename T>
__device__ void store_four(T* pixel, int output, int outputs, int pitch, const float (&values)[4]) {
    Pack<T, 4> result;
    for (int n = 0; n < 4; ++n) result.values[n] = from_float<T>(output + n < outputs ? values[n] : 0);
    if (pitch % 4 == 0) {
        if (output < pitch) store_pack(pixel + output, result);
    } else {
        for (int n = 0; n < 4; ++n) {
            if (output + n < pitch) pixel[output + n] = result.values[n];
        }
    }
}

}  // namespace trt_graft
