// 1 × 1 convolution and residual connection on Hopper, for any number of pixels: what pointwise_conv_residual and
// transposed_attention_residual share.
//
// A block has 48 or 96 outputs of one tile of 64 pixels after the other.  Bulk copies bring the weights, which stay,
// before the kernel's turn, and then pixels, some ahead: boxes of 64 channels (see tensor_map.cuh), which products
// (wgmma) read where they arrive.  Each of two groups of four warps multiplies half of the channels, then adds up half
// of the outputs, in the tile of the residual, which has come to shared memory meanwhile in packs of 16 bytes, and
// leaves in such.
//
// Only for objects that are compiled for sm_90a alone.
#pragma once

#include <cuda_pipeline.h>

#include <algorithm>

#include "common/boxes.cuh"
#include "common/bulk_copy.cuh"
#include "common/dependent_launch.cuh"
#include "common/tensor_core.cuh"
#include "common/tensor_map.cuh"
#include "common/wgmma.cuh"
#include "pointwise_conv_residual/tensor_core.cuh"

namespace trt_graft {

// CHUNKS times BOXES times 64 channels; STAGES chunks of pixels are on their way.
template <int CHUNKS, int BOXES, int OUTPUTS, int STAGES, typename WEIGHTS>
struct Stream {
    using Weights = WEIGHTS;
    static constexpr int kChunks = CHUNKS, kBoxes = BOXES, kOutputs = OUTPUTS, kStages = STAGES;
    static constexpr int kGroups = 2, kGroupThreads = 128, kThreads = kGroups * kGroupThreads;
    static constexpr int kRows = 64, kColumns = 64, kStep = 16;  // of a box, and the columns of a product
    static constexpr int kFragments = OUTPUTS / 8, kHalf = kFragments / kGroups;  // a group adds up half of them
    static constexpr int kPitch = OUTPUTS + 8;  // so that eight pixels' packs are in banks of their own
    static constexpr int kPacks = kRows * OUTPUTS / 8, kOwnPacks = ceil_div(kPacks, kThreads);
    static_assert(OUTPUTS % (8 * kGroups) == 0);

