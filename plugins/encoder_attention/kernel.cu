// Self-attention of a vision transformer, without a mask.
//
// Floor: 4·tokens²·head_dim operations for each head of each image; q, k, v are read once and y is written once.  The
// scores never leave the chip: a block takes a tile of queries of one head and walks over tiles of its keys and values
// with an online softmax (Dao et al. 2022).  Scores, softmax and sums are FP32.
//
// Two kernels: FP16 with whole packs of 16 bytes on tensor cores, everything else with FP32 multiply-adds.  FP16 heads
// of 64 columns on Hopper: see sm90.cu.
#include <cuda_pipeline.h>

#include <cfloat>
#include <type_traits>

#include "common/kernel.cuh"
#include "common/pointwise.cuh"
#include "common/tensor_core.cuh"
#include "encoder_attention/kernel.cuh"
#include "encoder_attention/sm90.cuh"

namespace trt_graft {
namespace {

constexpr int kMaxHeadDim = 128;
constexpr int kManyBlocks = 256;       // two for each multiprocessor of a large GPU
constexpr float kLog2E = 1.44269504f;  // exp(x) = exp2(x · log2 e), and exp2 is an instruction

// Where a block works: at a tile of queries of one head of one image.
struct Place {
    int64_t query;   // the first query
    int64_t origin;  // offset of the head in token 0
    int64_t stride;  // from one token to the next
};

__device__ Place place_of_block(int64_t tokens, int heads, int head_dim, int tile) {
    // Divisions of 64 bits take longer.
    const auto tiles = static_cast<uint32_t>(ceil_div(tokens, tile));
    const uint32_t head = blockIdx.x / tiles, image = head / heads;
    const int64_t stride = int64_t{heads} * head_dim;
    return {int64_t{blockIdx.x % tiles} * tile, image * tokens * stride + head % heads * int64_t{head_dim}, stride};
}

// ---- Tensor cores ---------------------------------------------------------------------------------------------------

// 2^x, with 2 units in the last place; results below 2^-126 are zero.
__device__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

constexpr int kWarps = 4;  // side by side along the queries
constexpr int kTile = 16;  // rows of a fragment, and the granularity of keys and columns

// The highest score of a row is brought up to date only when a score exceeds it by more than kSlack, which is rare
// behind the first tiles: it costs shuffles and the scaling of all sums.  FP16 holds weights up to 2^kSlack as well as
// those up to 1.
constexpr float kSlack = 8;

// WIDTH: head_dim, rounded up to an instance; the columns behind head_dim are zeros.
//
// A score costs 4·head_dim operations on tensor cores and one exp2, of which a multiprocessor makes 16 in a clock: half
// the time of the products at 64 columns.  (In pairs of FP16 it makes no more of them.)  The rest must fit in between.
//
// Two shapes of blocks:
//   GROUPS = 1  for many: ROWS = 2 gives a warp two fragments of queries, and each fragment of keys and values that it
//               loads serves both; with one, shared memory would take longer than the products.
//   GROUPS > 1  for few, which are as slow as one warp is: the keys of a tile are divided among groups of warps, which
//               add up in the end.
template <int WIDTH, int ROWS, int GROUPS>
__global__ void __launch_bounds__(GROUPS * kWarps * 32, ROWS == 2 ? 3 : 1)
    tensor_core_kernel(const __half* q, const __half* k, const __half* v, __half* y, int tokens, int heads,
                       int head_dim, float scale) {
    static_assert(GROUPS == 1 || ROWS == 1);
    constexpr int kThreads = GROUPS * kWarps * 32;
    constexpr int kKeys = WIDTH <= 64 ? 64 : 32;                       // of a tile
    constexpr int kChunk = kKeys / GROUPS < 32 ? kKeys / GROUPS : 32;  // keys whose scores are in registers at once
    // Rows are 16 bytes longer than they need be, and so begin at different banks: eight of them are read at once.
    constexpr int kStride = WIDTH + 8;
    __shared__ alignas(16) __half tiles[2][2][kKeys][kStride];  // stages × {keys, values}

    const Place place = place_of_block(tokens, heads, head_dim, kWarps * ROWS * kTile);
    const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
    const int warp = threadIdx.x / 32 % kWarps, group_of_warps = threadIdx.x / (kWarps * 32);
    const int warp_query = static_cast<int>(place.query) + warp * ROWS * kTile;

    // Starts to copy the tile of keys and values from `first` on; zeros behind the last token.
    const auto copy_tile = [&](int stage, int first) {
        constexpr int kPack = 8, kPacks = WIDTH / kPack, kAtOnce = kThreads / kPacks;
        const int column = threadIdx.x % kPacks * kPack;
#pragma unroll
        for (int i = 0; i < kKeys; i += kAtOnce) {
            const int key = i + threadIdx.x / kPacks;
            if (kKeys % kAtOnce != 0 && key >= kKeys) continue;
            const int64_t source = place.origin + (first + key) * place.stride + column;
            const bool exists = first + key < tokens && column < head_dim;
            copy_or_clear(&tiles[stage][0][key][column], k + source, exists);
            copy_or_clear(&tiles[stage][1][key][column], v + source, exists);
        }
        __pipeline_commit();
    };
    copy_tile(0, 0);

    // The highest score is that of the largest product only if the scale is positive; the queries take its sign.  It is
    // not 0 either, for −∞ · 0 is not a number.
    const uint32_t sign = scale < 0 ? 0x80008000u : 0;
    scale = fmaxf(fabsf(scale), 1e-37f);

    // The lane's rows are queries warp_query + row · 16 + group and + group + 8.
    const auto query_of = [&](int row, int half) { return warp_query + row * kTile + half * 8 + group; };
    uint32_t queries[ROWS][WIDTH / kTile][4];  // fragments a
    for (int row = 0; row < ROWS; ++row) {
        for (int step = 0; step < WIDTH / kTile; ++step) {
            for (int i = 0; i < 4; ++i) {
                const int query = query_of(row, i % 2);
                const int column = step * kTile + i / 2 * 8 + 2 * pair;
                const bool inside = query < tokens && column < head_dim;
                const __half* source = q + place.origin + query * place.stride + column;
                queries[row][step][i] = inside ? *reinterpret_cast<const uint32_t*>(source) ^ sign : 0;
            }
        }
    }

    // For both halves of a row of fragments: a score that none so far exceeds by more than kSlack, Σ 2^(score −
    // highest) over the lane's columns, and, as fragments c, Σ 2^(score − highest) · value.
    float highest[ROWS][2], sum[ROWS][2] = {}, mixed[ROWS][WIDTH / 8][4] = {};
    for (auto& row : highest) row[0] = row[1] = -FLT_MAX;  // finite: a group without keys subtracts it from itself

    // Adds `count` keys, those from row `key` of a tile on.  Unless they are `whole`, the first `present` of them
    // exist.
    const auto attend = [&](int stage, int key, auto count, auto whole, int present) {
        constexpr int kCount = decltype(count)::value;
        constexpr bool kWhole = decltype(whole)::value;  // only the last tile pays for its missing keys
        float scores[ROWS][kCount / 8][4] = {};          // fragments c, queries × keys; not scaled
#pragma unroll
        for (int n = 0; n < kCount; n += kTile) {
#pragma unroll
            for (int step = 0; step < WIDTH / kTile; ++step) {
                uint32_t b[4];  // kᵀ: matrices keys 0–7 × columns 0–7, 0–7 × 8–15, 8–15 × 0–7, 8–15 × 8–15
                load_matrices(b, &tiles[stage][0][key + n + lane / 16 * 8 + lane % 8][step * kTile + lane / 8 % 2 * 8]);
                for (int row = 0; row < ROWS; ++row) {
                    multiply_add(scores[row][n / 8], queries[row][step], b[0], b[1]);
                    multiply_add(scores[row][n / 8 + 1], queries[row][step], b[2], b[3]);
                }
            }
        }

        float chunk_highest[ROWS][2];
        bool higher = false;
        for (int row = 0; row < ROWS; ++row) {
            chunk_highest[row][0] = chunk_highest[row][1] = -INFINITY;
            for (int n = 0; n < kCount / 8; ++n) {
                for (int i = 0; i < 4; ++i) {
                    float& score = scores[row][n][i];
                    if (!kWhole && n * 8 + 2 * pair + i % 2 >= present) score = -INFINITY;
                    chunk_highest[row][i / 2] = fmaxf(chunk_highest[row][i / 2], score);
                }
            }
            for (int half = 0; half < 2; ++half) {
                higher = higher || chunk_highest[row][half] * scale > highest[row][half] + kSlack;
            }
        }
        if (__any_sync(0xffffffffu, higher)) {
            for (int row = 0; row < ROWS; ++row) {
                for (int half = 0; half < 2; ++half) {
                    float now = chunk_highest[row][half];
                    for (int offset = 1; offset < 4; offset *= 2) {  // the four lanes of a row
                        now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, offset));
                    }
                    now = fmaxf(highest[row][half], now * scale);
                    const float shrink = exp2_fast(highest[row][half] - now);
                    highest[row][half] = now;
                    sum[row][half] *= shrink;
                    for (auto& values : mixed[row]) {
                        values[2 * half] *= shrink;
                        values[2 * half + 1] *= shrink;
                    }
                }
            }
        }
        // The difference is rounded once.  The rounding of `highest` is the same for all of a row, and cancels out; up
        // to scores of 2^26 it is below 4, so that weights stay far below the largest FP16 value.
        for (int row = 0; row < ROWS; ++row) {
            for (int n = 0; n < kCount / 8; ++n) {
                for (int i = 0; i < 4; ++i) {
                    float& score = scores[row][n][i];
                    score = exp2_fast(fmaf(score, scale, -highest[row][i / 2]));
                    sum[row][i / 2] += score;
                }
            }
        }

#pragma unroll
        for (int n = 0; n < kCount; n += kTile) {
            uint32_t weights[ROWS][4];
            for (int row = 0; row < ROWS; ++row) {
                for (int i = 0; i < 4; ++i) {  // two fragments c side by side are a fragment a
                    const float* two = &scores[row][n / 8 + i / 2][i % 2 * 2];
                    weights[row][i] = as_word(__floats2half2_rn(two[0], two[1]));
                }
            }
#pragma unroll
            for (int step = 0; step < WIDTH / kTile; ++step) {
                uint32_t b[4];  // v: matrices keys 0–7 × columns 0–7, 8–15 × 0–7, 0–7 × 8–15, 8–15 × 8–15
                load_matrices_transposed(b, &tiles[stage][1][key + n + lane % 16][step * kTile + lane / 16 * 8]);
                for (int row = 0; row < ROWS; ++row) {
                    multiply_add(mixed[row][2 * step], weights[row], b[0], b[1]);
                    multiply_add(mixed[row][2 * step + 1], weights[row], b[2], b[3]);
                }
            }
        }
    };

