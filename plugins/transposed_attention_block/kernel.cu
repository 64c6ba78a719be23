// The first half of Restormer's transformer block: layer normalisation, 1 × 1 and depthwise convolution, attention
// between channels, 1 × 1 convolution and residual connection.
//
// Floor: x is read twice, since the scores need all pixels before the first of y can be had, and y is written once.  v
// is written and read as well: to make it again would cost a third of all products.  q, k and what comes before the
// depthwise convolution never go to memory.  There are three kernels:
//
//   qkv       per head and share of an image's tiles, see common/norm_conv_depthwise.cuh: q and k of a tile, in shared
//             memory, and of them qᵀ · k, Σq² and Σk², in FP32 → workspace; v → workspace
//   softmax   see transposed_attention/gram.cuh
//   residual  the convolution on v, see transposed_attention_residual/kernel.cu
//
// A head's q, k and v are made by one block, or q and k by one and v by another where there would be too few.  There
// are no atomics; sums are taken in an order that depends on sizes only, so results repeat bit by bit.
//
// FP32, heads of other sizes than Restormer's, and images whose many pixels make up for what is written and read again,
// go through the kernels of the plugins that this one fuses.
#include <algorithm>

#include "common/norm_conv_depthwise.cuh"
#include "depthwise_conv/kernel.cuh"
#include "norm_pointwise_conv/kernel.cuh"
#include "pointwise_conv_residual/tensor_core.cuh"
#include "transposed_attention/gram.cuh"
#include "transposed_attention_block/kernel.cuh"
#include "transposed_attention_residual/kernel.cuh"

namespace trt_graft {
namespace {

struct Block {
    DataType type;
    const void *x, *norm_weight, *norm_bias, *qkv_weight, *qkv_bias, *depthwise_weight, *depthwise_bias, *temperature,
        *weight, *bias;
    void* y;
    char* workspace;
    int64_t batch, heads, head_channels, height, width;
    float epsilon;
    int32_t subtract_mean;

    int64_t channels() const { return heads * head_channels; }
    int64_t pixels() const { return height * width; }
};

constexpr int64_t kAlignment = 256;  // of what lies in the workspace, in bytes

constexpr int64_t aligned(int64_t bytes) { return ceil_div(bytes, kAlignment) * kAlignment; }

// ---- The parts' kernels, one after the other ------------------------------------------------------------------------

constexpr int64_t kPartsPixels = 1 << 20;  // of the images at a time, unless one alone has more

// Bytes of q, k and v.
int64_t qkv_bytes(DataType type, int64_t channels, int64_t pixels) {
    return aligned(pixels * pitch(type, 3 * channels) * (type == DataType::kHalf ? 2 : 4));
}

int64_t parts_workspace_bytes(const Block& b) {
    const int64_t most = std::max(b.pixels(), std::min(b.batch * b.pixels(), kPartsPixels));
    return 2 * qkv_bytes(b.type, b.channels(), most) +
           transposed_attention_residual_workspace_bytes(b.batch, b.heads, b.head_channels, b.pixels());
}

cudaError_t launch_parts(const Block& b, cudaStream_t stream) {
    const int64_t channels = b.channels(), pixels = b.pixels();
    const int64_t at_once = std::clamp<int64_t>(kPartsPixels / pixels, 1, std::min<int64_t>(b.batch, UINT16_MAX));
    const int64_t bytes = qkv_bytes(b.type, channels, at_once * pixels);
    char *const z = b.workspace, *const qkv = z + bytes, *const rest = qkv + bytes;
    const int64_t image_bytes = pixels * pitch(b.type, channels) * (b.type == DataType::kHalf ? 2 : 4);
    for (int64_t image = 0; image < b.batch; image += at_once) {
        const int64_t images = std::min(at_once, b.batch - image);
        const char* const x = static_cast<const char*>(b.x) + image * image_bytes;
        cudaError_t error =
            launch_norm_pointwise_conv(b.type, x, b.norm_weight, b.norm_bias, b.qkv_weight, b.qkv_bias, z,
                                       images * pixels, channels, 3 * channels, b.epsilon, b.subtract_mean, stream);
        if (error) return error;
        error = launch_depthwise_conv(b.type, z, b.depthwise_weight, b.depthwise_bias, qkv, images, b.height, b.width,
                                      3 * channels, stream);
        if (error) return error;
        error = launch_transposed_attention_residual(b.type, qkv, b.temperature, b.weight, b.bias, x,
                                                     static_cast<char*>(b.y) + image * image_bytes, rest, images,
                                                     b.heads, b.head_channels, pixels, stream);
        if (error) return error;
    }
    return cudaSuccess;
}

// ---- Tensor cores ---------------------------------------------------------------------------------------------------

constexpr int64_t kMostBlocks = 2 * kMultiprocessors;  // unless there are more heads

// How the kernel works on up to STEPS · 16 channels and heads of WIDTH: with one block on a multiprocessor, of 16
// warps, or two of 8.  Two hide more, but have no room for q and k of 96 channels.  Pixels of more than 192 channels
// fill the registers of one of 8 warps.  WIDE tiles have the least halo, and need all shared memory of compute
// capability 9.0, and images that have one for most multiprocessors.
template <int STEPS, int WIDTH, bool WIDE>
struct Tile {
    static constexpr bool kLarge = WIDE || (STEPS <= 6 && WIDTH > 48);
    static constexpr int kWarps = kLarge ? 16 : 8, kStrips = WIDE ? 5 : 3;
    static constexpr int kRows = kLarge ? 16 : 8, kColumns = WIDE ? 32 : 16;
    static constexpr int kPixels = kRows * kColumns;
    static constexpr int kBlocksAtOnce = !WIDE && STEPS <= 12 && WIDTH <= 48 ? 2 : 1;
    using Core = NormConvDepthwise<STEPS, kWarps, kStrips, kRows, kColumns>;
    static constexpr int kThreads = Core::kThreads;
    static constexpr int kTaskRows = Core::kTaskRows, kLines = Core::kLines;
    static_assert(kUnit % kTaskRows == 0, "a task is part of a unit");

