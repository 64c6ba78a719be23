// 1 × 1 convolution and the residual connection behind it, on tensor cores: what pointwise_conv_residual and
// transposed_attention_residual share.
//
// Floor: x and residual are read once, y is written once; 2·channels·outputs operations for each pixel weigh as much
// from 192 outputs on.  A warp sums 16 pixels × all outputs of its block, from the residual on; the pixels pass through
// its registers, as the fragments that tensor cores take (see common/pointwise.cuh), with the next ones always on
// their way.  Where pixels are few, the outputs are cut into slices and the channels of a pixel are shared among
// several warps, so that every multiprocessor has work and loads much at once.
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

constexpr int kResidualWarps = 16;
constexpr int kResidualAhead = 4;  // granules on their way

// Calls f(tile, n) for each chunk: its first tile and its tiles, as constants.
template <int TILES, int TILE = 0, typename F>
__device__ void for_each_chunk(F f) {
    if constexpr (TILE < TILES) {
        f(Int<TILE>{}, Int<(TILES - TILE < kChunkTiles ? TILES - TILE : kChunkTiles)>{});
        for_each_chunk<TILES, TILE + kChunkTiles>(f);
    }
}

// The lane's channels of two pixels, `group` and group + 8 of a warp's 16.
struct Source {
    const __half* upper;
    int to_lower;  // from there
    int channels;  // that exist
};
struct Granule {
    uint4 upper, lower;
};

