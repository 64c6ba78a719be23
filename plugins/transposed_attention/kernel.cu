// Attention between the channels of an image, in NCHW.
//
// Floor: q, k and v are read once and y written once.  Scores need all pixels, so there are three kernels:
//
//   gram     per head and share of the pixels: q · kᵀ, Σq² and Σk²  → workspace, in FP32
//   softmax  per row of a head's scores: sum of the shares, normalisation, softmax  → workspace, in the tensors' type
//   mix      per head and share of the pixels: attention · v  → y
//
// q and k are never normalised themselves: dividing the products by both norms is the same, and needs no second pass.
// There are no atomics; sums are taken in an order that depends on sizes only, so results repeat bit by bit.
//
// FP16 multiplies on tensor cores, which sum in FP32; FP32 on the ordinary units, whose speed is then the limit.
#include <mma.h>

#include <algorithm>
#include <type_traits>

#include "common/kernel.cuh"
#include "transposed_attention/kernel.cuh"

namespace trt_graft {
namespace {

namespace wmma = nvcuda::wmma;

constexpr int kThreads = 384;  // 12 warps: a multiple of the rows of 16 × 16 squares in 48 and in 96 channels
constexpr int kWarps = kThreads / 32;
constexpr int kSoftmaxThreads = 1024;
constexpr int kSquare = 16;  // side of the matrices that a tensor core multiplies

constexpr int64_t kMaxChannels = 128;
constexpr int64_t kBlocks = 2 * 132;  // aim: two blocks for each multiprocessor of an H200
constexpr int64_t kShareUnit = 64;    // pixels; a multiple of every tile

// A tile is 128 bytes of each row, which 8 threads move in packs of 16 bytes.
constexpr int kPacksPerRow = 8;
constexpr int kRowsAtOnce = kThreads / kPacksPerRow;
template <typename T>
constexpr int kPack = 16 / sizeof(T);
template <typename T>
constexpr int kTile = kPacksPerRow * kPack<T>;
template <typename T>
constexpr int kStride = kTile<T> + kPack<T>;  // in shared memory: neighbouring rows begin in different banks

// Channels as the kernels see them: absent ones are rows of zeros.  48 and 96 are Restormer's.
constexpr int64_t padded(int64_t channels) { return channels <= 48 ? 48 : channels <= 96 ? 96 : kMaxChannels; }

// What gram leaves behind: q · kᵀ (D, D), Σq² (D), Σk² (D).
__host__ __device__ constexpr int64_t partial_size(int64_t D) { return D * D + 2 * D; }

// The pixels of a head, divided among blocks.  Without a look at the device: the order of sums is the same on each.
struct Shares {
    int64_t count, pixels;
};

Shares share(int64_t all_heads, int64_t pixels) {
    const int64_t wanted = ceil_div(kBlocks, all_heads);
    const int64_t per_block = ceil_div(ceil_div(pixels, kShareUnit), wanted) * kShareUnit;
    return {ceil_div(pixels, per_block), per_block};
}

// The first `left` elements of a pack in global memory; the others are zero.  An aligned pack is inside or outside.
template <bool ALIGNED, int N, typename T>
__device__ void load_inside(Pack<T, N>& pack, const T* source, int64_t left) {
    if constexpr (ALIGNED) {
        if (left > 0) pack = load_pack<N>(source);
    } else {
        for (int n = 0; n < N; ++n) {
            if (n < left) pack.values[n] = source[n];
        }
    }
}

template <bool ALIGNED, int N, typename T>
__device__ void store_inside(T* target, const Pack<T, N>& pack, int64_t left) {
    if constexpr (ALIGNED) {
        if (left > 0) store_pack(target, pack);
    } else {
        for (int n = 0; n < N; ++n) {
            if (n < left) target[n] = pack.values[n];
        }
    }
}

// A tile on its way to shared memory.  Until the tile before it is done with, it stays in registers, where each thread
// has one pack of every 48th row.
template <typename T, int ROWS, int D, bool ALIGNED>
struct Tile {
    static constexpr int kCount = ceil_div(ROWS, kRowsAtOnce);
    Pack<T, kPack<T>> packs[kCount];

    static __device__ int row(int n) { return n * kRowsAtOnce + threadIdx.x / kPacksPerRow; }