    static constexpr int kHeadUnits = WIDTH / kUnit;  // of v, q or k
    // q and k of a tile: a plane of pixels for each channel, in the order in which the warps have them.  Planes are an
    // odd number of packs of 16 bytes apart: what a warp loads at once lies in different banks.
    static constexpr int kPlane = kPixels + 8;
    static constexpr int kPlanes = 2 * WIDTH * kPlane;
    // v of a chunk on its way to memory, a row for each pixel: two buffers in place of the last planes.  Rows are an
    // odd number of packs of 8 bytes apart, for the same reason.
    static constexpr int kRow = kConvolvedChunk + 4;
    static constexpr int kStage = kPixels * kRow;
    static_assert(2 * kStage <= kPlanes);

    // Of the product, a warp has kHeight · 16 rows and kBreadth · 8 columns.
    static constexpr int kHeight = WIDTH * 2 / (kWarps == 8 ? 64 : 96), kBreadth = 3;
    static constexpr int kWarpsDown = WIDTH / (kHeight * 16), kWarpsAcross = WIDTH / (kBreadth * 8);
    // Of the squares, a warp has 16 channels, and those that are kSquareWarps · 16 further on.
    static constexpr int kProductWarps = kWarpsDown * kWarpsAcross;
    static constexpr int kSquareWarps = 2 * WIDTH / 16 < kWarps ? 2 * WIDTH / 16 : kWarps;
    static constexpr int kSquares = ceil_div(2 * WIDTH / 16, kSquareWarps);
    static_assert(kProductWarps <= kWarps && WIDTH % (kHeight * 16) == 0);
    // Sums of all tiles, as the fragments c of each lane.
    static constexpr int kSums = (kProductWarps * kHeight * kBreadth + kSquareWarps * kSquares) * 32;

    static constexpr int kSharedBytes = Core::kBytes + kPlanes * 2 + kSums * 16;
};

// What a block does with q, k and v, in the order v, q, k.
template <typename TILE, int WIDTH>
class Epilogue {
  public:
    // Those units of the head from `first` to `last`.
    __device__ Epilogue(__half* shared, const NormConvDepthwiseArguments& arguments, int first, int last)
        : a_(arguments), planes_(shared), first_(first), last_(last) {
        auto* const sums = reinterpret_cast<float4*>(planes_ + TILE::kPlanes);
        for (int i = threadIdx.x; i < TILE::kSums; i += TILE::kThreads) sums[i] = {};
    }

