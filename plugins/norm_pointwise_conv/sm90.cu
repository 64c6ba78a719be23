// Layer normalisation and 1 × 1 convolution on Hopper, for 48, 96, 192 and 384 channels.
//
// A block has a slice of the outputs, whose weights bulk copies bring while the kernel before still runs, and takes one
// tile of pixels after the other.  Each warp reads its 16 pixels as fragments, whereupon the next tile is on its way,
// normalises them in registers, and keeps them there: they are the first factor of products (wgmma) with 64 outputs at
// a time, of which the next one is on its way while one is rounded.  What comes out leaves as boxes, by way of shared
// memory.
//
//   128 pixels  The two groups of four warps have 64 pixels each, and all outputs.
//   64          Both have the same pixels, and take turns with the outputs: where pixels are few.
//
// Compiled for sm_90a alone, in an object of its own.
#include "common/boxes.cuh"
#include "common/dependent_launch.cuh"
#include "common/pixel_norm.cuh"
#include "common/pointwise.cuh"
#include "common/tensor_map.cuh"
#include "common/wgmma.cuh"
#include "norm_pointwise_conv/sm90.cuh"

namespace trt_graft {
namespace {

constexpr int kGroups = 2, kGroupThreads = 128, kThreads = kGroups * kGroupThreads, kWarps = kThreads / 32;
constexpr int kRows = 64;     // pixels of a group
constexpr int kChunk = 64;    // outputs of a product
constexpr int kColumns = 64;  // channels of a box
constexpr int kBoxBytes = 64 * kColumns * 2;
constexpr int kMaxChunks = 16;
constexpr int kStagingBytes = 16 * kChunk * 2;  // of a warp's box

// Shared memory of a block with `chunks` of outputs; STEPS times 16 channels.
template <int STEPS, int TILES>
struct Layout {
    static constexpr int kBoxes = (STEPS + 3) / 4;         // side by side
    static constexpr int kStagings = STEPS <= 12 ? 2 : 1;  // boxes of a warp; more channels need the room for weights
    static constexpr int kPixelBytes = TILES * kBoxes * kBoxBytes, kChunkBytes = kBoxes * kBoxBytes;
    static constexpr int kFactorBytes = STEPS * 16 * 2 * 2;
    static constexpr int kStaging = kPixelBytes, kFactors = kStaging + kWarps * kStagings * kStagingBytes,
                         kBarriers = kFactors + kFactorBytes, kBiases = kBarriers + (1 + kMaxChunks) * 8,
                         kFirst = kBiases + kMaxChunks * kChunk * 2;
    static constexpr int kWeights = (kFirst + 1023) / 1024 * 1024;

