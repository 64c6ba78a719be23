// From x to the gated hidden channels, on Hopper: layer normalisation of each pixel over its channels, a 1 × 1
// convolution, a depthwise 3 × 3 convolution and the gate, with none of what lies between them in memory.
//
// A block has a tile of the image, some rows of a strip of 38 columns, and the pixels around it.  It normalises them
// into shared memory.  Then its warpgroups go down the tile, each with 32 hidden channels at a time, their gates and
// their values:
//
//   product    z = weight · x of a row of 40 pixels, by wgmma, with the weights in registers.  A warp has 8 gates and
//              their values; a lane one of each, as `upper` and `lower` output.  The pixels' order in shared memory is
//              such that these are ten neighbours.
//   depthwise  in registers, on pairs of neighbours in FP16: what lies left and right of them the lane has, or a lane
//              beside it; the rows above are sums that go from row to row.
//   gate       in registers, too.  Then a row of 8 channels passes shared memory and leaves as a box, 16 bytes of each
//              pixel.
//
// While a warp convolves a row, wgmma multiplies the next one.  Little but the normalised pixels is in shared memory,
// and warpgroups do not wait for each other.  What limits it are instructions: see docs/restormer-tuning.md.
//
// Another channel, of ones, is multiplied by the bias.  Outside of the image it is zero, as all channels are there: z
// is zero, too, as the depthwise convolution wants it.
//
// Where an image has few tiles, blocks divide the hidden channels between them, and each normalises the tile again.
#include <cuda_pipeline.h>

#include <algorithm>

#include "common/boxes.cuh"
#include "common/gelu.cuh"
#include "common/pixel_norm.cuh"
#include "common/pointwise.cuh"
#include "common/tensor_map.cuh"
#include "common/wgmma.cuh"
#include "gated_feed_forward/sm90.cuh"

namespace trt_graft {
namespace {

constexpr int kColumns = 38;   // of a tile
constexpr int kPixels = 40;    // of a row, with one on each side
constexpr int kLaneWords = 5;  // of a row: pairs of neighbouring pixels that a lane has of an output
constexpr int kChunk = 32;     // hidden channels that a warpgroup takes at a time

// There are registers for four warpgroups of a multiprocessor.  Where a tile is small enough, these are two blocks, so
// that one multiplies while the other fetches its pixels.
template <int STEPS>
struct Block {
    static constexpr int kBlocks = STEPS <= 3 ? 2 : 1;  // of a multiprocessor
    static constexpr int kGroups = 4 / kBlocks, kThreads = kGroups * 128, kWarps = kThreads / 32;
};

// A warp's gated channels of a row.  The first of the pixels that are stored lies on a boundary of 128 bytes, as copies
// want it.
constexpr int kStageBytes = 768, kStageFirst = 128;
static_assert(kStageFirst + (kPixels - 1) * 16 <= kStageBytes);

// ---- Normalisation --------------------------------------------------------------------------------------------------

// The normalised pixels of a tile and those around it, up to STEPS · 16 channels.
//
// A row's pixels are columns of wgmma's second factor, in groups of eight.  Group j = 0 … 4 of the product gives a lane
// of number `pair` its columns 2·pair and 2·pair + 1: these are pixels 10·pair + 2·j and the next one.  A warp fetches
// two groups at a time, normalises them as fragments, and puts them back.
template <int STEPS>
class NormalisedTile {
  public:
    // Packs of a pixel's channels, and one that has the ones.  From pack to pack, two more than the pixels' own: what a
    // quarter of a warp stores at once lies in different banks.
    static constexpr int kPackBytes = (kPixels + 2) * 16;
    static constexpr int kRowBytes = (2 * STEPS + 1) * kPackBytes;
    static constexpr int kFactorBytes = STEPS * 8 * sizeof(uint2);

    // Of `rows` rows, with this pixel as the first one; it may reach beyond the image.  All threads of the block; a
    // barrier must follow.
    __device__ NormalisedTile(unsigned char* shared, const NormConvDepthwiseArguments& arguments, int64_t image,
                              int row, int column, int rows)
        : a_(arguments),
          factors_(reinterpret_cast<uint2*>(shared)),
          pixels_(shared + kFactorBytes),
          row_(row),
          column_(column),
          groups_((rows + 2) * kRowGroups),
          image_(a_.x + image * a_.height * a_.width * a_.channels) {
        const int channel = threadIdx.x * 2;
        if (channel >= STEPS * 16) return;
        const auto word = [&](const __half* values) {
            return channel < a_.channels ? __ldg(reinterpret_cast<const uint32_t*>(values + channel)) : 0u;
        };
        factors_[threadIdx.x] = {word(a_.norm_weight), word(a_.norm_bias)};
    }

