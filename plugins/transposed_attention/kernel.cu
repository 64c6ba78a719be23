// Attention between the channels of an image, which are neighbours in memory.
//
// Floor: q, k and v are read once and y written once.  Scores need all pixels, so there are three kernels: gram and
// softmax, see gram.cuh, and
//
//   mix      per head and tile of pixels: v · attentionᵀ  → y
//
// mix exists twice, as gram does.  On tensor cores, warps work on their own, with neither shared memory nor barriers.
// Which channel is which row or column of a fragment is free, so it is such that lanes load and store packs.  softmax
// leaves the attention in fragments, and a warp keeps it in registers.
#include "transposed_attention/gram.cuh"
#include "transposed_attention/kernel.cuh"

namespace trt_graft {
namespace {

template <typename T>
__device__ T* find_y(T* y, const HeadShape& shape) {
    return y + blockIdx.x / shape.heads * shape.pixels * shape.y_pitch + blockIdx.x % shape.heads * shape.channels;
}

// ---- Tensor cores ---------------------------------------------------------------------------------------------------

// A lane's part of WIDTH channels of a pixel: of each 32, those from 8·pair on, and of the last 16, if any, those from
// 4·pair on.  Each word has two of them, and is what the lane contributes to a pack of 8 rows or columns of fragments.
template <int WIDTH>
struct Part {
    static constexpr int kWide = WIDTH / 32 * 32;  // channels in packs of 8
    Pack<uint32_t, 4> packs[WIDTH / 32];
    Pack<uint32_t, 2> last;

    __device__ uint32_t& word(int n) { return n < kWide / 8 ? packs[n / 4].values[n % 4] : last.values[n - kWide / 8]; }

    // Which word of which lane has a channel, and whether it is the first or second in it.
    struct Place {
        int word, pair, half;
    };
    static __device__ Place find(int channel) {
        if (channel < kWide) return {channel / 32 * 4 + channel % 8 / 2, channel % 32 / 8, channel % 2};
        const int rest = channel - kWide;
        return {kWide / 8 + rest % 4 / 2, rest / 4, rest % 2};
    }

    // Zeros for channels that do not exist.
    __device__ void load(const __half* pixel, int pair, int channels) {
        const int first = pair * 8, rest = kWide + pair * 4;
        for (int n = 0; n < WIDTH / 32; ++n) {
            packs[n] = {};
            if (n * 32 + first < channels) packs[n] = load_pack<4>(as_words(pixel + n * 32 + first));
        }
        last = {};
        if (kWide < WIDTH && rest < channels) last = load_pack<2>(as_words(pixel + rest));
    }

    // With the intrinsic, 16 bytes are one store: of store_pack the compiler makes four here.
    __device__ void store(__half* pixel, int pair, int channels) const {
        const int first = pair * 8, rest = kWide + pair * 4;
        for (int n = 0; n < WIDTH / 32; ++n) {
            const auto& [a, b, c, d] = packs[n].values;
            auto* target = reinterpret_cast<uint4*>(pixel + n * 32 + first);
            if (n * 32 + first < channels) __stwb(target, make_uint4(a, b, c, d));
        }
        if (kWide < WIDTH && rest < channels) store_pack(as_words(pixel + rest), last);
    }

  private:
    static __device__ const uint32_t* as_words(const __half* channel) {
        return reinterpret_cast<const uint32_t*>(channel);
    }
    static __device__ uint32_t* as_words(__half* channel) { return reinterpret_cast<uint32_t*>(channel); }
};

// How mix works on WIDTH channels.  A warp takes kTile pixels at a time and makes kColumns channels of y, so many that
// its attention fits into registers.
template <int WIDTH>
struct Mix {
    static constexpr int kTile = 16;
    static constexpr int kColumns = WIDTH == 128 ? 32 : 48;
    static constexpr int kParts = WIDTH / kColumns;
    static constexpr int kThreads = 128;
    static constexpr int kTiles = kThreads / 32 / kParts;  // of a block at a time
    static constexpr int kBlocks = WIDTH <= 48 ? 4 : 3;    // of a multiprocessor
    // The transposed attention of a warp, as fragments b: [16 rows][8 columns][half a fragment].
    static constexpr int kWords = WIDTH / 16 * kColumns / 8 * 2;

    // Blocks for a head: no more than are resident at once, so that each loads its attention for many tiles.
    static int64_t blocks(int64_t all_heads, int64_t pixels) {
        const int64_t wanted = std::max<int64_t>(kMultiprocessors * kBlocks / all_heads, 1);
        const int64_t turns = ceil_div(pixels, kTiles * kTile);  // of one block, were it alone
        return ceil_div(turns, ceil_div(turns, wanted));
    }