    // Starts the tile whose first pixel this is, `v` being the head's channels of the image.
    __device__ void start(__half* v, int row, int column) {
        v_ = v;
        row_ = row;
        column_ = column;
    }

    template <typename Convolve>
    __device__ void take(int chunk, int task, int part, const Convolve& convolve) {
        const int output = task * TILE::kTaskRows;  // of the chunk
        const int unit = first_ + chunk * kUnits + output / kUnit, channel = output % kUnit;
        if (unit >= last_) return;
        const int lane = threadIdx.x % 32;
        if (unit < TILE::kHeadUnits) {
            __half values[TILE::kLines][4][TILE::kTaskRows];
#pragma unroll
            for (int n = 0; n < TILE::kTaskRows; ++n) {
                float sums[TILE::kLines][4];
                convolve(output + n, sums);
                for (int line = 0; line < TILE::kLines; ++line) {
                    for (int i = 0; i < 4; ++i) values[line][i][n] = __float2half_rn(sums[line][i]);
                }
            }
            __half* const target = stage(chunk) + (part * TILE::kLines * 128 + lane) * TILE::kRow + output;
            for (int line = 0; line < TILE::kLines; ++line) {
                for (int i = 0; i < 4; ++i) {
                    store_pack(target + (line * 128 + i * 32) * TILE::kRow,
                               reinterpret_cast<const Pack<__half, TILE::kTaskRows>&>(values[line][i]));
                }
            }
            return;
        }
        // In planes, the four pixels that a lane has of a line are neighbours.
        __half* const target = planes_ + ((unit - TILE::kHeadUnits) * kUnit + channel) * TILE::kPlane +
                               (part * TILE::kLines * 32 + lane) * 4;
        // Pixels behind the image's end count for nothing.
        const auto store = [&](auto complete) {
#pragma unroll
            for (int n = 0; n < TILE::kTaskRows; ++n) {
                float sums[TILE::kLines][4];
                convolve(output + n, sums);
                for (int line = 0; line < TILE::kLines; ++line) {
                    Pack<uint32_t, 2> words = {{as_word(__floats2half2_rn(sums[line][0], sums[line][1])),
                                                as_word(__floats2half2_rn(sums[line][2], sums[line][3]))}};
                    if constexpr (!decltype(complete)::value) {
                        for (int i = 0; i < 2; ++i) {
                            const auto pixel = TILE::Core::pixel_of(part, line, 2 * i, lane);
                            const int left = row_ + pixel.row < a_.height ? a_.width - column_ - pixel.column : 0;
                            words.values[i] &= (left > 0 ? 0xffffu : 0) | (left > 1 ? 0xffff0000u : 0);
                        }
                    }
                    store_pack(reinterpret_cast<uint32_t*>(target + n * TILE::kPlane + line * 128), words);
                }
            }
        };
        if (row_ + TILE::kRows <= a_.height && column_ + TILE::kColumns <= a_.width) {
            store(Int<1>{});
        } else {
            store(Int<0>{});
        }
    }

    // All warps have taken the chunk: v goes to memory, where lanes store whole packs.
    __device__ void finish(int chunk) {
        const int unit = first_ + chunk * kUnits;
        if (unit < TILE::kHeadUnits) store(chunk, min(last_, TILE::kHeadUnits) - unit);
    }