    // Rows 0 … D−1 are the channels of `source` (channels, pixels), the next D those of the matrix `distance` behind
    // it.
    __device__ void load(const T* source, int64_t distance, int64_t channels, int64_t pixels, int64_t first_pixel) {
        const int64_t pixel = first_pixel + threadIdx.x % kPacksPerRow * kPack<T>;
#pragma unroll
        for (int n = 0; n < kCount; ++n) {
            packs[n] = {};
            const int channel = row(n) % D;
            if (row(n) < ROWS && channel < channels) {
                load_inside<ALIGNED>(packs[n], source + row(n) / D * distance + channel * pixels + pixel,
                                     pixels - pixel);
            }
        }
    }

    __device__ void store(T (&tile)[ROWS][kStride<T>]) const {
#pragma unroll
        for (int n = 0; n < kCount; ++n) {
            if (row(n) < ROWS) store_pack(&tile[row(n)][threadIdx.x % kPacksPerRow * kPack<T>], packs[n]);
        }
    }

    __device__ void add_squares(float (&squares)[kCount]) const {
#pragma unroll
        for (int n = 0; n < kCount; ++n) {
            for (const T value : packs[n].values) squares[n] += to_float(value) * to_float(value);
        }
    }
};

// q · kᵀ of the tiles seen so far, in registers.  Threads fall into groups, each with a (D, D) matrix of its own: the
// groups share out the pixels of a tile.
template <typename T, int D>
struct Products;

// A warp has a row of squares.
template <int D>
struct Products<__half, D> {
    static constexpr int kSquares = D / kSquare;
    static constexpr int kGroups = kWarps / kSquares;  // warps may be left over
    static constexpr int kSteps = kTile<__half> / kSquare;
    const int warp = threadIdx.x / 32;
    const int group = warp / kSquares;
    const int row = warp % kSquares * kSquare;
    wmma::fragment<wmma::accumulator, kSquare, kSquare, kSquare, float> sums[kSquares];

    __device__ Products() {
        for (auto& sum : sums) wmma::fill_fragment(sum, 0.0f);
    }

    __device__ void add(const __half (&tile)[2 * D][kStride<__half>]) {
        if (group >= kGroups) return;
#pragma unroll 1  // fragments of one step fill the registers
        for (int step = group; step < kSteps; step += kGroups) {
            wmma::fragment<wmma::matrix_a, kSquare, kSquare, kSquare, __half, wmma::row_major> q;
            wmma::load_matrix_sync(q, &tile[row][step * kSquare], kStride<__half>);
#pragma unroll
            for (int n = 0; n < kSquares; ++n) {
                // (pixel, channel) of kᵀ is where (channel, pixel) of k is: column-major
                wmma::fragment<wmma::matrix_b, kSquare, kSquare, kSquare, __half, wmma::col_major> k;
                wmma::load_matrix_sync(k, &tile[D + n * kSquare][step * kSquare], kStride<__half>);
                wmma::mma_sync(sums[n], q, k, sums[n]);
            }
        }
    }

    __device__ void store(float* matrix, bool add_to_it) {
#pragma unroll
        for (int n = 0; n < kSquares; ++n) {
            float* square = matrix + row * D + n * kSquare;
            if (add_to_it) {
                wmma::fragment<wmma::accumulator, kSquare, kSquare, kSquare, float> before;
                wmma::load_matrix_sync(before, square, D, wmma::mem_row_major);
                for (int e = 0; e < before.num_elements; ++e) sums[n].x[e] += before.x[e];
            }
            wmma::store_matrix_sync(square, sums[n], D, wmma::mem_row_major);
        }
    }
};

// A thread has 4 × 4 elements, or several times as many: those of rows row, row + kSide, … and columns alike, so that
// neighbouring threads read neighbouring rows of k, which lie in different banks.
template <int D>
struct Products<float, D> {
    static constexpr int kSide = D / 4;
    static constexpr int kPlaces = kSide * kSide;
    static constexpr int kGroups = kPlaces < kThreads ? kThreads / kPlaces : 1;  // threads may be left over
    static constexpr int kCount = ceil_div(kPlaces, kThreads);
    const int group = threadIdx.x / kPlaces;
    const int first_place = threadIdx.x % kPlaces;
    float sums[kCount][4][4] = {};

    __device__ void add(const float (&tile)[2 * D][kStride<float>]) {
        if (group >= kGroups) return;
        for (int pack = group; pack < kPacksPerRow; pack += kGroups) {
#pragma unroll
            for (int n = 0; n < kCount; ++n) {
                const int place = first_place + n * kThreads;
                if (place >= kPlaces) break;
                Pack<float, 4> q[4], k[4];
                for (int i = 0; i < 4; ++i) {
                    q[i] = load_pack<4>(&tile[place / kSide + i * kSide][pack * 4]);
                    k[i] = load_pack<4>(&tile[D + place % kSide + i * kSide][pack * 4]);
                }
                for (int e = 0; e < 4; ++e) {
                    for (int i = 0; i < 4; ++i) {
                        for (int j = 0; j < 4; ++j) sums[n][i][j] += q[i].values[e] * k[j].values[e];
                    }
                }
            }
        }
    }