// ROWS warps of a block take 16 pixels each, PARTS share the channels of one of these rows: part p takes the granules
// p, p + PARTS, …  A slice has TILES tiles of outputs.
//
// blockIdx is (slice, share of the pixels, image): blocks that read the same pixels are neighbours.  With several parts
// each block has one share only, since the partial sums take the place of the weights.
//
// WEIGHTS that differ from image to image make their fragments themselves, of what a kernel has left.  Given ones are
// on their way before the kernel waits.
template <int TILES, int ROWS, int PARTS, typename WEIGHTS>
__global__ void __launch_bounds__(kResidualWarps * 32, 1)
    pointwise_residual_kernel(const __half* __restrict__ x, const __half* __restrict__ weight,
                              const __half* __restrict__ bias, const __half* __restrict__ residual,
                              __half* __restrict__ y, int64_t pixels, int shares, int channels, int outputs,
                              int pitch_x, int pitch_y, int steps, WEIGHTS weights_of) {
    static_assert(ROWS * PARTS == kResidualWarps);
    // The image's first pixel; not added to the pointers, which would then be in registers.
    const int64_t origin = WEIGHTS::kPerImage ? blockIdx.z * pixels : 0;
    // The slice: bias, fragments (granules, tiles).  A step is a granule for each part.
    extern __shared__ uint4 shared[];
    allow_dependents();
    auto* const biases = reinterpret_cast<__half*>(shared);
    uint4* const fragments = shared + TILES;
    const int first = static_cast<int>(blockIdx.x) * TILES * 8;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
    const int row = warp % ROWS, part = warp / ROWS;

    const auto pixel_of = [&](int share) { return (int64_t{share} * ROWS + row) * 16 + group; };
    // Pixels behind the last one repeat it and are not stored.
    const auto existing = [&](int64_t pixel) { return pixel < pixels ? pixel : pixels - 1; };
    const auto source_of = [&](int share) -> Source {
        if (share >= shares) return {};
        const int64_t upper = existing(pixel_of(share)), lower = existing(pixel_of(share) + 8);
        return {x + (origin + upper) * pitch_x + 8 * pair, static_cast<int>(lower - upper) * pitch_x, channels};
    };
    const auto load = [&](const Source& source, int step) {
        const int channel = (step * PARTS + part) * kGranule;
        const int count = source.channels - channel - 8 * pair;  // of the lane
        if (count <= 0) return Granule{};
        Granule granule = {__ldg(reinterpret_cast<const uint4*>(source.upper + channel)),
                           __ldg(reinterpret_cast<const uint4*>(source.upper + source.to_lower + channel))};
        if (channels % 8 != 0) granule = {first_of(granule.upper, count), first_of(granule.lower, count)};  // padding
        return granule;
    };

    // Two copies, in the order in which they are needed.
    const int half = (steps + 2 * kResidualAhead - 1) / (2 * kResidualAhead) * kResidualAhead;
    const auto copy_steps = [&](int begin, int end) {
        constexpr int kTurns = kResidualWarps / TILES;  // warps that share a tile
        const int tile = warp % TILES, turn = warp / TILES;
        if (turn < kTurns) {
            copy_fragments(fragments + tile * 32, TILES * 32, weight, first, tile, TILES, begin * PARTS + turn,
                           end * PARTS, kTurns, outputs, channels);
        }
        __pipeline_commit();
    };
    copy_values(biases, bias + first, outputs - first, TILES * 8);
    if constexpr (WEIGHTS::kPerImage) {
        weights_of.prefetch(weight, first, TILES * 8, outputs, channels);
    } else {
        copy_steps(0, half < steps ? half : steps);
        copy_steps(half, steps);
    }
    wait_for_previous();
    Source source = source_of(blockIdx.y);
    Granule ahead[kResidualAhead];
    for (int i = 0; i < kResidualAhead; ++i) ahead[i] = load(source, i);
    if constexpr (WEIGHTS::kPerImage) {
        weights_of.template make<TILES, kResidualWarps>(fragments, weight, first, steps * PARTS, outputs, channels);
        __pipeline_commit();
        __pipeline_commit();
    }

    for (int share = blockIdx.y; share < shares; share += gridDim.y) {
        const int64_t pixel = pixel_of(share);
        float c[TILES][4] = {};
        if (part == 0) {
            const __half* rows[] = {residual + (origin + existing(pixel)) * pitch_y,
                                    residual + (origin + existing(pixel + 8)) * pitch_y};
            for_each_chunk<TILES>([&](auto tile, auto tiles) {
                constexpr int kTile = decltype(tile)::value, kOutputs = 2 * decltype(tiles)::value;
                const int output = first + kTile * 8 + kOutputs * pair;
                for (int i = 0; i < 2; ++i) {
                    Pack<__half, kOutputs> values = {};
                    if (output < pitch_y) values = load_pack<kOutputs>(rows[i] + output);
                    for (int n = 0; n < kOutputs; ++n) c[kTile + n / 2][2 * i + n % 2] = to_float(values.values[n]);
                }
            });
        }
        const bool starting = share == static_cast<int>(blockIdx.y);
        if (starting) {
            __pipeline_wait_prior(1);
            __syncthreads();
        }
        for (int begin = 0; begin < steps; begin += kResidualAhead) {
            if (starting && begin == half) {
                __pipeline_wait_prior(0);
                __syncthreads();
            }
            // What is loaded here is multiplied after the next steps, or for the next pixels.
            const bool last = begin + kResidualAhead >= steps;
            if (last) source = PARTS == 1 ? source_of(share + gridDim.y) : Source{};
#pragma unroll
            for (int i = 0; i < kResidualAhead; ++i) {
                if (begin + i < steps) {
                    const uint4* weights = fragments + ((begin + i) * PARTS + part) * TILES * 32 + lane;
#pragma unroll
                    for (int j = 0; j < TILES; ++j) {
                        multiply_granule(c[j], ahead[i].upper, ahead[i].lower, weights[j * 32]);
                    }
                }
                ahead[i] = load(source, last ? i : begin + kResidualAhead + i);
            }
        }

        if constexpr (PARTS > 1) {
            auto* const sums = reinterpret_cast<float4*>(fragments);
            const auto sum_of = [&](int p, int j) -> float4& {
                return sums[((p * ROWS + row) * TILES + j) * 32 + lane];
            };
            __syncthreads();  // nobody reads the weights any more
            if (part > 0) {
                for (int j = 0; j < TILES; ++j) sum_of(part - 1, j) = {c[j][0], c[j][1], c[j][2], c[j][3]};
            }
            __syncthreads();
            if (part > 0) return;
            for (int p = 0; p < PARTS - 1; ++p) {
                for (int j = 0; j < TILES; ++j) {
                    const float4 sum = sum_of(p, j);
                    c[j][0] += sum.x;
                    c[j][1] += sum.y;
                    c[j][2] += sum.z;
                    c[j][3] += sum.w;
                }
            }
        }
        for_each_chunk<TILES>([&](auto tile, auto tiles) {
            constexpr int kTile = decltype(tile)::value, kTiles = decltype(tiles)::value, kOutputs = 2 * kTiles;
            const int column = kTile * 8 + kOutputs * pair;
            const auto offsets = load_pack<kOutputs>(biases + column);
            auto& chunk = reinterpret_cast<float (&)[kTiles][4]>(c[kTile]);
            for (int n = 0; n < kTiles * 4; ++n) chunk[n / 4][n % 4] += to_float(offsets.values[n / 4 * 2 + n % 2]);
            if (first + column + kOutputs > outputs) clear_from(chunk, outputs - first - column);
            if (first + column >= pitch_y) return;
            for (int i = 0; i < 2; ++i) {
                if (pixel + 8 * i < pixels) {
                    store_outputs(y + (origin + pixel + 8 * i) * pitch_y + first + column, chunk, i);
                }
            }
        });
        if constexpr (WEIGHTS::kPerImage && PARTS > 1) return;  // its only share: what others need is not kept
    }
}

