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
//   gate       in registers, too.  Then a row of 8 channels passes shared memory on its way out, to become 16 bytes of
//              each pixel.
//
// While a warp convolves a row, wgmma multiplies the next one.  Nothing but the normalised pixels is in shared memory,
// and warpgroups do not wait for each other.  What limits it are instructions: see docs/restormer-tuning.md.
//
// Another channel, of ones, is multiplied by the bias.  Outside of the image it is zero, as all channels are there: z
// is zero, too, as the depthwise convolution wants it.
//
// Where an image has few tiles, blocks divide the hidden channels between them, and each normalises the tile again.
#include "common/gelu.cuh"
#include "common/pointwise.cuh"
#include "common/wgmma.cuh"
#include "gated_feed_forward/sm90.cuh"

namespace trt_graft {
namespace {

constexpr int kColumns = 38;   // of a tile
constexpr int kPixels = 40;    // of a row, with one on each side
constexpr int kLaneWords = 5;  // of a row: pairs of neighbouring pixels that a lane has of an output
constexpr int kChunk = 32;     // hidden channels that a warpgroup takes at a time
constexpr int kGroups = 4;     // warpgroups of a block, as many as there are registers for
constexpr int kThreads = kGroups * 128;
constexpr int kStageBytes = kPixels * 16;  // of a warp's gated channels of a row

// ---- Normalisation --------------------------------------------------------------------------------------------------

// Of a pixel's channels, up to STEPS · 16, by some lanes of a warp that have three packs of 16 bytes each.  Statistics
// are FP32.
template <int STEPS>
class PixelNorm {
  public:
    static constexpr int kPacks = 3;                   // of a lane
    static constexpr int kLanes = 2 * STEPS / kPacks;  // of a pixel
    static_assert(2 * STEPS % kPacks == 0 && 32 % kLanes == 0);

    // Which of the pixel's packs is the lane's pack i.
    static __device__ int pack(int i) { return threadIdx.x % kLanes + i * kLanes; }

    // Fetches the weights: constants, that is, which need no wait_for_previous.  `channels` is a multiple of 8.
    __device__ PixelNorm(const __half* weight, const __half* bias, int channels, float epsilon, bool subtract_mean)
        : channels_(channels), epsilon_(epsilon), subtract_mean_(subtract_mean) {
        load(weight, true, gamma_);
        load(bias, true, beta_);
    }

    // The lane's packs of a pixel, or zeros if it does not exist.
    __device__ void load(const __half* pixel, bool exists, uint4 (&x)[kPacks]) const {
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
            x[i] = exists && pack(i) * 8 < channels_ ? __ldg(reinterpret_cast<const uint4*>(pixel) + pack(i)) : uint4{};
        }
    }

    // All lanes of the warp; beyond the channels, zeros.
    __device__ void normalise(uint4 (&x)[kPacks]) const {
        float values[kPacks][8], sum = 0, squares = 0;
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
            unpack(x[i], values[i]);
            for (float value : values[i]) sum += value;
        }
        const float mean = sum_of_pixel(sum) / channels_;
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
            const bool exists = pack(i) * 8 < channels_;
            for (float& value : values[i]) {
                value -= mean;
                if (exists) squares = fmaf(value, value, squares);
            }
        }
        const float scale = rsqrtf(sum_of_pixel(squares) / channels_ + epsilon_);
        const float offset = subtract_mean_ ? 0 : mean * scale;
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
            auto* const pairs = reinterpret_cast<__half2*>(&x[i]);
            for (int n = 0; n < 4; ++n) {
                const __half2 normal =
                    __floats2half2_rn(fmaf(values[i][2 * n], scale, offset), fmaf(values[i][2 * n + 1], scale, offset));
                pairs[n] = __hfma2(normal, reinterpret_cast<const __half2*>(&gamma_[i])[n],
                                   reinterpret_cast<const __half2*>(&beta_[i])[n]);
            }
        }
    }

  private:
    static __device__ float sum_of_pixel(float x) {
        for (int offset = kLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
        return x;
    }

    const int channels_;
    const float epsilon_;
    const bool subtract_mean_;
    uint4 gamma_[kPacks], beta_[kPacks];
};