    __device__ void store(float* matrix, bool add_to_it) {
#pragma unroll
        for (int n = 0; n < kCount; ++n) {
            const int place = first_place + n * kThreads;
            if (place >= kPlaces) break;
            for (int i = 0; i < 4; ++i) {
                for (int j = 0; j < 4; ++j) {
                    float& element = matrix[(place / kSide + i * kSide) * D + place % kSide + j * kSide];
                    element = add_to_it ? element + sums[n][i][j] : sums[n][i][j];
                }
            }
        }
    }
};

template <typename T, int D, bool ALIGNED>
__global__ void __launch_bounds__(kThreads, D == 48 ? 2 : 1)
    gram_kernel(const T* qkv, float* partials, int64_t heads, int64_t channels, int64_t pixels, int64_t share_pixels) {
    __shared__ alignas(128) T shared[2 * D][kStride<T>];  // q, then k
    const int64_t image = blockIdx.x / heads, head = blockIdx.x % heads;
    const int64_t distance = heads * channels * pixels;  // from q to k
    const T* q = qkv + 3 * image * distance + head * channels * pixels;
    const int64_t first = blockIdx.y * share_pixels;
    const int64_t end = first + share_pixels < pixels ? first + share_pixels : pixels;

    Tile<T, 2 * D, D, ALIGNED> tile;
    Products<T, D> products;
    float squares[tile.kCount] = {};
    tile.load(q, distance, channels, pixels, first);
    for (int64_t pixel = first; pixel < end; pixel += kTile<T>) {
        tile.store(shared);
        tile.add_squares(squares);
        __syncthreads();
        // the next tile arrives while this one is multiplied
        if (pixel + kTile<T> < end) tile.load(q, distance, channels, pixels, pixel + kTile<T>);
        products.add(shared);
        __syncthreads();
    }

    float* partial = partials + (int64_t{blockIdx.x} * gridDim.y + blockIdx.y) * partial_size(D);
    for (int group = 0; group < products.kGroups; ++group) {  // one after the other
        if (products.group == group) products.store(partial, group > 0);
        __syncthreads();
    }
    for (int n = 0; n < tile.kCount; ++n) {
        for (int offset = kPacksPerRow / 2; offset > 0; offset /= 2) {
            squares[n] += __shfl_xor_sync(0xffffffffu, squares[n], offset);
        }
        if (threadIdx.x % kPacksPerRow == 0 && tile.row(n) < 2 * D) partial[D * D + tile.row(n)] = squares[n];
    }
}

// A block has one row of scores, which needs D products, the squares of all D rows of k and of one row of q.
template <typename T, int D>
__global__ void __launch_bounds__(kSoftmaxThreads)
    softmax_kernel(const float* partials, const T* temperature, T* attention, int64_t heads, int64_t channels,
                   int64_t shares) {
    constexpr int kValues = 2 * D + 1;
    constexpr int kGroups = kSoftmaxThreads / kValues;  // they divide the shares among them
    __shared__ float sums[kGroups][kValues];
    const int row = blockIdx.y;
    const int value = threadIdx.x % kValues, group = threadIdx.x / kValues;
    if (group < kGroups) {
        const int offset = value < D ? row * D + value : D * D + (value < 2 * D ? value : row);
        const float* partial = partials + blockIdx.x * shares * partial_size(D) + offset;
        float sum = 0;
#pragma unroll 8
        for (int64_t share = group; share < shares; share += kGroups) sum += partial[share * partial_size(D)];
        sums[group][value] = sum;
    }
    __syncthreads();
    if (group == 0) {
        for (int other = 1; other < kGroups; ++other) sums[0][value] += sums[other][value];
    }
    __syncthreads();
    if (threadIdx.x >= 32) return;

    constexpr int kPerLane = ceil_div(D, 32);
    const float* products = sums[0];
    const float* k_squares = sums[0] + D;
    const float q_norm = fmaxf(sqrtf(sums[0][2 * D]), 1e-12f);
    const float scale = to_float(temperature[blockIdx.x % heads]);
    float scores[kPerLane];
    float largest = -INFINITY;
    for (int n = 0; n < kPerLane; ++n) {
        const int column = n * 32 + threadIdx.x;
        scores[n] = -INFINITY;
        if (column < channels) {
            scores[n] = products[column] / q_norm / fmaxf(sqrtf(k_squares[column]), 1e-12f) * scale;
        }
        largest = fmaxf(largest, scores[n]);
    }
    largest = warp_max(largest);
    float total = 0;
    for (float& score : scores) total += score = expf(score - largest);
    total = warp_sum(total);
    for (int n = 0; n < kPerLane; ++n) {
        const int column = n * 32 + threadIdx.x;
        // zeros in the rows and columns of absent channels
        if (column < D) {
            attention[(int64_t{blockIdx.x} * D + row) * D + column] =
                from_float<T>(row < channels ? scores[n] / total : 0.0f);
        }
    }
}

// attention · v of a tile.
template <typename T, int D, bool ALIGNED>
struct Mix;

// A warp keeps 16 rows of the attention in registers, and takes 16 pixels at a time.
template <int D, bool ALIGNED>
struct Mix<__half, D, ALIGNED> {
    static constexpr int kSquares = D / kSquare;
    static constexpr int kGroups = kWarps / kSquares;
    static constexpr int kSteps = kTile<__half> / kSquare;
    static constexpr int kWidth = kSquare + 8;
    const int warp = threadIdx.x / 32;
    const int group = warp / kSquares;
    const int row = warp % kSquares * kSquare;
    wmma::fragment<wmma::matrix_a, kSquare, kSquare, kSquare, __half, wmma::row_major> attention[kSquares];