    struct Shared {
        alignas(1024) unsigned char weights[CHUNKS][BOXES][OUTPUTS * kColumns * 2];
        alignas(1024) unsigned char pixels[STAGES][BOXES][kRows * kColumns * 2];
        float4 handed[kHalf][kThreads];  // from one group to the other
        alignas(16) __half results[2][kRows][kPitch];
        uint64_t weights_there, pixels_there[STAGES];
    };
    // Blocks of a multiprocessor, as many as it has shared memory for, of which each takes 1 KB more, and registers.
    static constexpr int kRoom = (228 << 10) / (sizeof(Shared) + 1024);
    static constexpr int kMost = OUTPUTS > 48 || WEIGHTS::kPerImage ? 2 : 3;
    static constexpr int kBlocks = kRoom < kMost ? kRoom : kMost;
};

// blockIdx is (outputs, share of the tiles, image).
template <typename S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    residual_stream_kernel(const __grid_constant__ CUtensorMap pixel_boxes,
                           const __grid_constant__ CUtensorMap weight_boxes, const __half* __restrict__ bias,
                           const __half* residual, __half* y, int pixels, int channels, int outputs,
                           typename S::Weights weights_of) {
    constexpr int kChunks = S::kChunks, kBoxes = S::kBoxes, kStages = S::kStages;
    extern __shared__ __align__(1024) unsigned char bytes[];
    auto& shared = *reinterpret_cast<typename S::Shared*>(bytes);
    allow_dependents();
    const int thread = threadIdx.x, first_output = static_cast<int>(blockIdx.x) * S::kOutputs;
    const int image = static_cast<int>(blockIdx.z), tiles = ceil_div(pixels, S::kRows);
    const int tile_step = static_cast<int>(gridDim.y);
    if (thread == 0) {
        prepare_barrier(&shared.weights_there, 1);
        for (auto& barrier : shared.pixels_there) prepare_barrier(&barrier, 1);
        publish_barriers();
        begin_phase(&shared.weights_there, sizeof(shared.weights));
        for (int box = 0; box < kChunks * kBoxes; ++box) {
            copy_box(shared.weights[box / kBoxes][box % kBoxes], weight_boxes, box * S::kColumns, first_output,
                     &shared.weights_there);
        }
    }
    __syncthreads();

    // The block's chunks are numbered through all of its tiles.
    const int first_tile = static_cast<int>(blockIdx.y);
    const auto fetch_pixels = [&](int chunk) {
        const int tile = first_tile + chunk / kChunks * tile_step, stage = chunk % kStages;
        if (tile >= tiles) return;
        begin_phase(&shared.pixels_there[stage], sizeof(shared.pixels[stage]));
        for (int box = 0; box < kBoxes; ++box) {
            copy_box(shared.pixels[stage][box], pixel_boxes, (chunk % kChunks * kBoxes + box) * S::kColumns,
                     tile * S::kRows, image, &shared.pixels_there[stage]);
        }
    };
    // Calls visit(address in the results, place in residual and y) for the thread's packs of a tile.
    const auto with_packs = [&](int tile, int buffer, auto visit) {
        for (int i = 0; i < S::kOwnPacks; ++i) {
            const int pack = i * S::kThreads + thread, row = pack / (S::kOutputs / 8), part = pack % (S::kOutputs / 8);
            const int pixel = tile * S::kRows + row;
            if (pack < S::kPacks && pixel < pixels) {
                visit(&shared.results[buffer][row][part * 8],
                      (int64_t{image} * pixels + pixel) * outputs + first_output + part * 8);
            }
        }
    };
    const auto fetch_residual = [&](int tile, int buffer) {
        with_packs(tile, buffer, [&](__half* to, int64_t place) { copy_or_clear(to, residual + place, true); });
        __pipeline_commit();
    };
    wait_for_previous();
    if (thread == 0) {
        for (int chunk = 0; chunk < kStages; ++chunk) fetch_pixels(chunk);
    }
    for (int buffer = 0; buffer < 2; ++buffer) fetch_residual(first_tile + buffer * tile_step, buffer);

    // What the group adds up: of fragments own … own + kHalf − 1, two neighbouring outputs of pixels `row` and row + 8.
    const int group_of_warps = alike(thread / S::kGroupThreads), lane = thread % 32, pair = lane % 4;
    const int own = group_of_warps * S::kHalf, row = thread % S::kGroupThreads / 32 * 16 + lane / 4;
    __half2 terms[S::kHalf];
    for (int i = 0; i < S::kHalf; ++i) {
        terms[i] = *reinterpret_cast<const __half2*>(bias + first_output + (own + i) * 8 + 2 * pair);
    }

    wait_for_phase(&shared.weights_there, 0);
    if constexpr (S::Weights::kPerImage) {
        weights_of.template make<S::kOutputs, S::kThreads / 32>(
            [&](int output, int channel) {
                const int number = channel / S::kColumns;
                unsigned char* const box = shared.weights[number / kBoxes][number % kBoxes];
                return reinterpret_cast<__half*>(box + place_in_box(output, channel % S::kColumns / 8)) + channel % 8;
            },
            channels);
        fence_proxy_async();
        __syncthreads();
    }

    int chunk = 0;
#pragma unroll 1
    for (int tile = first_tile, buffer = 0; tile < tiles; tile += tile_step, buffer ^= 1) {
        float sums[S::kFragments][4];
#pragma unroll
        for (int part = 0; part < kChunks; ++part, ++chunk) {
            const int stage = chunk % kStages;
            wait_for_phase(&shared.pixels_there[stage], chunk / kStages % 2);
            begin_products();
            for (int box = 0; box < kBoxes; ++box) {
                for (int step = 0; step < S::kColumns / S::kStep / S::kGroups; ++step) {
                    const int column = group_of_warps * (S::kColumns / S::kGroups) + step * S::kStep;
                    multiply_boxes(sums, shared.pixels[stage][box], shared.weights[part][box], column,
                                   part + box + step > 0);
                }
            }
            end_products();
            wait_for_product(sums);
            if (part + 1 < kChunks) {
                __syncthreads();  // nobody reads the chunk any more
                if (thread == 0) fetch_pixels(chunk + kStages);
            }
        }

        // The groups hand each other the halves that they do not add up.
        for (int i = 0; i < S::kHalf; ++i) {
            // a choice of two, so that the sums stay in registers
            float4 part;
            if (group_of_warps == 0) {
                part = {sums[S::kHalf + i][0], sums[S::kHalf + i][1], sums[S::kHalf + i][2], sums[S::kHalf + i][3]};
            } else {
                part = {sums[i][0], sums[i][1], sums[i][2], sums[i][3]};
                for (int n = 0; n < 4; ++n) sums[i][n] = sums[S::kHalf + i][n];
            }
            shared.handed[i][thread] = part;
        }
        __pipeline_wait_prior(1);
        __syncthreads();  // the residual is there, and nobody reads the pixels any more
        if (thread == 0) fetch_pixels(chunk - 1 + kStages);
        for (int i = 0; i < S::kHalf; ++i) {
            const float4 part = shared.handed[i][thread ^ S::kGroupThreads];
            const float others[] = {part.x, part.y, part.z, part.w};
            const float2 term = __half22float2(terms[i]);
            for (int half = 0; half < 2; ++half) {
                auto* const result =
                    reinterpret_cast<__half2*>(&shared.results[buffer][row + 8 * half][(own + i) * 8 + 2 * pair]);
                const float2 more = __half22float2(*result);
                *result = __floats2half2_rn(sums[i][2 * half] + others[2 * half] + term.x + more.x,
                                            sums[i][2 * half + 1] + others[2 * half + 1] + term.y + more.y);
            }
        }
        __syncthreads();
        with_packs(tile, buffer, [&](__half* from, int64_t place) {
            *reinterpret_cast<uint4*>(y + place) = *reinterpret_cast<const uint4*>(from);
        });
        fetch_residual(tile + 2 * tile_step, buffer);
    }
}

// Launches the kernel for `images` images; false, and nothing launched, if it does not take the sizes, or where the
// driver lacks what is needed.
template <int CHUNKS, int BOXES, int OUTPUTS, int STAGES, typename WEIGHTS>
bool launch_residual_stream(const PointwiseArguments& a, int64_t images, const WEIGHTS& weights, const Gpu& gpu,
                            cudaStream_t stream, cudaError_t& error) {
    using S = Stream<CHUNKS, BOXES, OUTPUTS, STAGES, WEIGHTS>;
    constexpr int kBytes = sizeof(typename S::Shared);
    EncodeTensorMap encode = nullptr;
    if (!on_boundary(a.x) || !on_boundary(a.weight) || !on_boundary(a.residual) || !on_boundary(a.y) ||
        a.pitch_x % 8 != 0 || a.pitch_y != a.outputs || a.outputs % S::kOutputs != 0 ||
        a.channels > CHUNKS * BOXES * S::kColumns || a.pixels > INT32_MAX - S::kRows || images > UINT16_MAX ||
        kBytes > gpu.shared_bytes || find_encode(encode)) {
        return false;
    }
    CUtensorMap pixel_boxes, weight_boxes;
    error = describe_boxes(encode, pixel_boxes, a.x, 3, images, a.pixels, a.channels, S::kRows, 64, a.pitch_x);
    if (!error) error = describe_boxes(encode, weight_boxes, a.weight, 2, 1, a.outputs, a.channels, S::kOutputs);
    if (error) return true;
    const int64_t slices = a.outputs / S::kOutputs, tiles = ceil_div(a.pixels, S::kRows);
    const int64_t shares = std::clamp<int64_t>(S::kBlocks * gpu.multiprocessors / (slices * images), 1, tiles);
    const dim3 grid(static_cast<unsigned>(slices), static_cast<unsigned>(shares), static_cast<unsigned>(images));
    error = launch_dependent(residual_stream_kernel<S>, grid, S::kThreads, kBytes, stream, pixel_boxes, weight_boxes,
                             static_cast<const __half*>(a.bias), static_cast<const __half*>(a.residual),
                             static_cast<__half*>(a.y), static_cast<int>(a.pixels), a.channels, a.outputs, weights);
    return true;
}

}  // namespace trt_graft