    // Adds a tile's qᵀ · k, Σq² and Σk², when all of its chunks are done.
    __device__ void multiply() {
        const int thread = opaque(threadIdx.x), lane = thread % 32, warp = thread / 32;
        // Where a lane finds its row of the matrices of a fragment a, and of two fragments b.
        const __half* const a_row = planes_ + lane % 16 * TILE::kPlane + lane / 16 * 8;
        const __half* const b_row = planes_ + lane % 8 * TILE::kPlane + lane / 8 * 8;
        if (warp < TILE::kProductWarps) {
            const __half* const q_row = a_row + down() * 16 * TILE::kPlane;
            const __half* const k_row = b_row + (WIDTH + across() * 8) * TILE::kPlane;
            float c[TILE::kHeight][TILE::kBreadth][4];
            for_each_product([&](int i, int j, float4& sum) { get(c[i][j], sum); });
#pragma unroll 1
            for (int pixel = 0; pixel < TILE::kPixels; pixel += 32) {
                uint32_t q[2][TILE::kHeight][4];
                for (int half = 0; half < 2; ++half) {
                    for (int i = 0; i < TILE::kHeight; ++i) {
                        load_matrices(q[half][i], q_row + i * 16 * TILE::kPlane + pixel + half * 16);
                    }
                }
                for (int j = 0; j < TILE::kBreadth; ++j) {
                    uint32_t k[4];
                    load_matrices(k, k_row + j * 8 * TILE::kPlane + pixel);
                    for (int half = 0; half < 2; ++half) {
                        for (int i = 0; i < TILE::kHeight; ++i) {
                            multiply_add(c[i][j], q[half][i], k[2 * half], k[2 * half + 1]);
                        }
                    }
                }
            }
            for_each_product([&](int i, int j, float4& sum) { put(sum, c[i][j]); });
        }
        // Squares are the diagonals of products of 8 channels by themselves, of which a fragment has two.
        for_each_square([&](int channel, float4& sum) {
            float c[4];
            get(c, sum);
#pragma unroll 4
            for (int pixel = 0; pixel < TILE::kPixels; pixel += 16) {
                uint32_t words[4];
                load_matrices(words, a_row + channel * TILE::kPlane + pixel);
                multiply_add(c, {words[0], 0, words[2], 0}, words[0], words[2]);
                multiply_add(c, {0, words[1], 0, words[3]}, words[1], words[3]);
            }
            put(sum, c);
        });
    }

    // Leaves the sums of all tiles, as gram does.
    __device__ void store_sums(float* partial) const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, pair = lane % 4;
        if (warp < TILE::kProductWarps) {
            for_each_product([&](int i, int j, const float4& sum) {
                float* const corner = partial + ((down() + i) * 16 + group) * WIDTH + (across() + j) * 8 + 2 * pair;
                store_pack(corner, Pack<float, 2>{{sum.x, sum.y}});
                store_pack(corner + 8 * WIDTH, Pack<float, 2>{{sum.z, sum.w}});
            });
        }
        for_each_square([&](int channel, const float4& sum) {
            if (pair != group / 2) return;
            float* const sums = partial + WIDTH * WIDTH + channel + group;
            sums[0] = group % 2 ? sum.y : sum.x;
            sums[8] = group % 2 ? sum.w : sum.z;
        });
    }

  private:
    static __device__ void get(float (&c)[4], const float4& sum) {
        c[0] = sum.x;
        c[1] = sum.y;
        c[2] = sum.z;
        c[3] = sum.w;
    }
    static __device__ void put(float4& sum, const float (&c)[4]) { sum = {c[0], c[1], c[2], c[3]}; }
    // Calls f(i, j, sum) for the warp's fragments of the product, if it has any, and the lane's sum of each.
    template <typename F>
    __device__ void for_each_product(F f) const {
        auto* const sums = reinterpret_cast<float4*>(planes_ + TILE::kPlanes) + opaque(threadIdx.x);
        for (int i = 0; i < TILE::kHeight; ++i) {
            for (int j = 0; j < TILE::kBreadth; ++j) {
                f(i, j, sums[(i * TILE::kBreadth + j) * TILE::kProductWarps * 32]);
            }
        }
    }
    // Calls f(channel, sum) for the warp's sixteens of channels: q's, then k's.
    template <typename F>
    __device__ void for_each_square(F f) const {
        auto* const sums = reinterpret_cast<float4*>(planes_ + TILE::kPlanes) +
                           TILE::kProductWarps * TILE::kHeight * TILE::kBreadth * 32 + opaque(threadIdx.x);
        for (int i = 0; i < TILE::kSquares; ++i) {
            const int sixteen = threadIdx.x / 32 + i * TILE::kSquareWarps;
            if (threadIdx.x / 32 < TILE::kSquareWarps && sixteen * 16 < 2 * WIDTH) {
                f(sixteen * 16, sums[i * TILE::kSquareWarps * 32]);
            }
        }
    }

