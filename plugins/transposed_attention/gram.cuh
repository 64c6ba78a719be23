// What comes before the product with v in attention between channels: the scores of each head, in two kernels.
//
//   gram     per head and share of the pixels: qᵀ · k, Σq² and Σk²  → workspace, in FP32
//   softmax  per row of a head's scores: sum of the shares, normalisation, softmax  → workspace
//
// Floor: q and k are read once.  They are never normalised themselves: dividing the products by both norms is the same,
// and needs no second pass.  There are no atomics; sums are taken in an order that depends on sizes only, so results
// repeat bit by bit.
//
// gram exists twice.  FP16 heads of whole packs of 16 bytes go through tensor cores, which are faster than memory, so
// that what counts is how much is on its way.  A share leaves products that are memory traffic as well, so there is one
// block for each multiprocessor, or two.  Each has about 36 KB in flight: asynchronous copies into a ring of tiles.
// Pixels are the inner dimension of the product and the rows of a tile, which transposing loads turn into fragments.
//
// All others, FP32 above all, multiply and add on the ordinary units, whose speed is then the limit.
#pragma once

#include <cuda_pipeline.h>

#include <algorithm>
#include <type_traits>

#include "common/dependent_launch.cuh"
#include "common/kernel.cuh"
#include "common/tensor_core.cuh"

namespace trt_graft {

constexpr int kMaxChannels = 128;
constexpr int64_t kMultiprocessors = 132;  // of an H200
constexpr int64_t kShareUnit = 64;         // pixels; a multiple of gram's tiles

// Channels of a head as the kernels see them: absent ones are zeros.  48 and 96 are Restormer's.
constexpr int padded(int64_t channels) { return channels <= 48 ? 48 : channels <= 96 ? 96 : kMaxChannels; }

// What gram leaves behind: qᵀ · k (width, width), Σq² (width), Σk² (width).
__host__ __device__ constexpr int64_t partial_size(int64_t width) { return width * width + 2 * width; }

// The pixels of a head, divided among blocks.  Without a look at the device: the order of sums is the same on each.
struct Shares {
    int64_t count, pixels;
};

inline Shares share(int64_t all_heads, int64_t pixels) {
    // Two blocks for each multiprocessor where they have work enough, about a thousand pixels each.
    const int64_t blocks = std::clamp(all_heads * pixels / 1024, kMultiprocessors, 2 * kMultiprocessors);
    const int64_t wanted = std::max<int64_t>(blocks / all_heads, 1);
    const int64_t per_block = ceil_div(ceil_div(pixels, kShareUnit), wanted) * kShareUnit;
    return {ceil_div(pixels, per_block), per_block};
}

struct HeadShape {
    int heads, channels;  // channels of a head
    int64_t distance;     // from q to k, and from k to v
    int64_t pixels, qkv_pitch, y_pitch;
};

// Each block has one head of one image: where it begins.
template <typename T>
__device__ const T* find_q(const T* qkv, const HeadShape& shape) {
    return qkv + blockIdx.x / shape.heads * shape.pixels * shape.qkv_pitch + blockIdx.x % shape.heads * shape.channels;
}

// ---- Tensor cores ---------------------------------------------------------------------------------------------------

// How gram works on q and k of WIDTH channels each.
template <int WIDTH>
struct Gram {
    static constexpr int kPack = 8;
    static constexpr int kPacks = 2 * WIDTH / kPack;       // in a row of a tile: q, then k
    static constexpr int kPixels = WIDTH <= 48 ? 64 : 32;  // rows
    static constexpr int kTile = kPixels * 2 * WIDTH;
    static constexpr int kTiles = 48 * 1024 / (kTile * sizeof(__half));
    // Of the product, a warp has kHeight · 16 rows and kBreadth · 8 columns.
    static constexpr int kHeight = WIDTH <= 48 ? 1 : 2;
    static constexpr int kBreadth = WIDTH / 16;
    static constexpr int kWarpsDown = WIDTH / (kHeight * 16);
    static constexpr int kThreads = kWarpsDown * 2 * 32;
    // A thread copies the same pack of every kRowsAtOnce-th row.
    static constexpr int kRowsAtOnce = kThreads / kPacks;
    static constexpr int kCopies = kPixels / kRowsAtOnce;
    static_assert(kThreads % kPacks == 0 && kPixels % kRowsAtOnce == 0 && kThreads >= 2 * WIDTH);