    // Where softmax puts an element of a head's attention: [part][word / 4][lane][word % 4][half a word].
    using Element = __half;
    static __device__ int place(int row, int column) {
        const auto in = Part<WIDTH>::find(column);
        const auto out = Part<kColumns>::find(row % kColumns);
        const int word = (in.word / 2 * (kColumns / 8) + out.word) * 2 + in.word % 2;
        const int lane = (out.pair * 2 + out.half) * 4 + in.pair;
        return (((row / kColumns * (kWords / 4) + word / 4) * 32 + lane) * 4 + word % 4) * 2 + in.half;
    }
};

template <int WIDTH>
__global__ void __launch_bounds__(Mix<WIDTH>::kThreads, Mix<WIDTH>::kBlocks)
    mix_kernel(const __half* __restrict__ qkv, const __half* __restrict__ attention, __half* y, HeadShape shape) {
    using M = Mix<WIDTH>;
    const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
    const int part = threadIdx.x / 32 % M::kParts;
    const __half* v = find_q(qkv, shape) + 2 * shape.distance;
    y = find_y(y, shape) + part * M::kColumns;

    // The lane's rows of a tile are its pixels group and group + 8.
    const auto load = [&](Part<WIDTH>(&rows)[2], int64_t first) {
        for (int half = 0; half < 2; ++half) {
            const int64_t pixel = first + group + half * 8;
            rows[half].load(v + pixel * shape.qkv_pitch, pair, pixel < shape.pixels ? shape.channels : 0);
        }
    };
    const int64_t stride = int64_t{gridDim.y} * M::kTiles * M::kTile;
    int64_t first = (int64_t{blockIdx.y} * M::kTiles + threadIdx.x / 32 / M::kParts) * M::kTile;
    Part<WIDTH> next[2];
    load(next, first);

    uint32_t weights[M::kWords];
    const auto* packs = reinterpret_cast<const uint32_t*>(attention + int64_t{blockIdx.x} * WIDTH * WIDTH);
    packs += (part * (M::kWords / 4) * 32 + lane) * 4;
#pragma unroll
    for (int word = 0; word < M::kWords; word += 4) {
        const auto pack = load_pack<4>(packs + word * 32);
        for (int n = 0; n < 4; ++n) weights[word + n] = pack.values[n];
    }

    for (; first < shape.pixels; first += stride) {
        Part<WIDTH> rows[2] = {next[0], next[1]};
        load(next, first + stride);  // arrives while this tile is multiplied and written
        float sums[M::kColumns / 8][4] = {};
#pragma unroll
        for (int step = 0; step < WIDTH / 16; ++step) {
            const uint32_t a[] = {rows[0].word(2 * step), rows[1].word(2 * step), rows[0].word(2 * step + 1),
                                  rows[1].word(2 * step + 1)};
#pragma unroll
            for (int j = 0; j < M::kColumns / 8; ++j) {
                const uint32_t* b = weights + (step * (M::kColumns / 8) + j) * 2;
                multiply_add(sums[j], a, b[0], b[1]);
            }
        }
        for (int half = 0; half < 2; ++half) {
            const int64_t pixel = first + group + half * 8;
            Part<M::kColumns> result;
#pragma unroll
            for (int j = 0; j < M::kColumns / 8; ++j) {
                result.word(j) = as_word(__floats2half2_rn(sums[j][2 * half], sums[j][2 * half + 1]));
            }
            result.store(y + pixel * shape.y_pitch, pair,
                         pixel < shape.pixels ? shape.channels - part * M::kColumns : 0);
        }
    }
}

template <int WIDTH>
struct PlainMix {
    static constexpr int kThreads = 256;
    static constexpr int kPixels = 64;  // of a tile

    static int64_t blocks(int64_t, int64_t pixels) {
        return std::min<int64_t>(ceil_div(pixels, kPixels), UINT16_MAX);  // as many as a grid takes
    }

