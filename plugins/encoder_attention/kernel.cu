// Self-attention of a vision transformer, without a mask.
//
// Floor: 4·tokens²·head_dim operations for each head of each image; q, k, v are read once and y is written once.  The
// scores never leave the chip: a block takes a tile of queries of one head and walks over tiles of its keys and values
// with an online softmax (Dao et al. 2022).  Scores, softmax and sums are FP32.
//
// Two kernels: FP16 with whole packs of 16 bytes on tensor cores, everything else with FP32 multiply-adds.
#include <cuda_pipeline.h>

#include <type_traits>

#include "common/kernel.cuh"
#include "common/tensor_core.cuh"
#include "encoder_attention/kernel.cuh"

namespace trt_graft {
namespace {

constexpr int kMaxHeadDim = 128;
constexpr float kLog2E = 1.44269504f;  // exp(x) = exp2(x · log2 e), and exp2 is an instruction

// Where a block works: at a tile of queries of one head of one image.
struct Place {
    int64_t query;   // the first query
    int64_t origin;  // offset of the head in token 0
    int64_t stride;  // from one token to the next
};

__device__ Place place_of_block(int64_t tokens, int heads, int head_dim, int tile) {
    const int64_t tiles = ceil_div(tokens, tile), head = blockIdx.x / tiles;
    const int64_t stride = int64_t{heads} * head_dim;
    return {blockIdx.x % tiles * tile, head / heads * tokens * stride + head % heads * head_dim, stride};
}

// ---- Tensor cores ---------------------------------------------------------------------------------------------------

// 2^x, with 2 units in the last place; results below 2^-126 are zero.
__device__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

constexpr int kWarps = 4;
constexpr int kTile = 16;  // queries of a warp, and the granularity of keys and columns

// WIDTH: head_dim, rounded up to an instance; the columns behind head_dim are zeros.
template <int WIDTH>
__global__ void __launch_bounds__(kWarps * 32)
    tensor_core_kernel(const __half* q, const __half* k, const __half* v, __half* y, int64_t tokens, int heads,
                       int head_dim, float scale) {
    constexpr int kKeys = WIDTH <= 64 ? 64 : 32;  // of a tile
    // Rows are 16 bytes longer than they need be, and so begin at different banks: eight of them are read at once.
    constexpr int kStride = WIDTH + 8;
    __shared__ alignas(16) __half key_tiles[2][kKeys][kStride], value_tiles[2][kKeys][kStride];

    const Place place = place_of_block(tokens, heads, head_dim, kWarps * kTile);
    const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
    const int64_t warp_query = place.query + threadIdx.x / 32 * kTile;

    // Starts to copy the tile of keys and values from `first` on; zeros behind the last token.
    const auto copy_tile = [&](int stage, int64_t first) {
        constexpr int kPack = 8, kPacks = WIDTH / kPack;
        for (int i = threadIdx.x; i < kKeys * kPacks; i += kWarps * 32) {
            const int key = i / kPacks, column = i % kPacks * kPack;
            __half *key_pack = &key_tiles[stage][key][column], *value_pack = &value_tiles[stage][key][column];
            if (first + key < tokens && column < head_dim) {
                const int64_t source = place.origin + (first + key) * place.stride + column;
                __pipeline_memcpy_async(key_pack, k + source, 16);
                __pipeline_memcpy_async(value_pack, v + source, 16);
            } else {
                store_pack(key_pack, Pack<__half, kPack>{});
                store_pack(value_pack, Pack<__half, kPack>{});
            }
        }
        __pipeline_commit();
    };
    copy_tile(0, 0);

    // The lane's rows are queries warp_query + group and + group + 8.
    const auto query_of = [&](int half) { return warp_query + group + 8 * half; };
    uint32_t queries[WIDTH / kTile][4];  // fragments a
    for (int step = 0; step < WIDTH / kTile; ++step) {
        for (int i = 0; i < 4; ++i) {
            const int64_t query = query_of(i % 2);
            const int column = step * kTile + i / 2 * 8 + 2 * pair;
            const bool inside = query < tokens && column < head_dim;
            const __half* source = q + place.origin + query * place.stride + column;
            queries[step][i] = inside ? *reinterpret_cast<const uint32_t*>(source) : 0;
        }
    }

    // For both rows: the highest score so far, Σ 2^(score − highest) over the lane's columns, and, as fragments c,
    // Σ 2^(score − highest) · value.
    float highest[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    float mixed[WIDTH / 8][4] = {};

    // `whole` is a constant: only the last tile pays for its missing keys.
    const auto attend = [&](int stage, int64_t first, auto whole) {
        constexpr bool kWhole = decltype(whole)::value;
        const auto missing = [&](int64_t key) { return !kWhole && first + key >= tokens; };

        float scores[kKeys / 8][4] = {};  // fragments c, queries × keys
#pragma unroll
        for (int key = 0; key < kKeys; key += kTile) {
            if (missing(key)) continue;
#pragma unroll
            for (int step = 0; step < WIDTH / kTile; ++step) {
                uint32_t b[4];  // kᵀ: matrices keys 0–7 × columns 0–7, 0–7 × 8–15, 8–15 × 0–7, 8–15 × 8–15
                load_matrices(b, &key_tiles[stage][key + lane / 16 * 8 + lane % 8][step * kTile + lane / 8 % 2 * 8]);
                multiply_add(scores[key / 8], queries[step], b[0], b[1]);
                multiply_add(scores[key / 8 + 1], queries[step], b[2], b[3]);
            }
        }

        // Scaled first, then subtracted: the exponents are never positive, however large the scores.
        float tile_highest[2] = {highest[0], highest[1]};
        for (int n = 0; n < kKeys / 8; ++n) {
            for (int i = 0; i < 4; ++i) {
                scores[n][i] = missing(n * 8 + 2 * pair + i % 2) ? -INFINITY : scores[n][i] * scale;
                tile_highest[i / 2] = fmaxf(tile_highest[i / 2], scores[n][i]);
            }
        }
        float shrink[2];
        for (int half = 0; half < 2; ++half) {
            for (int offset = 1; offset < 4; offset *= 2) {  // the four lanes of a row
                tile_highest[half] =
                    fmaxf(tile_highest[half], __shfl_xor_sync(0xffffffffu, tile_highest[half], offset));
            }
            shrink[half] = exp2_fast(highest[half] - tile_highest[half]);
            highest[half] = tile_highest[half];
            sum[half] *= shrink[half];
        }
        for (int n = 0; n < kKeys / 8; ++n) {
            for (int i = 0; i < 4; ++i) {
                scores[n][i] = exp2_fast(scores[n][i] - highest[i / 2]);
                sum[i / 2] += scores[n][i];
            }
        }
        for (int n = 0; n < WIDTH / 8; ++n) {
            for (int i = 0; i < 4; ++i) mixed[n][i] *= shrink[i / 2];
        }

#pragma unroll
        for (int key = 0; key < kKeys; key += kTile) {
            if (missing(key)) continue;
            const auto& left = scores[key / 8];
            const auto& right = scores[key / 8 + 1];
            // Two fragments c side by side are a fragment a.
            const uint32_t weights[4] = {
                as_word(__floats2half2_rn(left[0], left[1])), as_word(__floats2half2_rn(left[2], left[3])),
                as_word(__floats2half2_rn(right[0], right[1])), as_word(__floats2half2_rn(right[2], right[3]))};
#pragma unroll
            for (int step = 0; step < WIDTH / kTile; ++step) {
                uint32_t b[4];  // v: matrices keys 0–7 × columns 0–7, 8–15 × 0–7, 0–7 × 8–15, 8–15 × 8–15
                load_matrices_transposed(b, &value_tiles[stage][key + lane % 16][step * kTile + lane / 16 * 8]);
                multiply_add(mixed[2 * step], weights, b[0], b[1]);
                multiply_add(mixed[2 * step + 1], weights, b[2], b[3]);
            }
        }
    };

    int stage = 0;
    for (int64_t first = 0; first < tokens; first += kKeys, stage ^= 1) {
        __pipeline_wait_prior(0);
        __syncthreads();  // the tile has arrived for all, and nobody reads the other one any more
        if (first + kKeys < tokens) copy_tile(stage ^ 1, first + kKeys);
        if (warp_query >= tokens) continue;  // this warp only helps to copy
        if (first + kKeys <= tokens) {
            attend(stage, first, std::true_type{});
        } else {
            attend(stage, first, std::false_type{});
        }
    }

    for (int half = 0; half < 2; ++half) {
        for (int offset = 1; offset < 4; offset *= 2) sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], offset);
        if (query_of(half) >= tokens) continue;
        __half* row = y + place.origin + query_of(half) * place.stride;
        for (int n = 0; n < WIDTH / 8; ++n) {
            const int column = n * 8 + 2 * pair;
            const float left = mixed[n][2 * half] / sum[half], right = mixed[n][2 * half + 1] / sum[half];
            if (column < head_dim) *reinterpret_cast<__half2*>(row + column) = __floats2half2_rn(left, right);
        }
    }
}

// ---- FP32 multiply-adds ---------------------------------------------------------------------------------------------

constexpr int kSide = 16;  // a block is 16 threads along the queries × 16 along the keys, then along the columns

// tile[i] = row first + i of a head as FP32; zeros behind the last token and behind head_dim.
template <typename T, int ROWS, int STRIDE>
__device__ void load_tile(float (&tile)[ROWS][STRIDE], const T* x, const Place& place, int64_t first, int64_t tokens,
                          int head_dim) {
    constexpr int kWidth = STRIDE - 4;
    for (int i = threadIdx.x; i < ROWS * kWidth; i += kSide * kSide) {
        const int row = i / kWidth, column = i % kWidth;
        const bool inside = first + row < tokens && column < head_dim;
        tile[row][column] = inside ? to_float(x[place.origin + (first + row) * place.stride + column]) : 0;
    }
}

template <typename T, int WIDTH>
__global__ void __launch_bounds__(kSide* kSide)
    multiply_add_kernel(const T* q, const T* k, const T* v, T* y, int64_t tokens, int heads, int head_dim,
                        float scale) {
    constexpr int kRows = WIDTH <= 64 ? 4 : 2;    // queries of a thread: down, down + 16, …
    constexpr int kScores = WIDTH <= 64 ? 2 : 1;  // keys of a thread: across, across + 16, …
    constexpr int kPacks = WIDTH / (4 * kSide);   // columns of a thread, in packs of four: across, across + 16, …
    constexpr int kKeys = kSide * kScores;
    // Rows are 16 bytes longer than they need be: packs at one column of eight rows lie in different banks.
    __shared__ alignas(16) float queries[kSide * kRows][WIDTH + 4], weights[kSide * kRows][kKeys + 4];
    __shared__ alignas(16) float keys[kKeys][WIDTH + 4], values[kKeys][WIDTH + 4];

    const Place place = place_of_block(tokens, heads, head_dim, kSide * kRows);
    const int across = threadIdx.x % kSide, down = threadIdx.x / kSide;
    load_tile(queries, q, place, place.query, tokens, head_dim);

    float highest[kRows], sum[kRows] = {}, mixed[kRows][kPacks][4] = {};
    for (float& score : highest) score = -INFINITY;

    for (int64_t first = 0; first < tokens; first += kKeys) {
        __syncthreads();  // the previous tile is no longer read
        load_tile(keys, k, place, first, tokens, head_dim);
        load_tile(values, v, place, first, tokens, head_dim);
        __syncthreads();

        float scores[kRows][kScores] = {};
        for (int column = 0; column < head_dim; column += 4) {
            Pack<float, 4> query[kRows], key[kScores];
            for (int r = 0; r < kRows; ++r) query[r] = load_pack<4>(&queries[down + r * kSide][column]);
            for (int s = 0; s < kScores; ++s) key[s] = load_pack<4>(&keys[across + s * kSide][column]);
            for (int r = 0; r < kRows; ++r) {
                for (int s = 0; s < kScores; ++s) {
                    for (int n = 0; n < 4; ++n) scores[r][s] += query[r].values[n] * key[s].values[n];
                }
            }
        }

        for (int r = 0; r < kRows; ++r) {
            float tile_highest = highest[r];
            for (int s = 0; s < kScores; ++s) {
                scores[r][s] = first + across + s * kSide < tokens ? scores[r][s] * scale : -INFINITY;
                tile_highest = fmaxf(tile_highest, scores[r][s]);
            }
            for (int offset = 1; offset < kSide; offset *= 2) {  // the 16 lanes of a row
                tile_highest = fmaxf(tile_highest, __shfl_xor_sync(0xffffffffu, tile_highest, offset));
            }
            const float shrink = exp2f(highest[r] - tile_highest);
            highest[r] = tile_highest;
            sum[r] *= shrink;
            for (auto& pack : mixed[r]) {
                for (float& value : pack) value *= shrink;
            }
            for (int s = 0; s < kScores; ++s) {
                const float weight = exp2f(scores[r][s] - tile_highest);
                sum[r] += weight;
                weights[down + r * kSide][across + s * kSide] = weight;
            }
        }
        __syncwarp();  // a row of weights is written and read by the same half of a warp

        for (int key = 0; key < kKeys; key += 4) {
            Pack<float, 4> weight[kRows];
            for (int r = 0; r < kRows; ++r) weight[r] = load_pack<4>(&weights[down + r * kSide][key]);
            for (int n = 0; n < 4; ++n) {
                for (int p = 0; p < kPacks; ++p) {
                    const auto value = load_pack<4>(&values[key + n][(across + p * kSide) * 4]);
                    for (int r = 0; r < kRows; ++r) {
                        for (int m = 0; m < 4; ++m) mixed[r][p][m] += weight[r].values[n] * value.values[m];
                    }
                }
            }
        }
    }

    for (int r = 0; r < kRows; ++r) {
        for (int offset = 1; offset < kSide; offset *= 2) sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], offset);
        const int64_t query = place.query + down + r * kSide;
        if (query >= tokens) continue;
        for (int p = 0; p < kPacks; ++p) {
            for (int m = 0; m < 4; ++m) {
                const int column = (across + p * kSide) * 4 + m;
                if (column < head_dim) {
                    y[place.origin + query * place.stride + column] = from_float<T>(mixed[r][p][m] / sum[r]);
                }
            }
        }
    }
}

}  // namespace