    int stage = 0;
    for (int first = 0; first < tokens; first += kKeys, stage ^= 1) {
        __pipeline_wait_prior(0);
        __syncthreads();  // the tile has arrived for all, and nobody reads the other one any more
        if (first + kKeys < tokens) copy_tile(stage ^ 1, first + kKeys);
        if (warp_query >= tokens) continue;  // this warp only helps to copy
        if (first + kKeys <= tokens) {
#pragma unroll 1  // two chunks at once do not fit into the registers
            for (int chunk = 0; chunk < kKeys; chunk += GROUPS * kChunk) {
                const int key = chunk + group_of_warps * kChunk;
                attend(stage, key, std::integral_constant<int, kChunk>{}, std::true_type{}, kChunk);
            }
        } else {  // 16 keys at a time: 577 tokens pay for 592, not for 640
            for (int key = group_of_warps * kTile; first + key < tokens; key += GROUPS * kTile) {
                attend(stage, key, std::integral_constant<int, kTile>{}, std::false_type{}, tokens - first - key);
            }
        }
    }

    for (auto& row : sum) {
        for (float& total : row) {
            for (int offset = 1; offset < 4; offset *= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
        }
    }

    // The upper half of the groups hands its sums to the lower one.
    for (int groups = GROUPS / 2; groups > 0; groups /= 2) {
        constexpr int kValues = 4 + WIDTH / 2;
        static_assert(sizeof(tiles) >= GROUPS / 2 * kWarps * kValues * 32 * sizeof(float));
        __syncthreads();  // the tiles, or the sums of the round before, make way
        float* sums = reinterpret_cast<float*>(tiles) + (group_of_warps % groups * kWarps + warp) * kValues * 32 + lane;
        if (group_of_warps / groups == 1) {
            for (int half = 0; half < 2; ++half) {
                sums[half * 32] = highest[0][half];
                sums[(2 + half) * 32] = sum[0][half];
            }
            for (int n = 0; n < WIDTH / 2; ++n) sums[(4 + n) * 32] = mixed[0][n / 4][n % 4];
        }
        __syncthreads();
        if (group_of_warps >= groups) continue;
        float ours[2], theirs[2];
        for (int half = 0; half < 2; ++half) {
            const float other = sums[half * 32], now = fmaxf(highest[0][half], other);
            ours[half] = exp2_fast(highest[0][half] - now);
            theirs[half] = exp2_fast(other - now);
            highest[0][half] = now;
            sum[0][half] = sum[0][half] * ours[half] + sums[(2 + half) * 32] * theirs[half];
        }
        for (int n = 0; n < WIDTH / 2; ++n) {
            float& value = mixed[0][n / 4][n % 4];
            value = value * ours[n / 2 % 2] + sums[(4 + n) * 32] * theirs[n / 2 % 2];
        }
    }
    if (group_of_warps > 0) return;

    // Steps from row to row, so that no address waits in registers since the queries were read.
    __half* target = y + place.origin + query_of(0, 0) * place.stride;
    for (int row = 0; row < ROWS; ++row) {
        for (int half = 0; half < 2; ++half, target += 8 * place.stride) {
            if (query_of(row, half) >= tokens) continue;
            const float share = 1 / sum[row][half];
            for (int n = 0; n < WIDTH / 8; ++n) {
                const int column = n * 8 + 2 * pair;
                const float* two = &mixed[row][n][2 * half];
                if (column < head_dim) {
                    *reinterpret_cast<__half2*>(target + column) = __floats2half2_rn(two[0] * share, two[1] * share);
                }
            }
        }
    }
}

// ---- FP32 multiply-adds ---------------------------------------------------------------------------------------------

constexpr int kThreadSide = 16;  // a block is 16 threads along the queries × 16 along the keys, then along the columns

// tile[i] = row first + i of a head as FP32; zeros behind the last token and behind head_dim.
template <typename T, int ROWS, int STRIDE>
__device__ void load_tile(float (&tile)[ROWS][STRIDE], const T* x, const Place& place, int64_t first, int64_t tokens,
                          int head_dim) {
    constexpr int kWidth = STRIDE - 4;
    for (int i = threadIdx.x; i < ROWS * kWidth; i += kThreadSide * kThreadSide) {
        const int row = i / kWidth, column = i % kWidth;
        const bool inside = first + row < tokens && column < head_dim;
        tile[row][column] = inside ? to_float(x[place.origin + (first + row) * place.stride + column]) : 0;
    }
}

template <typename T, int WIDTH>
__global__ void __launch_bounds__(kThreadSide* kThreadSide)
    multiply_add_kernel(const T* q, const T* k, const T* v, T* y, int64_t tokens, int heads, int head_dim,
                        float scale) {
    constexpr int kRows = WIDTH <= 64 ? 4 : 2;         // queries of a thread: down, down + 16, …
    constexpr int kScores = WIDTH <= 64 ? 2 : 1;       // keys of a thread: across, across + 16, …
    constexpr int kPacks = WIDTH / (4 * kThreadSide);  // columns of a thread, in packs of four: across, across + 16, …
    constexpr int kKeys = kThreadSide * kScores;
    // Rows are 16 bytes longer than they need be: packs at one column of eight rows lie in different banks.
    __shared__ alignas(16) float queries[kThreadSide * kRows][WIDTH + 4], weights[kThreadSide * kRows][kKeys + 4];
    __shared__ alignas(16) float keys[kKeys][WIDTH + 4], values[kKeys][WIDTH + 4];

    const Place place = place_of_block(tokens, heads, head_dim, kThreadSide * kRows);
    const int across = threadIdx.x % kThreadSide, down = threadIdx.x / kThreadSide;
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
            for (int r = 0; r < kRows; ++r) query[r] = load_pack<4>(&queries[down + r * kThreadSide][column]);
            for (int s = 0; s < kScores; ++s) key[s] = load_pack<4>(&keys[across + s * kThreadSide][column]);
            for (int r = 0; r < kRows; ++r) {
                for (int s = 0; s < kScores; ++s) {
                    for (int n = 0; n < 4; ++n) scores[r][s] += query[r].values[n] * key[s].values[n];
                }
            }
        }