    // Where softmax puts an element of a head's attention: transposed.
    using Element = float;
    static __device__ int place(int row, int column) { return column * WIDTH + row; }
};

template <typename T, int WIDTH, bool ALIGNED>
__global__ void __launch_bounds__(PlainMix<WIDTH>::kThreads, 2)
    plain_mix_kernel(const T* qkv, const float* __restrict__ attention, T* y, HeadShape shape) {
    using M = PlainMix<WIDTH>;
    constexpr int kPacks = WIDTH / 4;
    constexpr int kDown = M::kPixels / 4;  // a thread has the pixels down, down + kDown, …, and 4 channels
    __shared__ alignas(16) float tile[M::kPixels][WIDTH + 4];
    const T* v = find_q(qkv, shape) + 2 * shape.distance;
    T* target = find_y(y, shape);
    attention += int64_t{blockIdx.x} * WIDTH * WIDTH;
    const int padding = blockIdx.x % shape.heads == shape.heads - 1 ? shape.y_pitch - shape.distance : 0;

    for (int64_t first = int64_t{blockIdx.y} * M::kPixels; first < shape.pixels;
         first += int64_t{gridDim.y} * M::kPixels) {
        __syncthreads();  // the tile before is no longer read
        for (int i = threadIdx.x; i < M::kPixels * kPacks; i += M::kThreads) {
            const int64_t pixel = first + i / kPacks;
            const int channel = i % kPacks * 4;
            store_pack(&tile[i / kPacks][channel],
                       load_channels<ALIGNED>(v + pixel * shape.qkv_pitch + channel,
                                              pixel < shape.pixels ? shape.channels - channel : 0));
        }
        __syncthreads();
        for (int i = threadIdx.x; i < kDown * kPacks; i += M::kThreads) {
            const int channel = i % kPacks * 4, down = i / kPacks;
            if (channel >= shape.channels) continue;
            Pack<float, 4> sums[4] = {};
            for (int k = 0; k < shape.channels; k += 4) {
                Pack<float, 4> weights[4], values[4];
                for (int n = 0; n < 4; ++n) {
                    weights[n] = load_pack<4>(attention + (k + n) * WIDTH + channel);
                    values[n] = load_pack<4>(&tile[down + n * kDown][k]);
                }
                for (int e = 0; e < 4; ++e) {
                    for (int p = 0; p < 4; ++p) {
                        for (int n = 0; n < 4; ++n) sums[p].values[n] += values[p].values[e] * weights[e].values[n];
                    }
                }
            }
            for (int p = 0; p < 4; ++p) {
                const int64_t pixel = first + down + p * kDown;
                if (pixel >= shape.pixels) continue;
                Pack<T, 4> rounded;
                for (int n = 0; n < 4; ++n) rounded.values[n] = from_float<T>(sums[p].values[n]);
                T* pack = target + pixel * shape.y_pitch + channel;
                if constexpr (ALIGNED) {
                    store_pack(pack, rounded);
                } else {
                    for (int n = 0; n < 4; ++n) {
                        if (channel + n < shape.channels) pack[n] = rounded.values[n];
                    }
                }
            }
        }
        if (threadIdx.x < M::kPixels && first + threadIdx.x < shape.pixels) {
            for (int n = 0; n < padding; ++n) {
                target[(first + threadIdx.x) * shape.y_pitch + shape.channels + n] = from_float<T>(0);
            }
        }
    }
}

}  // namespace

int64_t transposed_attention_workspace_bytes(int64_t batch, int64_t heads, int64_t head_channels, int64_t pixels) {
    if (batch * heads * head_channels * pixels == 0) return 0;
    const int64_t width = padded(head_channels), all_heads = batch * heads;
    // A bound for all_heads · share(…).count, which itself goes up and down.
    const int64_t shares =
        std::min(all_heads * ceil_div(pixels, kShareUnit), std::max(all_heads, 2 * kMultiprocessors));
    return (shares * partial_size(width) + all_heads * width * width) * sizeof(float);
}

cudaError_t launch_transposed_attention(DataType type, const void* qkv, const void* temperature, void* y,
                                        void* workspace, int64_t batch, int64_t heads, int64_t head_channels,
                                        int64_t pixels, cudaStream_t stream) {
    if (batch * heads * head_channels * pixels == 0) return cudaSuccess;
    const int64_t all_heads = batch * heads, channels = heads * head_channels;
    if (head_channels > kMaxChannels || all_heads > INT32_MAX / kMaxChannels) return cudaErrorInvalidValue;
    const HeadShape shape{
        static_cast<int>(heads), static_cast<int>(head_channels), channels, pixels, pitch(type, 3 * channels),
        pitch(type, channels)};

    return dispatch(type, [&](auto tag) {
        using T = decltype(tag);
        const Scores<T> scores(qkv, temperature, workspace, shape, batch);
        dispatch_heads<T>(head_channels, [&](auto width, auto aligned) {
            constexpr int kWidth = decltype(width)::value;
            constexpr bool kAligned = decltype(aligned)::value;
            constexpr bool kTensorCores = kAligned && std::is_same_v<T, __half>;
            using M = std::conditional_t<kTensorCores, Mix<kWidth>, PlainMix<kWidth>>;
            T* output = static_cast<T*>(y);
            auto* attention = reinterpret_cast<typename M::Element*>(scores.behind());
            scores.template launch<kWidth, kAligned, M>(attention, stream);
            const dim3 mix_grid(all_heads, M::blocks(all_heads, pixels));
            if constexpr (kTensorCores) {
                mix_kernel<kWidth><<<mix_grid, M::kThreads, 0, stream>>>(scores.qkv, attention, output, shape);
            } else {
                plain_mix_kernel<T, kWidth, kAligned>
                    <<<mix_grid, M::kThreads, 0, stream>>>(scores.qkv, attention, output, shape);
            }
        });
    });
}

}  // namespace trt_graft
