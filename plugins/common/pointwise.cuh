// 1 × 1 convolutions of channel-last images, y = x · weightᵀ for every pixel: what norm_pointwise_conv,
// pointwise_conv_residual and transposed_attention_residual share.
//
// On tensor cores a warp multiplies 16 pixels by a tile of 8 outputs, 16 channels at a time.  Both factors may number
// their channels in any order, as long as it is the same one, and outputs may have any order at all.  Here the numbers
// that an instruction gives to one lane are neighbours in memory:
//
//   granule  32 channels, two instructions: lane (group, pair) has channels 8·pair … 8·pair + 7 of it
//   chunk    32 outputs, four tiles: lane (group, pair) has outputs 8·pair … 8·pair + 7 of it
//
// both for pixels group and group + 8.  So x comes from memory into registers and y goes from there to memory, 16
// bytes to a lane and 64 to a pixel at once, without a detour through shared memory.  That holds the weights alone, as
// fragments: in the order in which lanes read them.  They are copied once, then each warp works for itself.
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
constexpr int kChunkTiles = 4;       // of 8 outputs; a last chunk may have two, of which a lane gets four neighbours
constexpr int kFragmentBytes = 512;  // a granule of a tile: 16 bytes for each lane
constexpr int kMaxWidth = 1 << 20;   // channels or outputs: their products with what a block takes are int

// The GPU that the caller has chosen.
struct Gpu {
    int multiprocessors = 1, shared_bytes = 0;  // shared memory that one block may have
};

inline cudaError_t find_gpu(Gpu& gpu) {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (!error) error = cudaDeviceGetAttribute(&gpu.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (!error) error = cudaDeviceGetAttribute(&gpu.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
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

// The first `count` of eight values, and zeros.
__device__ inline uint4 first_of(const uint4& words, int count) {
    const auto mask = [&](int i) { return (2 * i < count ? 0xffffu : 0) | (2 * i + 1 < count ? 0xffff0000u : 0); };
    return {words.x & mask(0), words.y & mask(1), words.z & mask(2), words.w & mask(3)};
}

// c += x · weights over a granule; `upper` and `lower` are the lane's channels of pixels `group` and `group + 8`.
__device__ inline void multiply_granule(float (&c)[4], const uint4& upper, const uint4& lower, const uint4& weights) {
    multiply_add(c, {upper.x, lower.x, upper.y, lower.y}, weights.x, weights.y);
    multiply_add(c, {upper.z, lower.z, upper.w, lower.w}, weights.z, weights.w);
}

// Starts to copy the fragments begin, begin + step, … of a tile: of the granules of weight (outputs, channels), and
// zeros where these end.
//
// The tile is one of `tiles` in a slice of outputs that begins at `first`; `fragments` are the tile's, `stride` apart.
__device__ inline void copy_fragments(uint4* fragments, int stride, const __half* __restrict__ weight, int first,
                                      int tile, int tiles, int begin, int end, int step, int outputs, int channels) {
    const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
    const int chunk = tile / kChunkTiles * kChunkTiles;
    const int width = tiles - chunk < kChunkTiles ? tiles - chunk : kChunkTiles;  // tiles of the chunk
    // Column `group` of the tile goes to lanes whose pair is group / 2: number group % 2 of two outputs.
    const int output = first + chunk * 8 + group / 2 * 2 * width + (tile - chunk) * 2 + group % 2;
    const __half* const row = weight + int64_t{output} * channels;
    for (int granule = begin; granule < end; granule += step) {
        const int channel = granule * kGranule + 8 * pair;
        uint4* const to = fragments + granule * stride + lane;
        if (output >= outputs || channel >= channels) {
            *to = {};
        } else if (channels % 8 == 0) {
            __pipeline_memcpy_async(to, row + channel, 16);
        } else {  // rows that do not begin on boundaries
            Pack<__half, 8> values = {};
            for (int n = 0; n < 8; ++n) {
                if (channel + n < channels) values.values[n] = row[channel + n];
            }
            store_pack(reinterpret_cast<__half*>(to), values);
        }
    }
}

// Starts to copy `count` values, and zeros up to `size`, a multiple of 8.
__device__ inline void copy_values(__half* to, const __half* __restrict__ from, int count, int size) {
    for (int i = threadIdx.x * 8; i < size; i += blockDim.x * 8) {
        if (i + 8 <= count) {
            __pipeline_memcpy_async(to + i, from + i, 16);
        } else {
            for (int n = i; n < i + 8; ++n) to[n] = n < count ? from[n] : __half();
        }
    }
}

// One store of 8 or 16 bytes.  The compiler makes single words of a store_pack here.
__device__ inline void store_words(__half* target, const uint32_t (&words)[2]) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(target), "r"(words[0]), "r"(words[1]) : "memory");
}

__device__ inline void store_words(__half* target, const uint32_t (&words)[4]) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(words[0]), "r"(words[1]), "r"(words[2]),
                 "r"(words[3])
                 : "memory");
}

// Rounds a lane's outputs of a pixel and stores them: columns 2·half and 2·half + 1 of its fragments c of a chunk.
template <int TILES>
__device__ void store_outputs(__half* target, const float (&c)[TILES][4], int half) {
    uint32_t words[TILES];
    for (int j = 0; j < TILES; ++j) words[j] = as_word(__floats2half2_rn(c[j][2 * half], c[j][2 * half + 1]));
    store_words(target, words);
}

// Makes a lane's outputs from `count` on zeros.
template <int TILES>
__device__ void clear_from(float (&c)[TILES][4], int count) {
    for (int j = 0; j < TILES; ++j) {
        for (int n = 0; n < 4; ++n) {
            if (2 * j + n % 2 >= count) c[j][n] = 0;
        }
    }
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