    // What follows from the thread's number alone would be kept from tile to tile, in registers that others need.
    static __device__ int opaque(int value) {
        asm volatile("" : "+r"(value));
        return value;
    }
    static __device__ int down() { return opaque(threadIdx.x) / 32 % TILE::kWarpsDown * TILE::kHeight; }
    static __device__ int across() { return opaque(threadIdx.x) / 32 / TILE::kWarpsDown * TILE::kBreadth; }

    // Where v of a chunk waits, in place of the last planes: these are k's, v's chunks come first, and each buffer is
    // stored one chunk before planes that it shares memory with are taken.
    __device__ __half* stage(int chunk) const {
        return planes_ + TILE::kPlanes - 2 * TILE::kStage + chunk % 2 * TILE::kStage;
    }

    // Stores v of a chunk, of `units` units.
    __device__ void store(int chunk, int units) const {
        constexpr int kStep = TILE::kThreads / kUnits;  // slots at a time, of 128 to a line
        const int thread = opaque(threadIdx.x), unit = thread % kUnits, slot = thread / kUnits;
        if (unit >= units) return;
        const auto pixel = TILE::Core::pixel_of(0, 0, slot / 32, slot % 32);
        const int64_t line = int64_t{a_.width} * a_.channels;
        const auto* const from = reinterpret_cast<const uint2*>(stage(chunk) + slot * TILE::kRow + unit * kUnit);
        __half* const to = v_ + (row_ + pixel.row) * line + int64_t{column_ + pixel.column} * a_.channels +
                           chunk * kConvolvedChunk + unit * kUnit;
        const int rows = column_ + pixel.column < a_.width ? a_.height - row_ - pixel.row : 0;
#pragma unroll
        for (int i = 0; i < TILE::kPixels / kStep; ++i) {
            const int before = i * kStep;
            const int row =
                TILE::Core::pixel_of(before / 128 / TILE::kLines, before / 128 % TILE::kLines, before % 128 / 32, 0)
                    .row;
            const uint2* const words = from + before * TILE::kRow / 4;
            if (row < rows)
                *reinterpret_cast<uint4*>(to + row * line) = {words[0].x, words[0].y, words[1].x, words[1].y};
        }
    }