    // Where a row has a pack: eight neighbouring rows have it in different banks.
    static __device__ int offset(int row, int pack) {
        return (row * kPacks + (pack ^ (kPacks % 8 == 0 ? row % 8 : row / 2 % 4))) * kPack;
    }
};

template <int WIDTH>
__global__ void __launch_bounds__(Gram<WIDTH>::kThreads, 1)
    gram_kernel(const __half* qkv, float* partials, HeadShape shape, int64_t share_pixels) {
    using G = Gram<WIDTH>;
    __shared__ alignas(16) __half tiles[G::kTiles][G::kTile];
    allow_dependents();
    wait_for_previous();
    const int64_t first = blockIdx.y * share_pixels;
    const int64_t size = share_pixels < shape.pixels - first ? share_pixels : shape.pixels - first;
    const int count = ceil_div(size, G::kPixels);

    const int pack = threadIdx.x % G::kPacks, row = threadIdx.x / G::kPacks;
    const int channel = pack % (WIDTH / G::kPack) * G::kPack;
    const __half* source = find_q(qkv, shape) + (first + row) * shape.qkv_pitch + channel;
    if (pack >= WIDTH / G::kPack) source += shape.distance;
    const int64_t step = G::kRowsAtOnce * shape.qkv_pitch;
    int64_t left = channel < shape.channels ? size - row : 0;  // pixels from `source` on that exist

    // Starts to copy tile n; calls come in order.
    const auto copy = [&](int n) {
        if (n < count) {
            __half* target = tiles[n % G::kTiles];
#pragma unroll
            for (int i = 0; i < G::kCopies; ++i) {
                copy_or_clear(target + G::offset(row + i * G::kRowsAtOnce, pack), source, i * G::kRowsAtOnce < left);
                source += step;
            }
            left -= G::kPixels;
        }
        __pipeline_commit();
    };
    for (int n = 0; n < G::kTiles - 1; ++n) copy(n);

    const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
    const int down = threadIdx.x / 32 % G::kWarpsDown * G::kHeight;
    const int across = threadIdx.x / 32 / G::kWarpsDown * G::kBreadth;
    float products[G::kHeight][G::kBreadth][4] = {};
    float squares[G::kPack] = {};  // of the pack that this thread copies
    for (int n = 0; n < count; ++n) {
        __pipeline_wait_prior(G::kTiles - 2);
        __syncthreads();  // the tile has arrived for all, and nobody reads the one before it any more
        copy(n + G::kTiles - 1);
        const __half* tile = tiles[n % G::kTiles];
#pragma unroll
        for (int pixel = 0; pixel < G::kPixels; pixel += 32) {
            uint32_t q[2][G::kHeight][4];  // fragments a of qᵀ, for the first and the next 16 pixels
            for (int half = 0; half < 2; ++half) {
                for (int i = 0; i < G::kHeight; ++i) {
                    const int from = pixel + half * 16 + lane / 16 * 8 + lane % 8;
                    load_matrices_transposed(q[half][i], tile + G::offset(from, (down + i) * 2 + lane / 8 % 2));
                }
            }
            for (int j = 0; j < G::kBreadth; ++j) {
                uint32_t k[4];  // two fragments b
                load_matrices_transposed(k, tile + G::offset(pixel + lane, G::kPacks / 2 + across + j));
                for (int half = 0; half < 2; ++half) {
                    for (int i = 0; i < G::kHeight; ++i) {
                        multiply_add(products[i][j], q[half][i], k[2 * half], k[2 * half + 1]);
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < G::kCopies; ++i) {
            const auto values = load_pack<G::kPack>(tile + G::offset(row + i * G::kRowsAtOnce, pack));
            for (int e = 0; e < G::kPack; ++e) squares[e] += to_float(values.values[e]) * to_float(values.values[e]);
        }
    }

    float* partial = partials + (int64_t{blockIdx.x} * gridDim.y + blockIdx.y) * partial_size(WIDTH);
    for (int i = 0; i < G::kHeight; ++i) {
        for (int j = 0; j < G::kBreadth; ++j) {
            float* corner = partial + ((down + i) * 16 + group) * WIDTH + (across + j) * 8 + 2 * pair;
            store_pack(corner, Pack<float, 2>{{products[i][j][0], products[i][j][1]}});
            store_pack(corner + 8 * WIDTH, Pack<float, 2>{{products[i][j][2], products[i][j][3]}});
        }
    }
    __syncthreads();  // the tiles make way
    float* sums = reinterpret_cast<float*>(tiles);
    for (int e = 0; e < G::kPack; ++e) sums[row * 2 * WIDTH + pack * G::kPack + e] = squares[e];
    __syncthreads();
    if (threadIdx.x < 2 * WIDTH) {
        float sum = 0;
        for (int r = 0; r < G::kRowsAtOnce; ++r) sum += sums[r * 2 * WIDTH + threadIdx.x];
        partial[WIDTH * WIDTH + threadIdx.x] = sum;
    }
}

// ---- Multiply-adds in FP32 ------------------------------------------------------------------------------------------

// Four channels in FP32, zeros behind the first `channels`.  Where packs are aligned, all four exist or none.
template <bool ALIGNED, typename T>
__device__ Pack<float, 4> load_channels(const T* source, int channels) {
    Pack<T, 4> pack = {};
    if constexpr (ALIGNED) {
        if (channels > 0) pack = load_pack<4>(source);
    } else {
        for (int n = 0; n < 4; ++n) {
            if (n < channels) pack.values[n] = source[n];
        }
    }
    Pack<float, 4> values;
    for (int n = 0; n < 4; ++n) values.values[n] = to_float(pack.values[n]);
    return values;
}

// How gram works on q and k of WIDTH channels each.  Threads fall into groups, which share out the pixels of a tile.
template <int WIDTH>
struct PlainGram {
    static constexpr int kThreads = 512;
    static constexpr int kPixels = WIDTH <= 96 ? 32 : 16;  // of a tile
    static constexpr int kPacks = 2 * WIDTH / 4;           // of a pixel: q, then k
    static constexpr int kCopies = ceil_div(kPixels * kPacks, kThreads);
    // A thread has kBlocks × kBlocks blocks of 4 × 4 products, kDistance apart.
    static constexpr int kBlocks = WIDTH <= 48 ? 1 : 2;
    static constexpr int kDistance = WIDTH / kBlocks;
    static constexpr int kSide = kDistance / 4;                 // of the square of threads that make all products
    static constexpr int kGroups = kThreads / (kSide * kSide);  // threads may be left over
};

template <typename T, int WIDTH, bool ALIGNED>
__global__ void __launch_bounds__(PlainGram<WIDTH>::kThreads, 1)
    plain_gram_kernel(const T* qkv, float* partials, HeadShape shape, int64_t share_pixels) {
    using G = PlainGram<WIDTH>;
    __shared__ alignas(16) float tile[G::kPixels][2 * WIDTH];
    const int64_t first = blockIdx.y * share_pixels;
    const int64_t end = first + share_pixels < shape.pixels ? first + share_pixels : shape.pixels;
    const T* q = find_q(qkv, shape);

    // A tile on its way; until the one before it is done with, it stays in registers.
    Pack<float, 4> packs[G::kCopies];
    const auto load = [&](int64_t first_pixel) {
#pragma unroll
        for (int n = 0; n < G::kCopies; ++n) {
            const int i = n * G::kThreads + threadIdx.x;
            const int column = i % G::kPacks * 4, channel = column % WIDTH;
            const int64_t pixel = first_pixel + i / G::kPacks;
            const bool exists = i < G::kPixels * G::kPacks && pixel < end;
            const T* source = q + pixel * shape.qkv_pitch + channel;
            packs[n] = load_channels<ALIGNED>(column < WIDTH ? source : source + shape.distance,
                                              exists ? shape.channels - channel : 0);
        }
    };
    const int place = threadIdx.x % (G::kSide * G::kSide), group = threadIdx.x / (G::kSide * G::kSide);
    const int down = place / G::kSide * 4, across = place % G::kSide * 4;
    float products[G::kBlocks][G::kBlocks][4][4] = {};
    float squares = 0;  // of channel threadIdx.x

    load(first);
    for (int64_t pixel = first; pixel < end; pixel += G::kPixels) {
        __syncthreads();  // the tile before is no longer read
#pragma unroll
        for (int n = 0; n < G::kCopies; ++n) {
            const int i = n * G::kThreads + threadIdx.x;
            if (i < G::kPixels * G::kPacks) store_pack(&tile[i / G::kPacks][i % G::kPacks * 4], packs[n]);
        }
        __syncthreads();
        load(pixel + G::kPixels);
        if (threadIdx.x < 2 * WIDTH) {
            for (const auto& row : tile) squares += row[threadIdx.x] * row[threadIdx.x];
        }
        if (group >= G::kGroups) continue;
        for (int row = group; row < G::kPixels; row += G::kGroups) {
            Pack<float, 4> q_packs[G::kBlocks], k_packs[G::kBlocks];
            for (int b = 0; b < G::kBlocks; ++b) {
                q_packs[b] = load_pack<4>(&tile[row][b * G::kDistance + down]);
                k_packs[b] = load_pack<4>(&tile[row][WIDTH + b * G::kDistance + across]);
            }
            for (int r = 0; r < G::kBlocks; ++r) {
                for (int c = 0; c < G::kBlocks; ++c) {
                    for (int i = 0; i < 4; ++i) {
                        for (int j = 0; j < 4; ++j) {
                            products[r][c][i][j] += q_packs[r].values[i] * k_packs[c].values[j];
                        }
                    }
                }
            }
        }
    }

    float* partial = partials + (int64_t{blockIdx.x} * gridDim.y + blockIdx.y) * partial_size(WIDTH);
    for (int turn = 0; turn < G::kGroups; ++turn) {  // one group after the other
        for (int n = 0; n < G::kBlocks * G::kBlocks * 4 && turn == group; ++n) {
            const int r = n / 4 / G::kBlocks, c = n / 4 % G::kBlocks, i = n % 4;
            float* target = partial + (r * G::kDistance + down + i) * WIDTH + c * G::kDistance + across;
            Pack<float, 4> sums = {};
            if (turn > 0) sums = load_pack<4>(target);
            for (int j = 0; j < 4; ++j) sums.values[j] += products[r][c][i][j];
            store_pack(target, sums);
        }
        __syncthreads();
    }
    if (threadIdx.x < 2 * WIDTH) partial[WIDTH * WIDTH + threadIdx.x] = squares;
}

// ---- Both -----------------------------------------------------------------------------------------------------------

// A block has one row of scores: WIDTH products, Σk² of all channels and Σq² of its own.  Threads load packs of four.
template <int WIDTH>
struct Softmax {
    static constexpr int kPacks = 2 * WIDTH / 4 + 1;
    static constexpr int kGroups = WIDTH <= 96 ? 16 : 15;  // the threads' shares of the shares
    static constexpr int kThreads = ceil_div(kGroups * kPacks, 32) * 32;
    // Blocks of a multiprocessor, whose registers are to suffice for as many as it has room for.
#if __CUDA_ARCH__ == 750
    static constexpr int kBlocks = 1024 / kThreads;
#else
    static constexpr int kBlocks = 1536 / kThreads;
#endif
};

template <typename T, int WIDTH, typename M>
__global__ void __launch_bounds__(Softmax<WIDTH>::kThreads, Softmax<WIDTH>::kBlocks)
    softmax_kernel(const float* __restrict__ partials, const T* __restrict__ temperature,
                   typename M::Element* attention, int heads, int channels, int shares) {
    using S = Softmax<WIDTH>;
    constexpr int kAtOnce = 8;  // loads on their way
    __shared__ alignas(16) float sums[S::kGroups][S::kPacks * 4], totals[S::kPacks * 4];
    allow_dependents();
    wait_for_previous();
    const T scale = temperature[blockIdx.x % heads];
    const int row = blockIdx.y;
    const int pack = threadIdx.x % S::kPacks, group = threadIdx.x / S::kPacks;
    if (group < S::kGroups) {
        int offset = pack * 4 + row * WIDTH;                              // products
        if (pack >= WIDTH / 4) offset = WIDTH * WIDTH + pack * 4;         // Σk², which follows Σq²
        if (pack == S::kPacks - 1) offset = WIDTH * WIDTH + row / 4 * 4;  // Σq²
        const float* partial = partials + int64_t{blockIdx.x} * shares * partial_size(WIDTH) + offset;
        Pack<float, 4> sum = {};
        for (int first = group; first < shares; first += kAtOnce * S::kGroups) {
            Pack<float, 4> packs[kAtOnce] = {};
#pragma unroll
            for (int n = 0; n < kAtOnce; ++n) {
                if (first + n * S::kGroups < shares) {
                    packs[n] = load_pack<4>(partial + (first + n * S::kGroups) * partial_size(WIDTH));
                }
            }
#pragma unroll
            for (int n = 0; n < kAtOnce; ++n) {
                for (int e = 0; e < 4; ++e) sum.values[e] += packs[n].values[e];
            }
        }
        store_pack(&sums[group][pack * 4], sum);
    }
    __syncthreads();
    if (threadIdx.x < S::kPacks * 4) {
        float total = 0;
#pragma unroll
        for (int g = 0; g < S::kGroups; ++g) total += sums[g][threadIdx.x];
        totals[threadIdx.x] = total;
    }
    __syncthreads();
    if (threadIdx.x >= 32) return;

    constexpr int kPerLane = ceil_div(WIDTH, 32);
    const float q_norm = fmaxf(sqrtf(totals[2 * WIDTH + row % 4]), 1e-12f);
    float scores[kPerLane];
    float largest = -INFINITY;
    for (int n = 0; n < kPerLane; ++n) {
        const int column = n * 32 + threadIdx.x;
        scores[n] = -INFINITY;
        if (column < channels) {
            scores[n] = totals[column] / q_norm / fmaxf(sqrtf(totals[WIDTH + column]), 1e-12f) * to_float(scale);
        }
        largest = fmaxf(largest, scores[n]);
    }
    largest = warp_max(largest);
    float total = 0;
    for (float& score : scores) total += score = expf(score - largest);
    total = warp_sum(total);
    attention += int64_t{blockIdx.x} * WIDTH * WIDTH;
    for (int n = 0; n < kPerLane; ++n) {
        const int column = n * 32 + threadIdx.x;
        // zeros in the columns of absent channels
        if (column < WIDTH) attention[M::place(row, column)] = from_float<typename M::Element>(scores[n] / total);
    }
}

// What both kernels work on.  Errors of their launches are left to cudaGetLastError.
template <typename T>
struct Scores {
    const T *qkv, *temperature;
    float* partials;  // where gram leaves its sums
    HeadShape shape;
    Shares shares;
    int64_t all_heads;

    Scores(const void* qkv, const void* temperature, void* workspace, const HeadShape& shape, int64_t batch)
        : qkv(static_cast<const T*>(qkv)),
          temperature(static_cast<const T*>(temperature)),
          partials(static_cast<float*>(workspace)),
          shape(shape),
          shares(share(batch * shape.heads, shape.pixels)),
          all_heads(batch * shape.heads) {}

    // The memory behind gram's sums.
    float* behind() const { return partials + all_heads * shares.count * partial_size(padded(shape.channels)); }

    template <int WIDTH, bool ALIGNED>
    void launch_gram(cudaStream_t stream) const {
        const dim3 grid(all_heads, shares.count);
        if constexpr (ALIGNED && std::is_same_v<T, __half>) {
            launch_dependent(gram_kernel<WIDTH>, grid, Gram<WIDTH>::kThreads, 0, stream, qkv, partials, shape,
                             shares.pixels);
        } else {
            plain_gram_kernel<T, WIDTH, ALIGNED>
                <<<grid, PlainGram<WIDTH>::kThreads, 0, stream>>>(qkv, partials, shape, shares.pixels);
        }
    }

    // M says where an element of a head's attention goes, M::place, and its type, M::Element.
    template <int WIDTH, typename M>
    void launch_softmax(typename M::Element* attention, cudaStream_t stream) const {
        launch_dependent(softmax_kernel<T, WIDTH, M>, dim3(all_heads, WIDTH), Softmax<WIDTH>::kThreads, 0, stream,
                         partials, temperature, attention, shape.heads, shape.channels, static_cast<int>(shares.count));
    }

    template <int WIDTH, bool ALIGNED, typename M>
    void launch(typename M::Element* attention, cudaStream_t stream) const {
        launch_gram<WIDTH, ALIGNED>(stream);
        launch_softmax<WIDTH, M>(attention, stream);
    }
};

// Calls launch(width, aligned), both constants: padded(head_channels), and whether heads begin on 16-byte boundaries,
// because they are whole packs.
template <typename T, typename Launch>
void dispatch_heads(int64_t head_channels, Launch launch) {
    const auto with_width = [&](auto aligned) {
        switch (padded(head_channels)) {
            case 48:
                return launch(std::integral_constant<int, 48>{}, aligned);
            case 96:
                return launch(std::integral_constant<int, 96>{}, aligned);
            default:
                return launch(std::integral_constant<int, 128>{}, aligned);
        }
    };
    if (head_channels % (16 / sizeof(T)) == 0) {
        with_width(std::true_type{});
    } else {
        with_width(std::false_type{});
    }
}

}  // namespace trt_graft