    // Starts to fetch the pixels: zeros beyond the image.
    __device__ void fetch() const {
        constexpr int kLanes = 2 * STEPS / 3;  // of a pixel, with three packs each
        static_assert(STEPS % 3 == 0 && 32 % kLanes == 0);
        const int lane = threadIdx.x % 32, first_pack = lane % kLanes;
#pragma unroll 1
        for (int pair = threadIdx.x / 32 * 2; pair < groups_; pair += Block<STEPS>::kWarps * 2) {
#pragma unroll
            for (int first = 0; first < 16; first += 32 / kLanes) {
                const int of_pair = first + lane / kLanes;
                const int group = pair + of_pair / 8;
                if (group >= groups_) continue;
                const Pixel pixel = pixel_of(group, of_pair % 8);
                const bool inside = is_inside(pixel);
                const __half* const source =
                    inside ? image_ + (int64_t{pixel.y} * a_.width + pixel.x) * a_.channels : a_.x;
                unsigned char* const target = place(group, of_pair % 8, first_pack);
#pragma unroll
                for (int i = 0; i < 3; ++i) {
                    const bool exists = inside && (first_pack + i * kLanes) * 8 < a_.channels;
                    copy_or_clear(reinterpret_cast<__half*>(target + i * kLanes * kPackBytes),
                                  source + (exists ? (first_pack + i * kLanes) * 8 : 0), exists);
                }
            }
        }
    }

    // Then normalises them, each warp those that it has fetched, behind a barrier.  Another one must follow.
    __device__ void normalise() const {
        const int lane = threadIdx.x % 32;
        __pipeline_commit();
        __pipeline_wait_prior(0);
        __syncwarp();
#pragma unroll 1
        for (int pair = threadIdx.x / 32 * 2; pair < groups_; pair += Block<STEPS>::kWarps * 2) {
            // The lane's row of four matrices: groups 0 and 1 with channels 0 … 7, then with 8 … 15.
            const int group = min(pair + lane / 8 % 2, groups_ - 1);
            unsigned char* const matrices = place(group, lane % 8, lane / 16);
            uint32_t x[STEPS][4];
#pragma unroll
            for (int k = 0; k < STEPS; ++k) {
                load_matrices(x[k], reinterpret_cast<const __half*>(matrices + 2 * k * kPackBytes));
            }
            normalise_pixels(x, factors_, a_.channels, a_.epsilon, a_.subtract_mean);
            const bool inside[] = {is_inside(pixel_of(pair, lane / 4)),
                                   is_inside(pixel_of(min(pair + 1, groups_ - 1), lane / 4))};
            if (!__all_sync(0xffffffffu, inside[0] && inside[1])) {  // beyond the image, all channels are zeros
#pragma unroll
                for (int k = 0; k < STEPS; ++k) {
                    for (int n = 0; n < 4; ++n) x[k][n] = inside[n % 2] ? x[k][n] : 0;
                }
            }
#pragma unroll
            for (int k = 0; k < STEPS; ++k) store_matrices(matrices + 2 * k * kPackBytes, x[k]);
            const uint32_t one = is_inside(pixel_of(group, lane % 8)) ? kOnes : 0;
            auto* const ones = reinterpret_cast<uint4*>(matrices + 2 * STEPS * kPackBytes);
            if (lane < 16) *ones = make_uint4(one, one, one, one);
        }
        fence_proxy_async();
    }

    // A row of the tile, from the one above it on: its first 16 channels.
    __device__ Packs row(int number) const { return {address(number), kPackBytes, 128}; }
    // And its ones, of which there is but one pack: it stands for two.
    __device__ Packs ones(int number) const { return {address(number) + 2 * STEPS * kPackBytes, 0, 128}; }

  private:
    static constexpr int kRowGroups = kPixels / 8;

    struct Pixel {
        int y, x;  // in the image
    };
    __device__ Pixel pixel_of(int group, int i) const {
        return {row_ - 1 + group / kRowGroups, column_ - 1 + i / 2 * 10 + group % kRowGroups * 2 + i % 2};
    }
    __device__ bool is_inside(const Pixel& pixel) const {
        return pixel.y >= 0 && pixel.y < a_.height && pixel.x >= 0 && pixel.x < a_.width;
    }
    __device__ unsigned char* place(int group, int i, int pack) const {
        return pixels_ + group / kRowGroups * kRowBytes + (group % kRowGroups * 8 + i) * 16 + pack * kPackBytes;
    }
    __device__ uint32_t address(int row) const {
        return static_cast<uint32_t>(__cvta_generic_to_shared(pixels_)) + row * kRowBytes;
    }