    static constexpr int bytes(int chunks) { return kWeights + chunks * kChunkBytes; }
};

// blockIdx is (slice of `chunks` · 64 outputs, share of the pixels).
template <int STEPS, int TILES>
__global__ void __launch_bounds__(kThreads, 1)
    norm_and_multiply_kernel(const __grid_constant__ CUtensorMap pixel_boxes,
                             const __grid_constant__ CUtensorMap weight_boxes,
                             const __grid_constant__ CUtensorMap result_boxes, const __half* __restrict__ norm_weight,
                             const __half* __restrict__ norm_bias, const __half* __restrict__ bias, int pixels,
                             int tiles, int outputs, float epsilon, bool subtract_mean, int chunks) {
    using Sizes = Layout<STEPS, TILES>;
    constexpr int kBoxes = Sizes::kBoxes;
    extern __shared__ __align__(1024) unsigned char shared[];
    allow_dependents();
    auto* const factors = reinterpret_cast<uint2*>(shared + Sizes::kFactors);
    auto* const barriers = reinterpret_cast<uint64_t*>(shared + Sizes::kBarriers);  // of pixels, then of each chunk
    auto* const biases = reinterpret_cast<__half*>(shared + Sizes::kBiases);
    unsigned char* const weights = shared + Sizes::kWeights;
    const int first = static_cast<int>(blockIdx.x) * chunks * kChunk;
    const int count = min(chunks, (outputs - first + kChunk - 1) / kChunk);

    if (threadIdx.x == 0) {
        for (int i = 0; i <= count; ++i) prepare_barrier(&barriers[i], 1);
        publish_barriers();
        for (int chunk = 0; chunk < count; ++chunk) {
            begin_phase(&barriers[1 + chunk], Sizes::kChunkBytes);
            for (int box = 0; box < kBoxes; ++box) {
                copy_box(weights + (chunk * kBoxes + box) * kBoxBytes, weight_boxes, box * kColumns,
                         first + chunk * kChunk, &barriers[1 + chunk]);
            }
        }
    }
    for (int i = threadIdx.x; i < STEPS * 16; i += kThreads) {  // pairs of gamma and beta alternate
        auto* const values = reinterpret_cast<__half*>(factors) + i / 2 * 4 + i % 2;
        values[0] = norm_weight[i];
        values[2] = norm_bias[i];
    }
    for (int i = threadIdx.x; i < count * kChunk; i += kThreads) {
        biases[i] = first + i < outputs ? bias[first + i] : __half();
    }
    const auto fetch = [&](int tile) {
        begin_phase(&barriers[0], Sizes::kPixelBytes);
        for (int i = 0; i < TILES * kBoxes; ++i) {
            copy_box(shared + i * kBoxBytes, pixel_boxes, i % kBoxes * kColumns, (tile * TILES + i / kBoxes) * kRows,
                     &barriers[0]);
        }
    };
    __syncthreads();
    wait_for_previous();
    if (threadIdx.x == 0) fetch(blockIdx.y);

    const int warp = alike(threadIdx.x / 32), lane = threadIdx.x % 32, pair = lane % 4;
    const int half_of_block = warp / 4, own = warp % 4 * 16;  // the warp's first pixel of 64
    unsigned char* const stagings = shared + Sizes::kStaging + warp * Sizes::kStagings * kStagingBytes;
    int staging = 0;
#pragma unroll 1
    for (int tile = blockIdx.y, phase = 0; tile < tiles; tile += gridDim.y, phase ^= 1) {
        wait_for_phase(&barriers[0], phase);
        uint32_t x[STEPS][4];
        const unsigned char* const boxes = shared + (TILES == 2 ? half_of_block * kBoxes * kBoxBytes : 0);
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
            const int place = place_in_box(own + lane % 16, k % 4 * 2 + lane / 16);
            load_matrices(x[k], reinterpret_cast<const __half*>(boxes + k / 4 * kBoxBytes + place));
        }
        fence_proxy_async();  // the copy would overtake loads that are still on their way
        __syncthreads();      // everyone has read them
        if (threadIdx.x == 0 && tile + static_cast<int>(gridDim.y) < tiles) fetch(tile + gridDim.y);
        normalise_pixels(x, factors, STEPS * 16, epsilon, subtract_mean);

        const int origin = tile * TILES * kRows + (TILES == 2 ? half_of_block * kRows : 0) + own;
        constexpr int kStep = TILES == 2 ? 1 : kGroups;
        const auto start = [&](float (&sums)[8][4], int chunk) {
            wait_for_phase(&barriers[1 + chunk], 0);
            const unsigned char* const factor = weights + chunk * Sizes::kChunkBytes;
            begin_products();
#pragma unroll
            for (int k = 0; k < STEPS; ++k) {
                multiply_by_rows(sums, x[k], factor + k / 4 * kBoxBytes, k % 4 * 16, k > 0);
            }
            end_products();
        };
        // `later` products have been started behind this one.
        const auto finish = [&](float (&sums)[8][4], int chunk, auto later) {
            __half2 terms[8];
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                terms[n] = *reinterpret_cast<const __half2*>(biases + chunk * kChunk + n * 8 + 2 * pair);
            }
            wait_for_product<decltype(later)::value>(sums);
            if (origin >= pixels) return;  // nothing to store, so nothing to write: see wait_for_stores
            unsigned char* const box = stagings + staging * kStagingBytes;
            staging = (staging + 1) % Sizes::kStagings;
            if (lane == 0) wait_for_stores<Sizes::kStagings - 1>();  // until the box may be used again
            __syncwarp();
#pragma unroll
            for (int n = 0; n < 8; n += 2) {
                uint32_t words[4];
                for (int i = 0; i < 4; ++i) {
                    const float2 term = __half22float2(terms[n + i / 2]);
                    const float* const c = sums[n + i / 2] + i % 2 * 2;
                    words[i] = as_word(__floats2half2_rn(c[0] + term.x, c[1] + term.y));
                }
                store_matrices(box + place_in_box(lane % 16, n + lane / 16), words);
            }
            fence_proxy_async();
            __syncwarp();
            if (lane == 0) store_box(result_boxes, first + chunk * kChunk, origin, box);
        };
        float even[8][4], odd[8][4];
        int chunk = TILES == 2 ? 0 : half_of_block;
        if (chunk >= count) continue;
        start(even, chunk);
#pragma unroll 1
        for (; chunk + 2 * kStep < count; chunk += 2 * kStep) {
            start(odd, chunk + kStep);
            finish(even, chunk, Int<1>{});
            start(even, chunk + 2 * kStep);
            finish(odd, chunk + kStep, Int<1>{});
        }
        if (chunk + kStep < count) {
            start(odd, chunk + kStep);
            finish(even, chunk, Int<1>{});
            finish(odd, chunk + kStep, Int<0>{});
        } else {
            finish(even, chunk, Int<0>{});
        }
    }
    if (lane == 0) wait_for_stores();
}