// Shared memory that a block takes.
template <int TILES, int ROWS, int PARTS>
int64_t residual_bytes(int channels) {
    const int64_t weights = ceil_div(channels, kGranule * PARTS) * PARTS * TILES * kFragmentBytes;
    const int64_t sums = int64_t{PARTS - 1} * ROWS * TILES * 32 * sizeof(float4);
    return TILES * 8 * 2 + (weights > sums ? weights : sums);
}

// Launches the kernel if it gives most multiprocessors a block, or if it `must`; it may not fit shared memory.
template <int TILES, int ROWS, int PARTS, typename WEIGHTS>
bool try_residual_kernel(const PointwiseArguments& a, int64_t images, const WEIGHTS& weights, const Gpu& gpu, bool must,
                         cudaStream_t stream, cudaError_t& error) {
    const int64_t shares = ceil_div(a.pixels, ROWS * 16), slices = ceil_div(a.outputs, TILES * 8);
    const int64_t steps = ceil_div(a.channels, kGranule * PARTS),
                  bytes = residual_bytes<TILES, ROWS, PARTS>(a.channels);
    if (bytes > gpu.shared_bytes || shares > INT32_MAX / 2) return false;
    if (!must && shares * slices * images * 4 < gpu.multiprocessors * 3) return false;
    const int64_t most = gpu.multiprocessors > slices * images ? gpu.multiprocessors / (slices * images) : 1;
    const dim3 grid(static_cast<unsigned>(slices), static_cast<unsigned>(PARTS > 1 || shares < most ? shares : most),
                    static_cast<unsigned>(images));
    error = launch_dependent(
        pointwise_residual_kernel<TILES, ROWS, PARTS, WEIGHTS>, grid, kResidualWarps * 32, static_cast<int>(bytes),
        stream, static_cast<const __half*>(a.x), static_cast<const __half*>(a.weight),
        static_cast<const __half*>(a.bias), static_cast<const __half*>(a.residual), static_cast<__half*>(a.y), a.pixels,
        static_cast<int>(shares), a.channels, a.outputs, a.pitch_x, a.pitch_y, static_cast<int>(steps), weights);
    return true;
}

// Whether launch_residual_kernel can.
inline bool fits_residual_kernel(int channels, const Gpu& gpu) {
    return residual_bytes<6, 4, 4>(channels) <= gpu.shared_bytes;
}

// Launches the kernel that suits the sizes, from the most work for a block to the least; false if none has room for
// so many channels.
template <typename WEIGHTS>
bool launch_residual_kernel(const PointwiseArguments& a, int64_t images, const WEIGHTS& weights, const Gpu& gpu,
                            cudaStream_t stream, cudaError_t& error) {
    const bool wide = a.outputs > 48;
    return (wide && try_residual_kernel<12, 16, 1>(a, images, weights, gpu, false, stream, error)) ||
           (wide && try_residual_kernel<12, 8, 2>(a, images, weights, gpu, false, stream, error)) ||
           (wide && try_residual_kernel<12, 4, 4>(a, images, weights, gpu, false, stream, error)) ||
           try_residual_kernel<6, 16, 1>(a, images, weights, gpu, false, stream, error) ||
           try_residual_kernel<6, 8, 2>(a, images, weights, gpu, false, stream, error) ||
           try_residual_kernel<6, 4, 4>(a, images, weights, gpu, true, stream, error);
}

}  // namespace trt_graft
