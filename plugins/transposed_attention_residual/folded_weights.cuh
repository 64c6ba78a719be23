// The convolution's weights by the attention of an image's heads, made by each block for its outputs.
#pragma once

#include "common/tensor_core.cuh"
#include "transposed_attention/gram.cuh"

namespace trt_graft {

// weight · attention, per image.
//
// A warp multiplies the weights of 16 outputs, where they are in shared memory, by a head's attention and leaves there
// what it gets.  The product of 16 rows of attention takes them in such an order that a lane has four neighbours.
struct FoldedWeights {
    static constexpr bool kPerImage = true;
    const __half* attention;   // (images, heads, column, row)
    int head_channels, width;  // of the `width` columns and rows, those that exist

    // at(output, channel) is where a block's weight is, and 8 of neighbouring channels, if `channel` is a multiple
    // of 8.
    template <int OUTPUTS, int WARPS, typename At>
    __device__ void make(At at, int channels) const {
        if (head_channels == 48) {
            fold_48<OUTPUTS, WARPS>(at, channels);
        } else if (width == 48) {
            fold<OUTPUTS, WARPS, 48>(at, channels);
        } else if (width == 96) {
            fold<OUTPUTS, WARPS, 96>(at, channels);
        } else {
            fold<OUTPUTS, WARPS, kMaxChannels>(at, channels);
        }
    }

  private:
    // Restormer's heads.  A warp keeps a head's attention for all the outputs that it takes.
    template <int OUTPUTS, int WARPS, typename At>
    __device__ void fold_48(At at, int channels) const {
        constexpr int kDepth = 3, kTiles = 6;  // 16 · kDepth rows, 8 · kTiles columns
        const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4, heads = channels / 48;
        uint2 b[kDepth][kTiles];
        int loaded = -1;
#pragma unroll 1
        for (int task = threadIdx.x / 32; task < heads * (OUTPUTS / 16); task += WARPS) {
            const int head = task % heads, output = task / heads * 16, origin = head * 48;
            if (head != loaded) {
                loaded = head;
                const __half* const first =
                    attention + (int64_t{blockIdx.z} * heads + head) * 48 * 48 + group * 48 + 4 * pair;
#pragma unroll
                for (int k = 0; k < kDepth; ++k) {
                    for (int n = 0; n < kTiles; ++n) {
                        b[k][n] = __ldg(reinterpret_cast<const uint2*>(first + 8 * n * 48 + k * 16));
                    }
                }
            }
            uint2 a[kDepth][2];
#pragma unroll
            for (int k = 0; k < kDepth; ++k) {
                for (int i = 0; i < 2; ++i) {
                    a[k][i] = *reinterpret_cast<uint2*>(at(output + group + 8 * i, origin + k * 16 + 4 * pair));
                }
            }
            __syncwarp();
            float c[kTiles][4] = {};
#pragma unroll
            for (int k = 0; k < kDepth; ++k) {
                for (int n = 0; n < kTiles; ++n) {
                    multiply_add(c[n], {a[k][0].x, a[k][1].x, a[k][0].y, a[k][1].y}, b[k][n].x, b[k][n].y);
                }
            }
            const auto word = [&](int n, int i) { return as_word(__floats2half2_rn(c[n][2 * i], c[n][2 * i + 1])); };
#pragma unroll
            for (int n = 0; n < kTiles; n += 2) {
#if __CUDA_ARCH__ >= 900
                store_matrices(at(output + lane % 16, origin + (n + lane / 16) * 8),
                               {word(n, 0), word(n, 1), word(n + 1, 0), word(n + 1, 1)});
#else
                for (int i = 0; i < 4; ++i) {
                    auto* const pack = at(output + group + i % 2 * 8, origin + (n + i / 2) * 8);
                    reinterpret_cast<uint32_t*>(pack)[pair] = word(n + i / 2, i % 2);
                }
#endif
            }
        }
    }

    template <int OUTPUTS, int WARPS, int WIDTH, typename At>
    __device__ void fold(At at, int channels) const {
        // Of attention, 16 · kDepth rows and 8 · kTiles columns are on their way at once.
        constexpr int kDepth = WIDTH == 48 ? 3 : 2, kRounds = WIDTH / 16 / kDepth, kTiles = 6;
        const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4, heads = channels / head_channels;
#pragma unroll 1
        for (int task = threadIdx.x / 32; task < heads * (OUTPUTS / 16); task += WARPS) {
            const int head = task % heads, output = task / heads * 16 + group, origin = head * head_channels;
            const __half* const columns = attention + (int64_t{blockIdx.z} * heads + head) * WIDTH * WIDTH;
            uint2 a[kRounds * kDepth][2];
#pragma unroll
            for (int k = 0; k < kRounds * kDepth; ++k) {
                const int row = k * 16 + 4 * pair;
                for (int i = 0; i < 2; ++i) {
                    a[k][i] =
                        row < head_channels ? *reinterpret_cast<uint2*>(at(output + 8 * i, origin + row)) : uint2{};
                }
            }
            __syncwarp();
#pragma unroll 1
            for (int begin = 0; begin < head_channels; begin += kTiles * 8) {
                float c[kTiles][4] = {};
#pragma unroll
                for (int round = 0; round < kRounds; ++round) {
                    if (round * kDepth * 16 >= head_channels) break;
                    uint2 b[kDepth][kTiles];
#pragma unroll
                    for (int i = 0; i < kDepth; ++i) {
                        const int row = (round * kDepth + i) * 16 + 4 * pair;
                        for (int n = 0; n < kTiles; ++n) {
                            const int column = begin + 8 * n + group;
                            b[i][n] = row < head_channels && column < head_channels
                                          ? __ldg(reinterpret_cast<const uint2*>(columns + column * WIDTH + row))
                                          : uint2{};
                        }
                    }
#pragma unroll
                    for (int i = 0; i < kDepth; ++i) {
                        const auto& words = a[round * kDepth + i];
                        for (int n = 0; n < kTiles; ++n) {
                            multiply_add(c[n], {words[0].x, words[1].x, words[0].y, words[1].y}, b[i][n].x, b[i][n].y);
                        }
                    }
                }
                for (int n = 0; n < kTiles; ++n) {
                    const int column = begin + 8 * n + 2 * pair;
                    if (column >= head_channels) continue;
                    for (int i = 0; i < 2; ++i) {
                        *reinterpret_cast<__half2*>(at(output + 8 * i, origin + column)) =
                            __floats2half2_rn(c[n][2 * i], c[n][2 * i + 1]);
                    }
                }
            }
        }
    }
};

}  // namespace trt_graft