// How the work is cut: chunks of a slice, slices, blocks for each; cycles that it takes, by and large.
struct Cut {
    int chunks = 0, slices = 0, blocks = 0;
    int64_t cycles = INT64_MAX;
};

template <int STEPS, int TILES>
Cut best_cut(int64_t pixels, int outputs, int multiprocessors, int shared_bytes) {
    using Sizes = Layout<STEPS, TILES>;
    constexpr int kNormalise = STEPS * 60 + 400, kMultiply = STEPS * 32 * TILES, kStore = 100 * TILES;
    constexpr int kBytesPerCycle = 48;
    const int all = static_cast<int>(ceil_div(outputs, kChunk));
    const int64_t tiles = ceil_div(pixels, TILES * kRows);
    Cut best;
    for (int slices = 1; slices <= all; ++slices) {
        Cut cut;
        cut.chunks = static_cast<int>(ceil_div(all, slices));
        cut.slices = static_cast<int>(ceil_div(all, cut.chunks));
        if (cut.chunks > kMaxChunks || Sizes::bytes(cut.chunks) > shared_bytes) continue;
        const int64_t most = multiprocessors > cut.slices ? multiprocessors / cut.slices : 1;
        cut.blocks = static_cast<int>(tiles < most ? tiles : most);
        const int64_t turns = ceil_div(int64_t{cut.slices} * cut.blocks, multiprocessors);
        const int64_t load = (Sizes::kPixelBytes + cut.chunks * Sizes::kChunkBytes) / kBytesPerCycle;
        const int64_t tile = kNormalise + cut.chunks * (kMultiply + kStore);
        cut.cycles = turns * (load + ceil_div(tiles, cut.blocks) * tile);
        if (cut.cycles < best.cycles) best = cut;
    }
    return best;
}

}  // namespace

bool launch_norm_pointwise_conv_sm90(const void* x, const void* norm_weight, const void* norm_bias, const void* weight,
                                     const void* bias, void* y, int64_t pixels, int64_t channels, int64_t outputs,
                                     float epsilon, bool subtract_mean, int multiprocessors, int shared_bytes,
                                     cudaStream_t stream, cudaError_t& error) {
    EncodeTensorMap encode = nullptr;
    if (pixels > INT32_MAX - 2 * kRows || !on_boundary(x) || !on_boundary(weight) || !on_boundary(y) ||
        find_encode(encode)) {
        return false;
    }
    const auto launch = [&](auto steps) {
        constexpr int STEPS = steps;
        const auto launch_cut = [&](const Cut& cut, auto kernel, int tile_rows, int bytes) {
            const int64_t columns = pitch(DataType::kHalf, outputs);
            CUtensorMap pixel_boxes, weight_boxes, result_boxes;
            error = describe_boxes(encode, pixel_boxes, x, 2, 1, pixels, channels, kRows);
            if (!error) error = describe_boxes(encode, weight_boxes, weight, 2, 1, outputs, channels, kChunk);
            if (!error) error = describe_boxes(encode, result_boxes, y, 2, 1, pixels, columns, 16);
            if (error) return;
            const auto half = [](const void* pointer) { return static_cast<const __half*>(pointer); };
            error = launch_dependent(kernel, dim3(cut.slices, cut.blocks), kThreads, bytes, stream, pixel_boxes,
                                     weight_boxes, result_boxes, half(norm_weight), half(norm_bias), half(bias),
                                     static_cast<int>(pixels), static_cast<int>(ceil_div(pixels, tile_rows)),
                                     static_cast<int>(outputs), epsilon, subtract_mean, cut.chunks);
        };
        const auto cut_of = [&](auto tiles) {
            return best_cut<STEPS, decltype(tiles)::value>(pixels, static_cast<int>(outputs), multiprocessors,
                                                           shared_bytes);
        };
        const Cut small = cut_of(Int<1>{}), large = cut_of(Int<2>{});
        if (small.chunks + large.chunks == 0) return false;
        if (small.cycles < large.cycles) {
            launch_cut(small, norm_and_multiply_kernel<STEPS, 1>, kRows, Layout<STEPS, 1>::bytes(small.chunks));
        } else {
            launch_cut(large, norm_and_multiply_kernel<STEPS, 2>, 2 * kRows, Layout<STEPS, 2>::bytes(large.chunks));
        }
        return true;
    };
    switch (channels) {
        case 48:
            return launch(Int<3>{});
        case 96:
            return launch(Int<6>{});
        case 192:
            return launch(Int<12>{});
        case 384:
            return launch(Int<24>{});
        default:
            return false;
    }
}

}  // namespace trt_graft
