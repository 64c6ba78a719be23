// Self-attention of heads of 64 columns on Hopper.
//
// A group of four warps has 64 queries of a head, and walks over 64 keys and values at a time with an online softmax,
// as in kernel.cu.  Bulk copies bring them into shared memory, where products (wgmma) read them; queries and weights
// stay in registers.  A block has two groups, and two blocks share a multiprocessor: while one group's products run,
// others make exponentials.
//
//   Many blocks  The groups have 64 queries each, and the same keys and values.
//   Few          as slow as one group is: both have the same queries, take turns with the keys, and add up in the end.
//
// Compiled for sm_90a alone, in an object of its own.
#include <cfloat>

#include "common/boxes.cuh"
#include "common/dependent_launch.cuh"
#include "common/tensor_core.cuh"
#include "common/tensor_map.cuh"
#include "common/wgmma.cuh"
#include "encoder_attention/sm90.cuh"

namespace trt_graft {
namespace {

constexpr int kGroups = 2, kGroupThreads = 128, kThreads = kGroups * kGroupThreads;
constexpr int kQueries = 64;  // of a group
template <bool SPLIT>
constexpr int kBlockQueries = SPLIT ? kQueries : kGroups * kQueries;
constexpr int kKeys = 64, kColumns = 64, kStep = 16;
constexpr int kStages = 4, kAhead = 2;  // a tile is fetched when its place has not been read for two tiles
static_assert(kAhead == kGroups);       // groups that take turns fetch their own tiles
constexpr int kBoxBytes = kKeys * kColumns * 2;
constexpr float kSlack = 8;  // see kernel.cu

struct AttentionStages {
    alignas(1024) unsigned char boxes[kStages][2][kBoxBytes];  // keys, values
    uint64_t full[kStages], empty[kStages];
};

__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// SPLIT: the groups divide the keys between them.
template <bool SPLIT>
__global__ void __launch_bounds__(kThreads, 2)
    attention_kernel(const __grid_constant__ CUtensorMap keys, const __grid_constant__ CUtensorMap values,
                     const __half* q, __half* y, int tokens, int heads, float scale) {
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    auto& shared = *reinterpret_cast<AttentionStages*>(shared_bytes);
    allow_dependents();
    constexpr int kSharers = SPLIT ? 1 : kGroups;                                   // of a tile
    const int blocks = (tokens + kBlockQueries<SPLIT> - 1) / kBlockQueries<SPLIT>;  // of a head
    const int image = static_cast<int>(blockIdx.x) / blocks / heads,
              head = static_cast<int>(blockIdx.x) / blocks % heads;
    const int first_query = static_cast<int>(blockIdx.x) % blocks * kBlockQueries<SPLIT>;
    const int group_of_warps = static_cast<int>(threadIdx.x) / kGroupThreads;
    const int tiles = (tokens + kKeys - 1) / kKeys;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            prepare_barrier(&shared.full[i], 1);
            prepare_barrier(&shared.empty[i], kSharers * kGroupThreads / 32);
        }
        publish_barriers();
    }
    __syncthreads();
    wait_for_previous();

    const auto fetch = [&](int tile) {
        const int stage = tile % kStages, turn = tile / kStages;
        if (turn > 0) wait_for_phase(&shared.empty[stage], (turn - 1) % 2);
        begin_phase(&shared.full[stage], 2 * kBoxBytes);
        copy_box(shared.boxes[stage][0], keys, head * kColumns, tile * kKeys, image, &shared.full[stage]);
        copy_box(shared.boxes[stage][1], values, head * kColumns, tile * kKeys, image, &shared.full[stage]);
    };
    const bool fetches = threadIdx.x % (kSharers * kGroupThreads) == 0;
    const int first_tile = SPLIT ? group_of_warps : 0;
    if (fetches) {
        for (int tile = first_tile; tile < min(kAhead, tiles); tile += SPLIT ? kGroups : 1) fetch(tile);
    }