    const NormConvDepthwiseArguments& a_;
    __half *const planes_, *v_;
    const int first_, last_;
    int row_, column_;
};

// blockIdx is (head of an image, share of its tiles, role): with one role, blocks make v, q and k; with two, some make
// q and k, and some v.
template <typename T, int WIDTH>
__global__ void __launch_bounds__(T::kThreads, T::kBlocksAtOnce)
    qkv_kernel(const NormConvDepthwiseArguments arguments, __half* v, float* partials, int heads, int tiles,
               int share_tiles) {
    extern __shared__ uint4 shared[];
    allow_dependents();
    const int image = blockIdx.x / heads, head = blockIdx.x % heads;
    const int first = gridDim.z == 1 || blockIdx.z == 1 ? 0 : T::kHeadUnits;
    const int last = gridDim.z == 1 || blockIdx.z == 0 ? 3 * T::kHeadUnits : T::kHeadUnits;
    const auto units = [&](int chunk, int index) {
        const int unit = first + chunk * kUnits + index, part = unit / T::kHeadUnits;
        if (unit >= last) return kNoUnit;
        const int channel = head * WIDTH + unit % T::kHeadUnits * kUnit;
        return channel + (part == 0 ? 2 : part - 1) * arguments.channels;
    };
    typename T::Core core(shared, arguments);
    Epilogue<T, WIDTH> epilogue(reinterpret_cast<__half*>(shared) + T::Core::kBytes / 2, arguments, first, last);
    core.start(units);
    wait_for_previous();

    const int across = (arguments.width + T::kColumns - 1) / T::kColumns;
    const int begin = static_cast<int>(blockIdx.y) * share_tiles, end = min(begin + share_tiles, tiles);
    __half* const target = v + int64_t{image} * arguments.height * arguments.width * arguments.channels + head * WIDTH;
    const auto row = [&](int tile) { return tile / across * T::kRows; };
    const auto column = [&](int tile) { return tile % across * T::kColumns; };
    const bool with_scores = last > T::kHeadUnits;
#pragma unroll 1
    for (int tile = begin;; ++tile) {
        if (tile < end) core.load(image, row(tile), column(tile));
        // While the pixels are on their way: the scores of the tile before.
        if (tile > begin && with_scores) epilogue.multiply();
        if (tile == end) break;
        epilogue.start(target, row(tile), column(tile));
        core.run((last - first + kUnits - 1) / kUnits, units, epilogue, [&] {
            if (tile + 1 < end) core.start(units);
        });
    }
    if (with_scores) {
        epilogue.store_sums(partials + (int64_t{blockIdx.x} * gridDim.y + blockIdx.y) * partial_size(WIDTH));
    }
}

// The tiles of an image, divided among blocks.  Without a look at the device's multiprocessors: the order of sums is
// the same on all that have room for the same tiles.
struct TileShares {
    int64_t tiles, count, per_share;
    int roles;
};

template <typename TILE>
TileShares share_tiles(int64_t all_heads, int64_t height, int64_t width) {
    constexpr int64_t kBlocks = kMultiprocessors * TILE::kBlocksAtOnce;
    static_assert(kBlocks <= kMostBlocks);
    TileShares shares;
    shares.tiles = ceil_div(height, TILE::kRows) * ceil_div(width, TILE::kColumns);
    shares.per_share = ceil_div(shares.tiles, std::max<int64_t>(1, kBlocks / all_heads));
    shares.count = ceil_div(shares.tiles, shares.per_share);
    shares.roles = 2 * all_heads * shares.count <= kBlocks ? 2 : 1;
    return shares;
}

// Returns launch(Tile<…>{}, WIDTH), the latter a constant, for heads of these sizes; false if there is no kernel for
// them.
template <typename Launch>
bool dispatch_tile(const Block& b, const Gpu& gpu, Launch launch) {
    const int64_t channels = b.channels();
    if (b.head_channels == 48) {
        using Wide = Tile<3, 48, true>;
        const int64_t tiles = b.batch * ceil_div(b.height, Wide::kRows) * ceil_div(b.width, Wide::kColumns);
        if (channels <= 48 && 4 * tiles >= 3 * kMultiprocessors && Wide::kSharedBytes <= gpu.shared_bytes) {
            return launch(Wide{}, Int<48>{});
        }
        if (channels <= 48) return launch(Tile<3, 48, false>{}, Int<48>{});
        if (channels <= 96) return launch(Tile<6, 48, false>{}, Int<48>{});
        if (channels <= 192) return launch(Tile<12, 48, false>{}, Int<48>{});
        if (channels <= 384) return launch(Tile<24, 48, false>{}, Int<48>{});
    } else if (b.head_channels == 96) {
        if (channels <= 96) return launch(Tile<6, 96, false>{}, Int<96>{});
        if (channels <= 192) return launch(Tile<12, 96, false>{}, Int<96>{});
        if (channels <= 384) return launch(Tile<24, 96, false>{}, Int<96>{});
    }
    return false;
}

// Where there is work enough for many blocks, the parts' kernels overtake: they do not make q, k and v of a halo.  Not
// so up to 48 channels, where memory weighs most.  Limits are those measured on Hopper, see docs/restormer-tuning.md.
bool parts_are_faster(const Block& b) {
    return b.channels() > 48 && b.batch * b.pixels() >= (b.channels() <= 96 ? 1 << 14 : 1 << 10);
}

// Whether the GPU has room for what the sizes need, too.
bool takes_tensor_cores(const Block& b, Gpu& gpu) {
    return b.type == DataType::kHalf && !find_gpu(gpu) && fits_residual_kernel(static_cast<int>(b.channels()), gpu) &&
           dispatch_tile(b, gpu, [&](auto tile, auto) { return decltype(tile)::kSharedBytes <= gpu.shared_bytes; });
}

int64_t v_bytes(const Block& b) { return aligned(b.batch * b.pixels() * b.channels() * 2); }

cudaError_t launch_fused(const Block& b, const Gpu& gpu, cudaStream_t stream) {
    const int64_t all_heads = b.batch * b.heads;
    auto* const v = reinterpret_cast<__half*>(b.workspace);
    auto* const partials = reinterpret_cast<float*>(b.workspace + v_bytes(b));
    const auto half = [](const void* pointer) { return static_cast<const __half*>(pointer); };
    const NormConvDepthwiseArguments arguments = {half(b.x),
                                                  half(b.norm_weight),
                                                  half(b.norm_bias),
                                                  half(b.qkv_weight),
                                                  half(b.qkv_bias),
                                                  half(b.depthwise_weight),
                                                  half(b.depthwise_bias),
                                                  static_cast<int>(b.channels()),
                                                  static_cast<int>(b.height),
                                                  static_cast<int>(b.width),
                                                  b.epsilon,
                                                  b.subtract_mean != 0};
    cudaError_t error = cudaErrorInvalidValue;
    int64_t count = 0;
    dispatch_tile(b, gpu, [&](auto tile, auto width) {
        using T = decltype(tile);
        const TileShares shares = share_tiles<T>(all_heads, b.height, b.width);
        count = shares.count;
        const dim3 grid(all_heads, count, shares.roles);
        error = launch_dependent(qkv_kernel<T, decltype(width)::value>, grid, T::kThreads, T::kSharedBytes, stream,
                                 arguments, v, partials, static_cast<int>(b.heads), static_cast<int>(shares.tiles),
                                 static_cast<int>(shares.per_share));
        return true;
    });
    if (error) return error;
    return launch_behind_gram(v, b.temperature, b.weight, b.bias, b.x, b.y, partials, count, b.batch, b.heads,
                              b.head_channels, b.pixels(), stream);
}

int64_t fused_workspace_bytes(const Block& b) {
    const int64_t all_heads = b.batch * b.heads, width = b.head_channels;
    // The smallest tiles, of which there are the most.
    const int64_t tiles = share_tiles<Tile<3, 48, false>>(1, b.height, b.width).tiles;
    // A bound for all_heads · share_tiles(…).count, which itself goes up and down.
    const int64_t shares = std::min(all_heads * tiles, std::max(all_heads, kMostBlocks));
    return v_bytes(b) + shares * partial_size(width) * sizeof(float) + all_heads * width * width * sizeof(__half);
}

}  // namespace