    const NormConvDepthwiseArguments& a_;
    uint2* const factors_;  // pairs of the norm's weights and of its biases
    unsigned char* const pixels_;
    const int row_, column_, groups_;
    const __half* const image_;
};

// ---- Convolutions ---------------------------------------------------------------------------------------------------

// The 1 × 1 convolution's weights of a warp's 16 outputs, for each 16 channels, and their biases.
template <int STEPS>
struct ProductWeights {
    uint32_t weights[STEPS][4], bias[4];

    // A lane has outputs `upper` and `lower`: rows `group` and `group + 8` of the product.  Those that are negative do
    // not exist.
    __device__ void load(const NormConvDepthwiseArguments& a, int upper, int lower) {
        const int pair = threadIdx.x % 4;
        const auto row = [&](int output) {
            const __half* const first = a.weight + (output < 0 ? 0 : output * int64_t{a.channels});
            return reinterpret_cast<const uint32_t*>(first) + pair;
        };
        const uint32_t* const rows[] = {row(upper), row(lower)};
        const int channels[] = {upper < 0 ? 0 : a.channels, lower < 0 ? 0 : a.channels};
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
            for (int i = 0; i < 4; ++i) {
                const int packs = 2 * s + i / 2;  // before the word's
                weights[s][i] = packs * 8 < channels[i % 2] ? __ldg(rows[i % 2] + packs * 4) : 0;
            }
        }
        bias[0] = pair == 0 && upper >= 0 ? __half_as_ushort(a.bias[upper]) : 0;
        bias[1] = pair == 0 && lower >= 0 ? __half_as_ushort(a.bias[lower]) : 0;
        bias[2] = bias[3] = 0;
    }

    // Starts to multiply a row of the tile.
    __device__ void multiply(float (&c)[kLaneWords][4], const NormalisedTile<STEPS>& tile, int row) const {
        const Packs pixels = tile.row(row);
        begin_products();
        start_product<false>(c, bias, tile.ones(row));
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
            start_product<true>(c, weights[s], pixels.moved(2 * s * NormalisedTile<STEPS>::kPackBytes));
        }
        end_products();
    }
};

// A row of z, in FP16: a lane's pixels of an output, and the words left and right of them, which lanes beside it have.
// The first and the last pixel of all lack a neighbour: what is made of them is not theirs.
struct Row {
    __half2 z[kLaneWords];
    uint32_t left, right;

    __device__ void find_neighbours() {
        left = __shfl_up_sync(0xffffffffu, as_word(z[kLaneWords - 1]), 1);
        right = __shfl_down_sync(0xffffffffu, as_word(z[0]), 1);
    }
};

// What comes of a product: the rows of output `group` and of `group + 8`.
__device__ inline void round_outputs(const float (&c)[kLaneWords][4], Row& upper, Row& lower) {
#pragma unroll
    for (int i = 0; i < kLaneWords; ++i) {
        upper.z[i] = __floats2half2_rn(c[i][0], c[i][1]);
        lower.z[i] = __floats2half2_rn(c[i][2], c[i][3]);
    }
    upper.find_neighbours();
    lower.find_neighbours();
}

// The depthwise convolution of one output on its way down, a lane's pixels of each row.
//
// Sums are FP16, product by product: see depthwise.cuh.
class DepthwiseRows {
  public:
    // A negative output does not exist.
    __device__ void start(const NormConvDepthwiseArguments& a, int output) {
        __half values[10];
#pragma unroll
        for (int i = 0; i < 9; ++i) values[i] = output < 0 ? __half() : a.depthwise_weight[int64_t{output} * 9 + i];
        values[9] = output < 0 ? __half() : a.depthwise_bias[output];
        for (int i = 0; i < 5; ++i) weights_[i] = __halves2half2(values[2 * i], values[2 * i + 1]);
        for (int i = 0; i < kLaneWords; ++i) before_[i] = last_[i] = __float2half2_rn(0);
    }