// The normalised pixels of a tile and those around it, up to STEPS · 16 channels.
//
// A row's pixels are columns of wgmma's second factor.  Tile j = 0 … 4 of the product gives a lane of number `pair` its
// columns 2·pair and 2·pair + 1: these are pixels 10·pair + 2·j and the next one.
template <int STEPS>
class NormalisedTile {
  public:
    // Packs of a pixel's channels, and one that has the ones.  From pack to pack, two more than the pixels' own: what a
    // quarter of a warp stores at once lies in different banks.
    static constexpr int kPackBytes = (kPixels + 2) * 16;
    static constexpr int kRowBytes = (2 * STEPS + 1) * kPackBytes;

    __device__ NormalisedTile(void* shared, const NormConvDepthwiseArguments& arguments)
        : a_(arguments),
          bytes_(static_cast<char*>(shared)),
          norm_(a_.norm_weight, a_.norm_bias, a_.channels, a_.epsilon, a_.subtract_mean) {}

    // Normalises the tile of `rows` rows whose first pixel this is, and what is around it; it may reach beyond the
    // image.  All threads of the block; a barrier must follow.
    __device__ void fill(int64_t image, int row, int column, int rows) const {
        constexpr int kStep = kThreads / Norm::kLanes;  // pixels that the block takes at a time
        constexpr int kAtOnce = 4;                      // that a thread loads at a time
        const int pixels = (rows + 2) * kPixels, of_warp = threadIdx.x % 32 / Norm::kLanes;
        const auto inside = [&](int pixel) {
            const int y = row - 1 + pixel / kPixels, x = column - 1 + pixel % kPixels;
            return y >= 0 && y < a_.height && x >= 0 && x < a_.width;
        };
#pragma unroll 1
        for (int begin = threadIdx.x / 32 * 32 / Norm::kLanes; begin < pixels; begin += kAtOnce * kStep) {
            uint4 x[kAtOnce][Norm::kPacks];
#pragma unroll
            for (int n = 0; n < kAtOnce; ++n) {
                const int pixel = begin + n * kStep + of_warp;
                const int64_t y = image * a_.height + row - 1 + pixel / kPixels;
                norm_.load(a_.x + (y * a_.width + column - 1 + pixel % kPixels) * a_.channels,
                           pixel < pixels && inside(pixel), x[n]);
            }
#pragma unroll
            for (int n = 0; n < kAtOnce; ++n) {
                if (begin + n * kStep >= pixels) break;
                const int pixel = begin + n * kStep + of_warp;
                norm_.normalise(x[n]);
                if (pixel < pixels) store(x[n], pixel / kPixels, pixel % kPixels, inside(pixel));
            }
        }
        publish_to_wgmma();
    }

    // A row of the tile, from the one above it on: its first 16 channels.
    __device__ Packs row(int number) const {
        return {static_cast<uint32_t>(__cvta_generic_to_shared(bytes_)) + number * kRowBytes, kPackBytes, 128};
    }
    // And its ones, of which there is but one pack: it stands for two.
    __device__ Packs ones(int number) const { return {row(number).address + 2 * STEPS * kPackBytes, 0, 128}; }

  private:
    using Norm = PixelNorm<STEPS>;

    // Outside of the image, all channels are zeros.
    __device__ void store(const uint4 (&x)[Norm::kPacks], int y, int across, bool exists) const {
        const int place = across % 10 / 2 * 8 + across / 10 * 2 + across % 2;
        char* const target = bytes_ + y * kRowBytes + place * 16;
#pragma unroll
        for (int i = 0; i < Norm::kPacks; ++i) {
            *reinterpret_cast<uint4*>(target + Norm::pack(i) * kPackBytes) = exists ? x[i] : uint4{};
        }
        const uint32_t ones = exists ? 0x3c003c00 : 0;
        if (Norm::pack(0) == 0) *reinterpret_cast<uint4*>(target + 2 * STEPS * kPackBytes) = {ones, ones, ones, ones};
    }