int64_t transposed_attention_block_workspace_bytes(DataType type, int64_t batch, int64_t heads, int64_t head_channels,
                                                   int64_t height, int64_t width) {
    if (batch * heads * head_channels * height * width == 0) return 0;
    Block block = {};
    block.type = type;
    block.batch = batch;
    block.heads = heads;
    block.head_channels = head_channels;
    block.height = height;
    block.width = width;
    Gpu gpu;
    const int64_t fused = takes_tensor_cores(block, gpu) ? fused_workspace_bytes(block) : 0;
    // Smaller images may go another way than the largest.
    return std::max(fused, parts_workspace_bytes(block));
}

cudaError_t launch_transposed_attention_block(DataType type, const void* x, const void* norm_weight,
                                              const void* norm_bias, const void* qkv_weight, const void* qkv_bias,
                                              const void* depthwise_weight, const void* depthwise_bias,
                                              const void* temperature, const void* weight, const void* bias, void* y,
                                              void* workspace, int64_t batch, int64_t heads, int64_t head_channels,
                                              int64_t height, int64_t width, float epsilon, int32_t subtract_mean,
                                              cudaStream_t stream) {
    if (batch * heads * head_channels * height * width == 0) return cudaSuccess;
    if (std::max(height, width) > INT32_MAX / 2) return cudaErrorInvalidValue;
    const Block block = {type,
                         x,
                         norm_weight,
                         norm_bias,
                         qkv_weight,
                         qkv_bias,
                         depthwise_weight,
                         depthwise_bias,
                         temperature,
                         weight,
                         bias,
                         y,
                         static_cast<char*>(workspace),
                         batch,
                         heads,
                         head_channels,
                         height,
                         width,
                         epsilon,
                         subtract_mean};
    Gpu gpu;
    if (takes_tensor_cores(block, gpu) && batch <= UINT16_MAX && !parts_are_faster(block)) {
        return launch_fused(block, gpu, stream);
    }
    return launch_parts(block, stream);
}

}  // namespace trt_graft