    // Takes the next row; what is done is the row above it.
    __device__ void advance(const Row& row, __half2 (&done)[kLaneWords]) {
        const auto& z = row.z;
        // Pairs that begin at odd pixels.
        const auto between = [](uint32_t left, uint32_t right) {
            const uint32_t word = __byte_perm(left, right, 0x5432);
            return *reinterpret_cast<const __half2*>(&word);
        };
        __half2 shifted[kLaneWords + 1];
        shifted[0] = between(row.left, as_word(z[0]));
#pragma unroll
        for (int i = 1; i < kLaneWords; ++i) shifted[i] = between(as_word(z[i - 1]), as_word(z[i]));
        shifted[kLaneWords] = between(as_word(z[kLaneWords - 1]), row.right);
#pragma unroll
        for (int i = 0; i < kLaneWords; ++i) {
            const auto add_row = [&](int row, __half2 sum) {
                sum = __hfma2(weight(3 * row), shifted[i], sum);
                sum = __hfma2(weight(3 * row + 1), z[i], sum);
                return __hfma2(weight(3 * row + 2), shifted[i + 1], sum);
            };
            done[i] = add_row(2, before_[i]);
            before_[i] = add_row(1, last_[i]);
            last_[i] = add_row(0, weight(9));
        }
    }

  private:
    // Twice the same: instructions choose a half of a register.
    __device__ __half2 weight(int i) const {
        return i % 2 ? __high2half2(weights_[i / 2]) : __low2half2(weights_[i / 2]);
    }

    __half2 weights_[5];                             // and the bias
    __half2 before_[kLaneWords], last_[kLaneWords];  // rows 0 and 1 of the weights for the last row; row 0 for the next
};

// ---- Kernel ---------------------------------------------------------------------------------------------------------

// Which of the image's tiles and hidden channels a block takes.
struct Share {
    int rows;            // of a tile
    int across, down;    // tiles of an image
    int slices, chunks;  // blocks that divide the hidden channels of a tile, and chunks of each
};

// blockIdx.x is (image, tile, slice): blocks that read the same pixels are neighbours.
template <int STEPS>
__global__ void __launch_bounds__(Block<STEPS>::kThreads, Block<STEPS>::kBlocks)
    gate_kernel(const NormConvDepthwiseArguments a, const __grid_constant__ CUtensorMap gated, int hidden,
                const Share share) {
    using Tile = NormalisedTile<STEPS>;
    extern __shared__ __align__(128) unsigned char shared[];
    allow_dependents();
    const int lane = threadIdx.x % 32, warp_of_block = alike(threadIdx.x / 32);
    const int warp = warp_of_block % 4, group = warp_of_block / 4;
    const int slice = blockIdx.x % share.slices, tile_number = blockIdx.x / share.slices;
    const int column = tile_number % share.across * kColumns;
    const int row = tile_number / share.across % share.down * share.rows;
    const int64_t image = tile_number / share.across / share.down;

    // The lane's corner of the stage: where its row of the transposed matrices, a pixel, is to lie.
    unsigned char* const stage = shared + warp_of_block * kStageBytes + kStageFirst;
    unsigned char* const corner = stage + (lane % 8 / 2 * 10 + lane % 2 - 1) * 16;
    const Tile tile(shared + Block<STEPS>::kWarps * kStageBytes, a, image, row, column, share.rows);
    __syncthreads();
    ProductWeights<STEPS> weights;
    DepthwiseRows gates, values;
    const auto load_weights = [&](int chunk) {
        const int channel = chunk * kChunk + warp * 8 + lane / 4;
        const int gate = channel < hidden ? channel : -1, value = channel < hidden ? hidden + channel : -1;
        weights.load(a, gate, value);
        gates.start(a, gate);
        values.start(a, value);
    };
    const int first = slice * share.chunks + group;
    const int last = min((slice + 1) * share.chunks, (hidden + kChunk - 1) / kChunk);
    wait_for_previous();
    tile.fetch();
    load_weights(first);
    tile.normalise();
    __syncthreads();

#pragma unroll 1
    for (int chunk = first; chunk < last; chunk += Block<STEPS>::kGroups) {
        if (chunk > first) load_weights(chunk);
        const int channel = chunk * kChunk + warp * 8;
        // What has come of a row's product; the next one's is on its way then.
        float c[kLaneWords][4];
        Row rows[2];
        const auto take_product = [&](int next) {
            wait_for_product(c);
            round_outputs(c, rows[0], rows[1]);
            weights.multiply(c, tile, min(next, share.rows + 1));
        };
        weights.multiply(c, tile, 0);
        take_product(1);
#pragma unroll 1
        for (int i = 0; i < share.rows + 2; ++i) {  // rows of the tile, from the one above it on
            __half2 gate[kLaneWords], value[kLaneWords];
            gates.advance(rows[0], gate);
            values.advance(rows[1], value);
            if (i >= 2 && row + i - 2 < a.height && channel < hidden) {
                apply_fast_gelu(gate);
                for (int n = 0; n < kLaneWords; ++n) gate[n] = __hmul2(gate[n], value[n]);
                if (lane == 0) wait_for_stores();  // of the row before
                __syncwarp();
                store_matrices_transposed(corner + lane / 8 * 32,
                                          {as_word(gate[0]), as_word(gate[1]), as_word(gate[2]), as_word(gate[3])});
                store_matrix_transposed(corner + 128, as_word(gate[4]));
                fence_proxy_async();
                __syncwarp();
                if (lane == 0) store_box(gated, channel, column, image * a.height + row + i - 2, stage);
            }
            take_product(i + 2);
        }
        wait_for_product(c);
    }
    if (lane == 0) wait_for_stores();
}

