// 1 × 1 convolution and the residual connection behind it, on tensor cores: what pointwise_conv_residual and
// transposed_attention_residual share.
//
// Floor: x and residual are read once, y is written once; 2·channels·outputs operations for each pixel weigh as much
// from 192 outputs on.  A block takes a tile of pixels × outputs at a time.  Slices of its channels come to shared
// memory through a ring, always several ahead, those of its next tile too; the weights come with the first tile's and
// stay, if there is room.  Where pixels are few, tiles are small, so that every multiprocessor has one, and several
// warps share the channels of one.
#pragma once

#include "common/pointwise.cuh"

namespace trt_graft {

struct PointwiseArguments {
    const void *x, *weight, *bias, *residual;
    void* y;
    int64_t pixels;  // of an image
    int channels, outputs, pitch_x, pitch_y;
};

// Where a block's weights come from: here from `weight`, the same for all pixels.  See FoldedWeights, too.
struct GivenWeights {
    static constexpr bool kPerImage = false;
};

// A warp takes 32 pixels by 48 outputs.  A block has ROWS × COLUMNS of these, PARTS warps for each: part p multiplies
// the channels 16·p …, 16·(p + PARTS) …, … of a slice, which has 16·STEPS.
template <int ROWS, int COLUMNS, int PARTS, int STEPS, int STAGES>
struct ResidualTile {
    static constexpr int kWarps = ROWS * COLUMNS * PARTS, kThreads = kWarps * 32;
    static constexpr int kPixels = ROWS * 32, kOutputs = COLUMNS * 48, kDepth = STEPS * 16;
    static constexpr int kPixelHalves = kPixels * kRowPitch<STEPS>, kOutputHalves = kOutputs * kRowPitch<STEPS>;
    // Of a multiprocessor, if shared memory has room.
    static constexpr int kBlocks = PARTS > 1 ? 1 : kThreads > 128 ? 2 : 3;
    static_assert(STEPS % PARTS == 0 && STAGES > 1);
    // Partial sums take the place of the ring.
    static_assert(PARTS == 1 || 2 * kWarps * 6 * 32 * 16 <= STAGES * kPixelHalves * 2);
};

// blockIdx.x is (share of the pixels, tile of outputs), blockIdx.z the image: blocks that read the same pixels are
// neighbours.  With several parts each block has one share only.  `slots` slices of the weights have room, all of them
// or STAGES.
//
// WEIGHTS that differ from image to image are made by the block itself, of what a kernel has left: all slices have room
// then.  Given ones are on their way before the kernel waits.
template <int ROWS, int COLUMNS, int PARTS, int STEPS, int STAGES, typename WEIGHTS>
__global__ void __launch_bounds__(ROWS * COLUMNS * PARTS * 32,
                                  ResidualTile<ROWS, COLUMNS, PARTS, STEPS, STAGES>::kBlocks)
    pointwise_residual_kernel(const __half* __restrict__ x, const __half* __restrict__ weight,
                              const __half* __restrict__ bias, const __half* __restrict__ residual,
                              __half* __restrict__ y, int64_t pixels, int shares, int channels, int outputs,
                              int pitch_x, int pitch_y, int slices, int slots, WEIGHTS weights_of) {
    using Tile = ResidualTile<ROWS, COLUMNS, PARTS, STEPS, STAGES>;
    // Tiles in pairs, of which a lane has four neighbouring outputs: 8 bytes, and 32 with the pixel's other lanes.
    constexpr int kTiles = 6, kPairs = 3, kPitch = kRowPitch<STEPS>;
    constexpr int kOwn = PARTS == 1 ? 2 : 1;  // strips of 16 pixels that a warp finishes: of two parts one each
    extern __shared__ uint4 shared[];
    allow_dependents();
    auto* const weights = reinterpret_cast<__half*>(shared);     // (slots, outputs, pitch)
    __half* const ring = weights + slots * Tile::kOutputHalves;  // (stages, pixels, pitch)
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
    const int column = warp % COLUMNS, row = warp / COLUMNS % ROWS, part = warp / (COLUMNS * ROWS);
    const unsigned tiles = (outputs + Tile::kOutputs - 1) / Tile::kOutputs;
    const int first_share = blockIdx.x / tiles, step = gridDim.x / tiles;
    const int first = blockIdx.x % tiles * Tile::kOutputs, own = first + column * 48;
    if constexpr (WEIGHTS::kPerImage) {
        x += blockIdx.z * pixels * pitch_x;
        residual += blockIdx.z * pixels * pitch_y;
        y += blockIdx.z * pixels * pitch_y;
    }

    const bool aligned = channels % 8 == 0;
    const auto copy_weights = [&](int slice, int slot) {
        copy_rows<Tile::kOutputs, STEPS, kPitch, Tile::kThreads>(
            weights + slot * Tile::kOutputHalves, weight + int64_t{first} * channels + slice * Tile::kDepth,
            outputs - first, channels, channels - slice * Tile::kDepth, aligned, output_at<2>);
    };
    const auto copy_pixels = [&](int share, int slice, int stage) {
        const int64_t begin = int64_t{share} * Tile::kPixels;
        copy_rows<Tile::kPixels, STEPS, kPitch, Tile::kThreads>(
            ring + stage * Tile::kPixelHalves, x + begin * pitch_x + slice * Tile::kDepth, pixels - begin, pitch_x,
            channels - slice * Tile::kDepth, aligned, [](int place) { return place; });
    };
    uint32_t biases[kTiles];  // the lane's column of each tile
    for (int j = 0; j < kTiles; ++j) {
        const int output = own + output_at<2>(j * 8 + group);
        biases[j] = output < outputs ? __half_as_ushort(bias[output]) : 0;
    }
    for (int slice = 0; slice < (WEIGHTS::kPerImage ? slices : 1); ++slice) copy_weights(slice, slice);
    if constexpr (WEIGHTS::kPerImage) __pipeline_commit();
    wait_for_previous();

    // Copies the next slice, of the pixels and, the first time or where they do not stay, of the weights.
    int next_share = first_share, next_slice = 0, next_stage = 0;
    const auto copy_next = [&] {
        if (next_share < shares) {
            copy_pixels(next_share, next_slice, next_stage);
            if constexpr (!WEIGHTS::kPerImage) {
                const bool starting = next_share == first_share;
                if (starting ? next_slice > 0 : slots < slices) {
                    copy_weights(next_slice, slots < slices ? next_stage : next_slice);
                }
            }
            if (++next_slice == slices) {
                next_slice = 0;
                next_share += step;
            }
        }
        __pipeline_commit();
        next_stage = next_stage + 1 == STAGES ? 0 : next_stage + 1;
    };
    for (int i = 0; i < STAGES - 1; ++i) copy_next();

    // The lane's values of residual for the first or the next share, and where they are.  Pixels behind the last one
    // repeat it and are not stored.
    uint32_t added[kOwn][2][kTiles];
    const int first_row = row * 32 + (part == 1 ? 16 : 0) + group, output = own + 4 * pair;
    const auto load_residual = [&](int share) {
        if (part >= 2) return;
        const int64_t begin = int64_t{share} * Tile::kPixels + first_row, last = pixels - 1 - begin;
        const int rows = last < 32 ? static_cast<int>(last) : 32;
        const __half* const source = residual + begin * pitch_y;
        if (outputs % 8 == 0 && own + 48 <= outputs) {
            for (int n = 0; n < 2 * kOwn; ++n) {
                const __half* const from = source + int64_t{8 * n < rows ? 8 * n : rows} * pitch_y;
                for (int j = 0; j < kPairs; ++j) {
                    const auto words = load_pack<2>(reinterpret_cast<const uint32_t*>(from + output + 16 * j));
                    added[n / 2][n % 2][2 * j] = words.values[0];
                    added[n / 2][n % 2][2 * j + 1] = words.values[1];
                }
            }
        } else {  // zeros behind the last output
            for (int n = 0; n < 2 * kOwn; ++n) {
                const __half* const from = source + int64_t{8 * n < rows ? 8 * n : rows} * pitch_y;
                for (int j = 0; j < kTiles; ++j) {
                    const int there = output + j / 2 * 16 + j % 2 * 2;
                    added[n / 2][n % 2][j] = there < outputs ? __half_as_ushort(from[there]) : 0;
                    if (there + 1 < outputs)
                        added[n / 2][n % 2][j] |= uint32_t{__half_as_ushort(from[there + 1])} << 16;
                }
            }
        }
    };
    load_residual(first_share);
    if constexpr (WEIGHTS::kPerImage) {
        __pipeline_wait_prior(STAGES - 1);
        __syncthreads();
        weights_of.template make<Tile::kOutputs, Tile::kWarps>(
            [&](int output, int channel) {
                return weights + channel / Tile::kDepth * Tile::kOutputHalves + output * kPitch +
                       channel % Tile::kDepth;
            },
            channels);
    }

    // Of residual, a lane has columns 2·pair and 2·pair + 1 of each tile, as they are in sums: they are multiplied by
    // an identity.  Infinite ones make what shares their eight columns NaN.
    const uint32_t identity = group / 2 == pair ? (group % 2 == 0 ? 0x3c00 : 0x3c000000) : 0, one = one_in(0);
    const int x_place = row * 32 * kPitch + pixel_place(lane, kPitch) + part * 16;
    const int weights_place = column * 48 * kPitch + output_place(lane, kPitch) + part * 16;
    const int second = part == 1 ? 0 : 16 * kPitch, first_strip = 16 * kPitch - second;  // the own strip comes first
    int stage = 0;
#pragma unroll 1
    for (int share = first_share; share < shares; share += step) {
        float c[2][kTiles][4];
        if (PARTS > 1) {
            for (auto& strip : c) {
                for (int n = 0; n < kTiles * 4; ++n) strip[n / 4][n % 4] = 0;
            }
        }
        if (part < 2) {
            for (int i = 0; i < kOwn; ++i) {
                for (int j = 0; j < kTiles; ++j) {
                    multiply(c[i][j], {added[i][0][j], added[i][1][j], one, one}, identity, biases[j]);
                }
            }
        }
        if (PARTS == 1 && share + step < shares) load_residual(share + step);
#pragma unroll 1
        for (int slice = 0; slice < slices; ++slice) {
            __pipeline_wait_prior(STAGES - 2);
            __syncthreads();  // the slice is there, and nobody reads the one before any more
            copy_next();
            const __half* const from = ring + stage * Tile::kPixelHalves + x_place;
            const __half* const factors =
                weights + (slots < slices ? stage : slice) * Tile::kOutputHalves + weights_place;
#pragma unroll
            for (int s = 0; s < STEPS / PARTS; ++s) {
                const int channel = s * PARTS * 16;
                const __half* const strips[] = {from + (PARTS == 1 ? 0 : first_strip) + channel,
                                                from + (PARTS == 1 ? 16 * kPitch : second) + channel};
                multiply_step(c, strips, factors + channel, kPitch);
            }
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }

        if constexpr (PARTS > 1) {  // parts 0 and 1 take what the others have of their strips
            const auto sum_of = [&](int strip, int p, int j) -> float4& {
                constexpr int kWarps = ROWS * COLUMNS;
                auto* const sums = reinterpret_cast<float4*>(ring);
                return sums[(((strip * PARTS + p) * kWarps + warp % kWarps) * kTiles + j) * 32 + lane];
            };
            const auto leave = [&](int strip, const float (&own_c)[kTiles][4]) {
                for (int j = 0; j < kTiles; ++j) {
                    sum_of(strip, part, j) = {own_c[j][0], own_c[j][1], own_c[j][2], own_c[j][3]};
                }
            };
            __syncthreads();  // nobody reads the ring any more
            if (part >= 2) leave(0, c[0]);
            leave(part == 1 ? 0 : 1, c[1]);
            __syncthreads();
            if (part >= 2) return;
            for (int p = 0; p < PARTS; ++p) {
                if (p == part) continue;
                for (int j = 0; j < kTiles; ++j) {
                    const float4 sum = sum_of(part, p, j);
                    c[0][j][0] += sum.x;
                    c[0][j][1] += sum.y;
                    c[0][j][2] += sum.z;
                    c[0][j][3] += sum.w;
                }
            }
        }
        // The sums of padding are zeros.
        const int64_t begin = int64_t{share} * Tile::kPixels + first_row;
        const int rows = pixels - begin < 32 ? static_cast<int>(pixels - begin) : 32;
        __half* target = y + begin * pitch_y + output;
        for (int n = 0; n < 2 * kOwn; ++n, target += int64_t{8} * pitch_y) {
            for (int j = 0; j < kPairs; ++j) {
                if (8 * n < rows && output + 16 * j < pitch_y) {
                    store_outputs<2>(target + 16 * j, &c[n / 2][2 * j], n % 2);
                }
            }
        }
    }
    __pipeline_wait_prior(0);
}

// How many blocks there are, and with how much shared memory.
struct ResidualPlan {
    int slots;
    int64_t bytes, slices;
};

template <typename TILE, int STEPS, int STAGES>
ResidualPlan residual_plan(int channels, bool per_image, int shared_bytes) {
    const int64_t slices = ceil_div(channels, TILE::kDepth), ring = int64_t{STAGES} * TILE::kPixelHalves * 2;
    const auto bytes = [&](int64_t slots) { return ring + slots * TILE::kOutputHalves * 2; };
    const bool all = per_image || slices <= STAGES || bytes(slices) <= shared_bytes;
    const int64_t slots = all ? slices : STAGES;
    return {static_cast<int>(slots), bytes(slots), slices};
}

// Launches the kernel if it gives most multiprocessors a block, or if it `must`; it may not fit shared memory.
template <int ROWS, int COLUMNS, int PARTS, int STEPS, int STAGES, typename WEIGHTS>
bool try_residual_kernel(const PointwiseArguments& a, int64_t images, const WEIGHTS& weights, const Gpu& gpu, bool must,
                         cudaStream_t stream, cudaError_t& error) {
    using Tile = ResidualTile<ROWS, COLUMNS, PARTS, STEPS, STAGES>;
    const int64_t shares = ceil_div(a.pixels, Tile::kPixels), tiles = ceil_div(a.outputs, Tile::kOutputs);
    const auto plan = residual_plan<Tile, STEPS, STAGES>(a.channels, WEIGHTS::kPerImage, gpu.shared_bytes);
    if (plan.bytes > gpu.shared_bytes || shares > INT32_MAX / 2) return false;
    if (!must && shares * tiles * images * 4 < gpu.multiprocessors * 3) return false;
    // Besides, each block takes 1 KB.
    const int64_t room = (gpu.shared_bytes + 1024) / (plan.bytes + 1024),
                  blocks = room < Tile::kBlocks ? room : Tile::kBlocks;
    const int64_t all = gpu.multiprocessors * blocks, most = all > tiles * images ? all / (tiles * images) : 1;
    const int64_t height = PARTS > 1 || shares < most ? shares : most;
    if (height * tiles > INT32_MAX) return false;
    const dim3 grid(static_cast<unsigned>(height * tiles), 1, static_cast<unsigned>(images));
    error = launch_dependent(pointwise_residual_kernel<ROWS, COLUMNS, PARTS, STEPS, STAGES, WEIGHTS>, grid,
                             Tile::kThreads, static_cast<int>(plan.bytes), stream, static_cast<const __half*>(a.x),
                             static_cast<const __half*>(a.weight), static_cast<const __half*>(a.bias),
                             static_cast<const __half*>(a.residual), static_cast<__half*>(a.y), a.pixels,
                             static_cast<int>(shares), a.channels, a.outputs, a.pitch_x, a.pitch_y,
                             static_cast<int>(plan.slices), plan.slots, weights);
    return true;
}

// Whether launch_residual_kernel can.
inline bool fits_residual_kernel(int channels, const Gpu& gpu) {
    return residual_plan<ResidualTile<2, 1, 2, 4, 3>, 4, 3>(channels, true, gpu.shared_bytes).bytes <= gpu.shared_bytes;
}

// Launches the kernel that suits the sizes, from the most work for a block to the least; false if none has room for
// so many channels.
template <typename WEIGHTS>
bool launch_residual_kernel(const PointwiseArguments& a, int64_t images, const WEIGHTS& weights, const Gpu& gpu,
                            cudaStream_t stream, cudaError_t& error) {
    const auto attempt = [&](auto rows, auto columns, auto parts, auto steps, auto stages, bool must = false) {
        return try_residual_kernel<decltype(rows)::value, decltype(columns)::value, decltype(parts)::value,
                                   decltype(steps)::value, decltype(stages)::value>(a, images, weights, gpu, must,
                                                                                    stream, error);
    };
    // Slices of the depth that leaves fewer zeros behind the last channel.
    const bool threes = ceil_div(a.channels, 48) * 48 < ceil_div(a.channels, 64) * 64;
    if (a.outputs > 48) {
        if (threes ? attempt(Int<4>{}, Int<2>{}, Int<1>{}, Int<3>{}, Int<6>{})
                   : attempt(Int<4>{}, Int<2>{}, Int<1>{}, Int<4>{}, Int<6>{})) {
            return true;
        }
        if (attempt(Int<2>{}, Int<2>{}, Int<2>{}, Int<4>{}, Int<6>{})) return true;
    } else if (threes ? attempt(Int<4>{}, Int<1>{}, Int<1>{}, Int<3>{}, Int<3>{})
                      : attempt(Int<4>{}, Int<1>{}, Int<1>{}, Int<4>{}, Int<3>{})) {
        return true;
    }
    return attempt(Int<2>{}, Int<1>{}, Int<4>{}, Int<8>{}, Int<5>{}, a.channels > 192) ||
           attempt(Int<2>{}, Int<1>{}, Int<2>{}, Int<4>{}, Int<3>{}, true);
}

}  // namespace trt_graft