    __device__ explicit Mix(const __half* matrix) {
#pragma unroll
        for (int n = 0; n < kSquares; ++n) wmma::load_matrix_sync(attention[n], matrix + row * D + n * kSquare, D);
    }

    __device__ void operator()(const __half (&tile)[D][kStride<__half>], __half* y, int64_t channels, int64_t pixels,
                               int64_t first_pixel) const {
        // which thread has which element of a fragment is known only to the hardware
        __shared__ alignas(128) float results[kWarps][kSquare][kWidth];
        if (group >= kGroups) return;
        for (int step = group; step < kSteps; step += kGroups) {
            wmma::fragment<wmma::accumulator, kSquare, kSquare, kSquare, float> sum;
            wmma::fill_fragment(sum, 0.0f);
#pragma unroll
            for (int n = 0; n < kSquares; ++n) {
                wmma::fragment<wmma::matrix_b, kSquare, kSquare, kSquare, __half, wmma::row_major> v;
                wmma::load_matrix_sync(v, &tile[n * kSquare][step * kSquare], kStride<__half>);
                wmma::mma_sync(sum, attention[n], v, sum);
            }
            wmma::store_matrix_sync(&results[warp][0][0], sum, kWidth, wmma::mem_row_major);
            __syncwarp();
            const int lane = threadIdx.x % 32;
            const auto values = load_pack<8>(&results[warp][lane / 2][lane % 2 * 8]);
            Pack<__half, 8> rounded;
            for (int n = 0; n < 8; ++n) rounded.values[n] = from_float<__half>(values.values[n]);
            const int channel = row + lane / 2;
            const int64_t pixel = first_pixel + step * kSquare + lane % 2 * 8;
            if (channel < channels) store_inside<ALIGNED>(y + channel * pixels + pixel, rounded, pixels - pixel);
            __syncwarp();  // read before the next step overwrites it
        }
    }
};

// A thread has 4 pixels of 4 rows: row, row + kSide, …  It finds the attention in L1, where shared memory would be
// short.
template <int D, bool ALIGNED>
struct Mix<float, D, ALIGNED> {
    static constexpr int kSide = D / 4;
    const int row = threadIdx.x / kPacksPerRow;
    const int column = threadIdx.x % kPacksPerRow * 4;
    const float* attention;

    __device__ explicit Mix(const float* matrix) : attention(matrix) {}