    // The highest score is that of the largest product only if the scale is positive; the queries take its sign.  It is
    // not 0 either, for −∞ · 0 is not a number.
    const uint32_t sign = scale < 0 ? 0x80008000u : 0;
    scale = fmaxf(fabsf(scale), 1e-37f);
    const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
    const int warp_query = first_query + static_cast<int>(threadIdx.x) % (SPLIT ? kGroupThreads : kThreads) / 32 * 16;
    const int width = heads * kColumns;
    const int64_t origin = int64_t{image} * tokens * width + head * kColumns + 2 * pair;
    uint32_t queries[kColumns / kStep][4];
    for (int step = 0; step < kColumns / kStep; ++step) {
        for (int i = 0; i < 4; ++i) {
            const int query = warp_query + i % 2 * 8 + group;
            const __half* const source = q + origin + int64_t{query} * width + step * kStep + i / 2 * 8;
            queries[step][i] = query < tokens ? *reinterpret_cast<const uint32_t*>(source) ^ sign : 0;
        }
    }

    float highest[2] = {-FLT_MAX, -FLT_MAX}, sum[2] = {}, mixed[8][4] = {};
    // Adds those keys of a tile, from row `first` on, whose scores are in `scores`; the first `present` of them exist.
    const auto attend = [&](auto& scores, const unsigned char* value_rows, int present, auto whole) {
        constexpr int kTiles = sizeof(scores) / sizeof(scores[0]);  // of eight keys
        constexpr bool kWhole = decltype(whole)::value;
        float now[2] = {-INFINITY, -INFINITY};
        for (int n = 0; n < kTiles; ++n) {
            for (int i = 0; i < 4; ++i) {
                if (!kWhole && n * 8 + 2 * pair + i % 2 >= present) scores[n][i] = -INFINITY;
                now[i / 2] = fmaxf(now[i / 2], scores[n][i]);
            }
        }
        const bool higher = now[0] * scale > highest[0] + kSlack || now[1] * scale > highest[1] + kSlack;
        if (__any_sync(0xffffffffu, higher)) {
            for (int half = 0; half < 2; ++half) {
                for (int offset = 1; offset < 4; offset *= 2) {  // the four lanes of a row
                    now[half] = fmaxf(now[half], __shfl_xor_sync(0xffffffffu, now[half], offset));
                }
                now[half] = fmaxf(highest[half], now[half] * scale);
                const float shrink = exp2_fast(highest[half] - now[half]);
                highest[half] = now[half];
                sum[half] *= shrink;
                for (auto& columns : mixed) {
                    columns[2 * half] *= shrink;
                    columns[2 * half + 1] *= shrink;
                }
            }
        }
        uint32_t weights[kTiles / 2][4];
        for (int n = 0; n < kTiles; ++n) {
            for (int i = 0; i < 4; ++i) {
                float& score = scores[n][i];
                score = exp2_fast(fmaf(score, scale, -highest[i / 2]));
                sum[i / 2] += score;
            }
            // Two fragments c side by side are a fragment a.
            weights[n / 2][n % 2 * 2] = as_word(__floats2half2_rn(scores[n][0], scores[n][1]));
            weights[n / 2][n % 2 * 2 + 1] = as_word(__floats2half2_rn(scores[n][2], scores[n][3]));
        }
        begin_products();
        for (int step = 0; step < kTiles / 2; ++step) {
            multiply_by_columns(mixed, weights[step], value_rows + step * kStep * kColumns * 2);
        }
        end_products();
        wait_for_product(mixed);
    };

    for (int tile = first_tile; tile < tiles; tile += SPLIT ? kGroups : 1) {
        const int stage = tile % kStages, present = tokens - tile * kKeys;
        if (fetches && tile + kAhead < tiles) fetch(tile + kAhead);
        __syncwarp();
        wait_for_phase(&shared.full[stage], tile / kStages % 2);
        const unsigned char *const key_box = shared.boxes[stage][0], *const value_box = shared.boxes[stage][1];
        if (present >= kKeys) {
            float scores[kKeys / 8][4];
            begin_products();
#pragma unroll
            for (int step = 0; step < kColumns / kStep; ++step) {
                multiply_by_rows(scores, queries[step], key_box, step * kStep, step > 0);
            }
            end_products();
            wait_for_product(scores);
            attend(scores, value_box, kKeys, std::true_type{});
        } else {  // 16 keys at a time: 577 tokens pay for 592, not for 640
#pragma unroll 1
            for (int key = 0; key < present; key += kStep) {
                float scores[kStep / 8][4];
                begin_products();
#pragma unroll
                for (int step = 0; step < kColumns / kStep; ++step) {
                    multiply_by_rows(scores, queries[step], key_box + key * kColumns * 2, step * kStep, step > 0);
                }
                end_products();
                wait_for_product(scores);
                attend(scores, value_box + key * kColumns * 2, present - key, std::false_type{});
            }
        }
        if (lane == 0) arrive(&shared.empty[stage]);
    }