cudaError_t launch_encoder_attention(DataType type, const void* q, const void* k, const void* v, void* y, int64_t batch,
                                     int64_t tokens, int64_t heads, int64_t head_dim, float scale,
                                     cudaStream_t stream) {
    if (batch * tokens * heads * head_dim == 0) return cudaSuccess;
    // The smallest tiles have 32 queries; heads and blocks are int.
    if (head_dim > kMaxHeadDim || batch * heads * ceil_div(tokens, 32) > INT32_MAX) return cudaErrorInvalidValue;
    return dispatch(type, [&](auto tag) {
        using T = decltype(tag);
        const auto launch = [&](auto kernel, int threads, int tile) {
            kernel<<<batch * heads * ceil_div(tokens, tile), threads, 0, stream>>>(
                static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v), static_cast<T*>(y),
                tokens, static_cast<int>(heads), static_cast<int>(head_dim), scale * kLog2E);
        };
        if constexpr (std::is_same_v<T, __half>) {
            if (head_dim % 8 == 0) {
                const auto launch_width = [&](auto kernel) { launch(kernel, kWarps * 32, kWarps * kTile); };
                if (head_dim <= 16) {
                    launch_width(tensor_core_kernel<16>);
                } else if (head_dim <= 32) {
                    launch_width(tensor_core_kernel<32>);
                } else if (head_dim <= 64) {
                    launch_width(tensor_core_kernel<64>);
                } else {
                    launch_width(tensor_core_kernel<128>);
                }
                return;
            }
        }
        if (head_dim <= 64) {
            launch(multiply_add_kernel<T, 64>, kSide * kSide, 4 * kSide);
        } else {
            launch(multiply_add_kernel<T, 128>, kSide * kSide, 2 * kSide);
        }
    });
}

}  // namespace trt_graft