        for (int r = 0; r < kRows; ++r) {
            float tile_highest = highest[r];
            for (int s = 0; s < kScores; ++s) {
                scores[r][s] = first + across + s * kThreadSide < tokens ? scores[r][s] * scale : -INFINITY;
                tile_highest = fmaxf(tile_highest, scores[r][s]);
            }
            for (int offset = 1; offset < kThreadSide; offset *= 2) {  // the 16 lanes of a row
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
                weights[down + r * kThreadSide][across + s * kThreadSide] = weight;
            }
        }
        __syncwarp();  // a row of weights is written and read by the same half of a warp

        for (int key = 0; key < kKeys; key += 4) {
            Pack<float, 4> weight[kRows];
            for (int r = 0; r < kRows; ++r) weight[r] = load_pack<4>(&weights[down + r * kThreadSide][key]);
            for (int n = 0; n < 4; ++n) {
                for (int p = 0; p < kPacks; ++p) {
                    const auto value = load_pack<4>(&values[key + n][(across + p * kThreadSide) * 4]);
                    for (int r = 0; r < kRows; ++r) {
                        for (int m = 0; m < 4; ++m) mixed[r][p][m] += weight[r].values[n] * value.values[m];
                    }
                }
            }
        }
    }

    for (int r = 0; r < kRows; ++r) {
        for (int offset = 1; offset < kThreadSide; offset *= 2) sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], offset);
        const int64_t query = place.query + down + r * kThreadSide;
        if (query >= tokens) continue;
        for (int p = 0; p < kPacks; ++p) {
            for (int m = 0; m < 4; ++m) {
                const int column = (across + p * kThreadSide) * 4 + m;
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
    // The smallest tiles have 32 queries; blocks and tokens, rounded up to a tile, are int.
    const int64_t tiles = ceil_div(tokens, 32);
    if (head_dim > kMaxHeadDim || batch * heads * tiles > INT32_MAX || tiles > INT32_MAX / 64) {
        return cudaErrorInvalidValue;
    }
#ifdef TRT_GRAFT_SM90
    if (type == DataType::kHalf && head_dim == 64 && on_boundary(k) && on_boundary(v)) {
        Gpu gpu;
        cudaError_t error = find_gpu(gpu);
        bool taken = false;
        if (!error && gpu.is_hopper) {
            error = launch_encoder_attention_sm90(q, k, v, y, batch, tokens, heads, scale, gpu.multiprocessors, stream,
                                                  taken);
        }
        if (error || taken) return error;
    }
#endif
    return dispatch(type, [&](auto tag) {
        using T = decltype(tag);
        const auto launch = [&](auto kernel, int threads, int tile) {
            kernel<<<batch * heads * ceil_div(tokens, tile), threads, 0, stream>>>(
                static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v), static_cast<T*>(y),
                tokens, static_cast<int>(heads), static_cast<int>(head_dim), scale * kLog2E);
        };
        if constexpr (std::is_same_v<T, __half>) {
            if (head_dim % 8 == 0) {
                const auto launch_width = [&](auto width) {
                    constexpr int kWidth = decltype(width)::value;
                    constexpr int kRows = kWidth <= 64 ? 2 : 1;  // more columns do not fit into the registers twice
                    constexpr int kGroups = kWidth <= 64 ? 4 : 2;
                    constexpr int kTall = kWarps * kRows * kTile, kLow = kWarps * kTile;
                    if (batch * heads * ceil_div(tokens, kTall) >= kManyBlocks) {
                        launch(tensor_core_kernel<kWidth, kRows, 1>, kWarps * 32, kTall);
                    } else {
                        launch(tensor_core_kernel<kWidth, 1, kGroups>, kGroups * kWarps * 32, kLow);
                    }
                };
                if (head_dim <= 16) {
                    launch_width(std::integral_constant<int, 16>{});
                } else if (head_dim <= 32) {
                    launch_width(std::integral_constant<int, 32>{});
                } else if (head_dim <= 64) {
                    launch_width(std::integral_constant<int, 64>{});
                } else {
                    launch_width(std::integral_constant<int, 128>{});
                }
                return;
            }
        }
        if (head_dim <= 64) {
            launch(multiply_add_kernel<T, 64>, kThreadSide * kThreadSide, 4 * kThreadSide);
        } else {
            launch(multiply_add_kernel<T, 128>, kThreadSide * kThreadSide, 2 * kThreadSide);
        }
    });
}

}  // namespace trt_graft