    for (float& total : sum) {
        for (int offset = 1; offset < 4; offset *= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
    }
    if constexpr (SPLIT) {  // the second group hands its sums to the first one
        static_assert(sizeof(shared.boxes) >= 36 * kGroupThreads * sizeof(float));
        __syncthreads();  // the tiles make way
        float* const sums = reinterpret_cast<float*>(shared.boxes) + threadIdx.x % kGroupThreads;
        if (group_of_warps == 1) {
            for (int half = 0; half < 2; ++half) {
                sums[half * kGroupThreads] = highest[half];
                sums[(2 + half) * kGroupThreads] = sum[half];
            }
            for (int n = 0; n < 32; ++n) sums[(4 + n) * kGroupThreads] = mixed[n / 4][n % 4];
        }
        __syncthreads();
        if (group_of_warps == 1) return;
        float ours[2], theirs[2];
        for (int half = 0; half < 2; ++half) {
            const float other = sums[half * kGroupThreads], now = fmaxf(highest[half], other);
            ours[half] = exp2_fast(highest[half] - now);
            theirs[half] = exp2_fast(other - now);
            sum[half] = sum[half] * ours[half] + sums[(2 + half) * kGroupThreads] * theirs[half];
        }
        for (int n = 0; n < 32; ++n) {
            float& value = mixed[n / 4][n % 4];
            value = value * ours[n / 2 % 2] + sums[(4 + n) * kGroupThreads] * theirs[n / 2 % 2];
        }
    }
    for (int half = 0; half < 2; ++half) {
        const int query = warp_query + half * 8 + group;
        if (query >= tokens) continue;
        const float share = 1 / sum[half];
        __half* const target = y + origin + int64_t{query} * width;
        for (int n = 0; n < kColumns / 8; ++n) {
            *reinterpret_cast<__half2*>(target + n * 8) =
                __floats2half2_rn(mixed[n][2 * half] * share, mixed[n][2 * half + 1] * share);
        }
    }
}

}  // namespace

cudaError_t launch_encoder_attention_sm90(const void* q, const void* k, const void* v, void* y, int64_t batch,
                                          int64_t tokens, int64_t heads, float scale, int multiprocessors,
                                          cudaStream_t stream, bool& taken) {
    EncodeTensorMap encode = nullptr;
    taken = find_encode(encode) == cudaSuccess;
    if (!taken) return cudaSuccess;
    CUtensorMap keys, values;
    const int64_t width = heads * kColumns;
    cudaError_t error = describe_boxes(encode, keys, k, 3, batch, tokens, width, kKeys);
    if (!error) error = describe_boxes(encode, values, v, 3, batch, tokens, width, kKeys);
    if (error) return error;
    const auto launch = [&](auto kernel, int queries) {
        const int64_t blocks = batch * heads * ceil_div(tokens, queries);
        return launch_dependent(kernel, static_cast<unsigned>(blocks), kThreads, sizeof(AttentionStages), stream, keys,
                                values, static_cast<const __half*>(q), static_cast<__half*>(y),
                                static_cast<int>(tokens), static_cast<int>(heads),
                                scale * 1.44269504f);  // exp(x) = exp2(x · log2 e)
    };
    const bool many = batch * heads * ceil_div(tokens, kBlockQueries<false>) >= multiprocessors;
    return many ? launch(attention_kernel<false>, kBlockQueries<false>)
                : launch(attention_kernel<true>, kBlockQueries<true>);
}

}  // namespace trt_graft