    const NormConvDepthwiseArguments& a_;
    char* const bytes_;
    const Norm norm_;
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
        const auto word = [&](int output, int channel) {
            const bool exists = output >= 0 && channel < a.channels;
            return exists ? __ldg(reinterpret_cast<const uint32_t*>(a.weight + int64_t{output} * a.channels + channel))
                          : 0u;
        };
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
            for (int i = 0; i < 4; ++i) weights[s][i] = word(i % 2 ? lower : upper, s * 16 + i / 2 * 8 + 2 * pair);
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

    // Takes the next row of z; what is done is the row above it.  The first and the last pixel of all lanes lack a
    // neighbour: what comes out is not theirs.
    __device__ void advance(const __half2 (&z)[kLaneWords], __half2 (&done)[kLaneWords]) {
        // Pairs that begin at odd pixels.
        const auto between = [](uint32_t left, uint32_t right) {
            const uint32_t word = __byte_perm(left, right, 0x5432);
            return *reinterpret_cast<const __half2*>(&word);
        };
        __half2 shifted[kLaneWords + 1];
        shifted[0] = between(__shfl_up_sync(0xffffffffu, as_word(z[kLaneWords - 1]), 1), as_word(z[0]));
#pragma unroll
        for (int i = 1; i < kLaneWords; ++i) shifted[i] = between(as_word(z[i - 1]), as_word(z[i]));
        shifted[kLaneWords] = between(as_word(z[kLaneWords - 1]), __shfl_down_sync(0xffffffffu, as_word(z[0]), 1));
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

// The rows of a product as z, in FP16: those of output `group` and of `group + 8`.
__device__ inline void round_outputs(const float (&c)[kLaneWords][4], __half2 (&upper)[kLaneWords],
                                     __half2 (&lower)[kLaneWords]) {
#pragma unroll
    for (int i = 0; i < kLaneWords; ++i) {
        upper[i] = __floats2half2_rn(c[i][0], c[i][1]);
        lower[i] = __floats2half2_rn(c[i][2], c[i][3]);
    }
}

// ---- Kernel ---------------------------------------------------------------------------------------------------------

// Which of the image's tiles and hidden channels a block takes.
struct Share {
    int rows;            // of a tile
    int across, down;    // tiles of an image
    int slices, chunks;  // blocks that divide the hidden channels of a tile, and chunks of each
};

// blockIdx.x is (image, tile, slice): blocks that read the same pixels are neighbours.
template <int STEPS>
__global__ void __launch_bounds__(kThreads, 1)
    gate_kernel(const NormConvDepthwiseArguments a, __half* __restrict__ gated, int hidden, const Share share) {
    using Tile = NormalisedTile<STEPS>;
    extern __shared__ uint4 shared[];
    allow_dependents();
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, group = threadIdx.x / 128;
    const int slice = blockIdx.x % share.slices, tile_number = blockIdx.x / share.slices;
    const int column = tile_number % share.across * kColumns;
    const int row = tile_number / share.across % share.down * share.rows;
    const int64_t image = tile_number / share.across / share.down;

    char* const stage = reinterpret_cast<char*>(shared) + threadIdx.x / 32 * kStageBytes;
    const Tile tile(shared + kThreads / 32 * kStageBytes / 16, a);
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
    tile.fill(image, row, column, share.rows);
    load_weights(first);
    __syncthreads();

#pragma unroll 1
    for (int chunk = first; chunk < last; chunk += kGroups) {
        if (chunk > first) load_weights(chunk);
        // The lane's pixels in memory: one of 1 … 32 and one of 33 … 38, in the row two above the one that is
        // multiplied.
        const int channel = chunk * kChunk + warp * 8;
        __half* target = gated + ((image * a.height + row - 2) * a.width + column + lane) * hidden + channel;
        const bool stores = channel < hidden && column + lane < a.width;
        const bool stores_more = channel < hidden && lane < kColumns - 32 && column + lane + 32 < a.width;
        // What has come of a row's product; the next one's is on its way then.
        float c[kLaneWords][4];
        __half2 z[2][kLaneWords];
        const auto take_product = [&](int next) {
            wait_for_product(c);
            round_outputs(c, z[0], z[1]);
            weights.multiply(c, tile, min(next, share.rows + 1));
        };
        weights.multiply(c, tile, 0);
        take_product(1);
#pragma unroll 1
        for (int i = 0; i < share.rows + 2; ++i) {  // rows of the tile, from the one above it on
            __half2 gate[kLaneWords], value[kLaneWords];
            gates.advance(z[0], gate);
            values.advance(z[1], value);
            if (i >= 2 && row + i - 2 < a.height) {
                uint32_t words[kLaneWords];
                for (int n = 0; n < kLaneWords; ++n) words[n] = as_word(__hmul2(fast_gelu(gate[n]), value[n]));
                // Rows of the transposed matrices are pixels.
                char* const corner = stage + (lane % 8 / 2 * 10 + lane % 2) * 16;
                __syncwarp();
                store_matrices_transposed(corner + lane / 8 * 32, {words[0], words[1], words[2], words[3]});
                store_matrix_transposed(corner + 128, words[4]);
                __syncwarp();
                const auto* const packs = reinterpret_cast<const uint4*>(stage) + lane + 1;
                if (stores) *reinterpret_cast<uint4*>(target) = packs[0];
                if (stores_more) *reinterpret_cast<uint4*>(target + 32 * hidden) = packs[32];
            }
            target += int64_t{a.width} * hidden;
            take_product(i + 2);
        }
        wait_for_product(c);
    }
}

// Divides the work so that the multiprocessors, each with one block at a time, are done first.  Times are in clocks,
// and rough: of a row of a chunk, alone and beside others, of a row of pixels to normalise, and of a block.
template <int STEPS>
Share divide(const NormConvDepthwiseArguments& a, int64_t batch, int64_t hidden, int multiprocessors, int most_rows) {
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
            const int64_t of_row = 350 * per_slice > 700 * rounds ? 350 * per_slice : 700 * rounds;
            const int64_t time = ceil_div(blocks, multiprocessors) * ((rows + 2) * (of_row + 40 * STEPS) + 4000);
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
cudaError_t launch_gate(const NormConvDepthwiseArguments& a, void* gated, int64_t batch, int64_t hidden,
                        int multiprocessors, int shared_bytes, cudaStream_t stream) {
    using Tile = NormalisedTile<STEPS>;
    // Behind the last row's ones is room for the pack that they stand for, too: memcheck takes it to be read.
    constexpr int kApart = kThreads / 32 * kStageBytes + Tile::kPackBytes, kRow = Tile::kRowBytes;
    const Share share = divide<STEPS>(a, batch, hidden, multiprocessors, (shared_bytes - kApart) / kRow - 2);
    if (share.rows == 0) return cudaErrorInvalidConfiguration;
    const auto blocks = static_cast<unsigned>(batch * share.across * share.down * share.slices);
    return launch_dependent(gate_kernel<STEPS>, dim3(blocks), kThreads, kApart + (share.rows + 2) * kRow, stream, a,
                            static_cast<__half*>(gated), static_cast<int>(hidden), share);
}

}  // namespace

bool launch_gate_sm90(const NormConvDepthwiseArguments& a, void* gated, int64_t batch, int64_t hidden,
                      int multiprocessors, int shared_bytes, cudaStream_t stream, cudaError_t& error) {
    // More channels would leave registers for fewer warps, and shared memory for small tiles.
    if (a.channels > 96) return false;
    error = (a.channels <= 48 ? launch_gate<3> : launch_gate<6>)(a, gated, batch, hidden, multiprocessors, shared_bytes,
                                                                 stream);
    return true;
}

}  // namespace trt_graft