// Divides the work so that the multiprocessors are done first.  Times are in clocks, and rough: of a row of a chunk,
// alone and beside others, of a row of pixels to normalise, and of a block.
template <int STEPS>
Share divide(const NormConvDepthwiseArguments& a, int64_t batch, int64_t hidden, int multiprocessors, int most_rows) {
    constexpr int kBlocks = Block<STEPS>::kBlocks, kGroups = Block<STEPS>::kGroups;
    const int64_t chunks = ceil_div(hidden, kChunk);
    Share best{};
    best.across = static_cast<int>(ceil_div(a.width, kColumns));
    int64_t least = INT64_MAX;
    for (int rows = 1; rows <= most_rows && rows < a.height + most_rows; ++rows) {
        const int64_t down = ceil_div(a.height, rows);
        for (int64_t per_slice = 1; per_slice <= chunks; ++per_slice) {
            const int64_t slices = ceil_div(chunks, per_slice);
            const int64_t blocks = batch * best.across * down * slices;
            const int64_t rounds = ceil_div(per_slice, kGroups);
            const int64_t of_row = std::max(350 * kBlocks * per_slice, 700 * rounds);
            const int64_t time =
                ceil_div(blocks, multiprocessors * kBlocks) * ((rows + 2) * (of_row + 40 * kBlocks * STEPS) + 4000);
            if (time >= least || blocks > INT32_MAX) continue;
            least = time;
            best.rows = rows;
            best.down = static_cast<int>(down);
            best.slices = static_cast<int>(slices);
            best.chunks = static_cast<int>(per_slice);
        }
    }
    return best;
}

template <int STEPS>
cudaError_t launch_gate(const NormConvDepthwiseArguments& a, const CUtensorMap& gated, int64_t batch, int64_t hidden,
                        int multiprocessors, int shared_bytes, cudaStream_t stream) {
    using Tile = NormalisedTile<STEPS>;
    using Sizes = Block<STEPS>;
    // Behind the last row's ones is room for the pack that they stand for, too: memcheck takes it to be read.
    constexpr int kApart = Sizes::kWarps * kStageBytes + Tile::kFactorBytes + Tile::kPackBytes;
    constexpr int kRow = Tile::kRowBytes, kReserved = 1024;  // of each block's shared memory, by CUDA
    const int most_bytes = (shared_bytes + kReserved) / Sizes::kBlocks - kReserved;
    const Share share = divide<STEPS>(a, batch, hidden, multiprocessors, (most_bytes - kApart) / kRow - 2);
    if (share.rows == 0) return cudaErrorInvalidConfiguration;
    const auto blocks = static_cast<unsigned>(batch * share.across * share.down * share.slices);
    return launch_dependent(gate_kernel<STEPS>, dim3(blocks), Sizes::kThreads, kApart + (share.rows + 2) * kRow, stream,
                            a, gated, static_cast<int>(hidden), share);
}

}  // namespace

bool launch_gate_sm90(const NormConvDepthwiseArguments& a, void* gated, int64_t batch, int64_t hidden,
                      int multiprocessors, int shared_bytes, cudaStream_t stream, cudaError_t& error) {
    EncodeTensorMap encode = nullptr;
    const int64_t rows = batch * a.height;
    // More channels would leave registers for fewer warps, and shared memory for small tiles.
    if (a.channels > 96 || rows > INT32_MAX || !on_boundary(a.x) || !on_boundary(gated) || find_encode(encode)) {
        return false;
    }
    CUtensorMap boxes;
    // A row of a tile by a warp's channels.
    error = describe_boxes(encode, boxes, gated, 3, rows, a.width, hidden, kColumns, 8);
    if (!error) {
        error = (a.channels <= 48 ? launch_gate<3> : launch_gate<6>)(a, boxes, batch, hidden, multiprocessors,
                                                                     shared_bytes, stream);
    }
    return true;
}

}  // namespace trt_graft