    __device__ void operator()(const float (&tile)[D][kStride<float>], float* y, int64_t channels, int64_t pixels,
                               int64_t first_pixel) const {
        if (row >= kSide) return;
        Pack<float, 4> sums[4] = {};
        for (int k = 0; k < D; k += 4) {
            Pack<float, 4> weights[4], v[4];
            for (int i = 0; i < 4; ++i) {
                weights[i] = load_pack<4>(attention + (row + i * kSide) * D + k);
                v[i] = load_pack<4>(&tile[k + i][column]);
            }
            for (int e = 0; e < 4; ++e) {
                for (int i = 0; i < 4; ++i) {
                    for (int n = 0; n < 4; ++n) sums[i].values[n] += weights[i].values[e] * v[e].values[n];
                }
            }
        }
        const int64_t pixel = first_pixel + column;
        for (int i = 0; i < 4; ++i) {
            const int channel = row + i * kSide;
            if (channel < channels) store_inside<ALIGNED>(y + channel * pixels + pixel, sums[i], pixels - pixel);
        }
    }
};

template <typename T, int D, bool ALIGNED>
__global__ void __launch_bounds__(kThreads, D == 128 ? 1 : 2)
    mix_kernel(const T* qkv, const T* attention, T* y, int64_t heads, int64_t channels, int64_t pixels,
               int64_t share_pixels) {
    __shared__ alignas(128) T shared[D][kStride<T>];
    const int64_t image = blockIdx.x / heads, head = blockIdx.x % heads;
    const T* v = qkv + ((3 * image + 2) * heads + head) * channels * pixels;
    y += blockIdx.x * channels * pixels;
    const int64_t first = blockIdx.y * share_pixels;
    const int64_t end = first + share_pixels < pixels ? first + share_pixels : pixels;

    Tile<T, D, D, ALIGNED> tile;
    tile.load(v, 0, channels, pixels, first);
    const Mix<T, D, ALIGNED> mix(attention + int64_t{blockIdx.x} * D * D);
    for (int64_t pixel = first; pixel < end; pixel += kTile<T>) {
        tile.store(shared);
        __syncthreads();
        if (pixel + kTile<T> < end) tile.load(v, 0, channels, pixels, pixel + kTile<T>);
        mix(shared, y, channels, pixels, pixel);
        __syncthreads();
    }
}

}  // namespace

int64_t transposed_attention_workspace_bytes(int64_t batch, int64_t heads, int64_t head_channels, int64_t pixels) {
    if (batch * heads * head_channels * pixels == 0) return 0;
    const int64_t D = padded(head_channels), all_heads = batch * heads;
    // A bound for all_heads · share(…).count, which itself goes up and down.
    const int64_t shares = std::min(all_heads * ceil_div(pixels, kShareUnit), kBlocks + all_heads);
    return (shares * partial_size(D) + all_heads * D * D) * sizeof(float);
}

cudaError_t launch_transposed_attention(DataType type, const void* qkv, const void* temperature, void* y,
                                        void* workspace, int64_t batch, int64_t heads, int64_t head_channels,
                                        int64_t pixels, cudaStream_t stream) {
    if (batch * heads * head_channels * pixels == 0) return cudaSuccess;
    if (head_channels > kMaxChannels) return cudaErrorInvalidValue;
    const Shares shares = share(batch * heads, pixels);
    return dispatch(type, [&](auto tag) {
        using T = decltype(tag);
        const auto launch = [&](auto padded_channels, auto aligned) {
            constexpr int D = decltype(padded_channels)::value;
            constexpr bool kAligned = decltype(aligned)::value;
            const T* input = static_cast<const T*>(qkv);
            float* partials = static_cast<float*>(workspace);
            T* attention = reinterpret_cast<T*>(partials + batch * heads * shares.count * partial_size(D));
            const dim3 grid(batch * heads, shares.count);
            gram_kernel<T, D, kAligned>
                <<<grid, kThreads, 0, stream>>>(input, partials, heads, head_channels, pixels, shares.pixels);
            softmax_kernel<T, D><<<dim3(batch * heads, D), kSoftmaxThreads, 0, stream>>>(
                partials, static_cast<const T*>(temperature), attention, heads, head_channels, shares.count);
            mix_kernel<T, D, kAligned><<<grid, kThreads, 0, stream>>>(input, attention, static_cast<T*>(y), heads,
                                                                      head_channels, pixels, shares.pixels);
        };
        const auto launch_padded = [&](auto aligned) {
            switch (padded(head_channels)) {
                case 48:
                    return launch(std::integral_constant<int, 48>{}, aligned);
                case 96:
                    return launch(std::integral_constant<int, 96>{}, aligned);
                default:
                    return launch(std::integral_constant<int, 128>{}, aligned);
            }
        };
        // Packs need rows of pixels that begin on their boundaries.
        if (pixels % kPack<T> == 0) {
            launch_padded(std::true_type{});
        } else {
            launch_padded(std::false_type{});
        }
    });
}

}  // namespace trt_graft
