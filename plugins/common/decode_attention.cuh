// One new token's attention to rows of keys and values, for one head: the core of cross_attention,
// cached_self_attention and beam_self_attention.  Several queries, of beams that look at the same rows, share the
// loads.
//
// Floor: keys and values are read once, which takes all multiprocessors and many loads on their way at once.  A head's
// tokens are divided among blocks, more of them the fewer heads there are.  Lanes side by side hold one row between
// them, a team; each team walks over tokens of its own with an online softmax, several tokens at a time.  Teams, then
// the blocks of a head, which form a cluster (see cluster.cuh), are combined in a fixed order: results repeat bit for
// bit.
//
// The next kernel may start, and fetch its weights, as soon as this one runs (see dependent_launch.cuh).  Likewise this
// one brings its rows into L2 while the one before it still runs.
#pragma once

#include <algorithm>
#include <cfloat>
#include <type_traits>

#include "common/cluster.cuh"

namespace trt_graft {

constexpr int kDecodeThreads = 256;
constexpr int kDecodeMaxHeadDim = 128;
constexpr int kDecodeBatch = 4;  // tokens of a team whose loads are on their way at once

// N elements that nobody reads again, or zeros.
template <int N, typename T>
__device__ Pack<T, N> load_once(const T* source, bool exists) {
    Pack<T, N> pack = {};
    if constexpr (sizeof(pack) == 16) {
        const auto load = [=] {
            uint4 words;
            asm volatile(
                "{\n"
                ".reg .pred exists;\n"
                "setp.ne.s32 exists, %5, 0;\n"
                "mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
                "@exists ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];\n"
                "}\n"
                : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                : "l"(source), "r"(static_cast<int>(exists)));
            return words;
        };
        *reinterpret_cast<uint4*>(&pack) = load();
    } else if (exists) {
        pack = load_pack<N>(source);
    }
    return pack;
}

// How rows of head_dim elements are shared: lane i of a team holds the packs i, i + lanes, …, PACKS of N elements.
template <typename T, int N, int PACKS>
struct Team {
    static constexpr int kWidth = N, kPacks = PACKS;
    int head_dim;
    int lanes;  // a power of two, at most 32

    static Team of(int64_t head_dim) {
        int lanes = 1;
        while (lanes * N * PACKS < head_dim) lanes *= 2;
        return {static_cast<int>(head_dim), lanes};
    }

    __device__ int index() const { return threadIdx.x / lanes; }
    __host__ __device__ int count() const { return kDecodeThreads / lanes; }
    __device__ int column(int p) const { return (p * lanes + threadIdx.x % lanes) * N; }

    // The lane's part of a row; zeros behind head_dim, or where there is no row.
    __device__ void load(Pack<T, N> (&part)[PACKS], const T* row, bool exists = true) const {
        for (int p = 0; p < PACKS; ++p) part[p] = load_once<N>(row + column(p), exists && column(p) < head_dim);
    }

    __device__ void store(T* row, const Pack<T, N> (&part)[PACKS]) const {
        for (int p = 0; p < PACKS; ++p) {
            if (column(p) < head_dim) store_pack(row + column(p), part[p]);
        }
    }

    // Brings the lane's part of a row into L2.
    __device__ void prefetch_row(const T* row) const {
        for (int p = 0; p < PACKS; ++p) {
            if (column(p) < head_dim) asm volatile("prefetch.global.L2 [%0];" ::"l"(row + column(p)));
        }
    }

    // Brings rows into L2, where that is the whole block's work for one thread.  Nothing is read: rows that another
    // kernel is about to write are none the worse for it.
    __device__ void prefetch(const T* rows, int count) const {
#if __CUDA_ARCH__ >= 900
        if (N * sizeof(T) == 16 && threadIdx.x == 0 && count > 0) {
            const auto bytes = static_cast<unsigned>(count * head_dim * int{sizeof(T)});
            asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(rows), "r"(bytes) : "memory");
        }
#endif
    }
};

// Calls launch(team) with the team for rows of head_dim ≤ kDecodeMaxHeadDim elements: packs of 16 bytes where rows
// begin on their boundaries.
template <typename T, typename Launch>
void dispatch_team(int64_t head_dim, Launch launch) {
    constexpr int kWide = 16 / sizeof(T);
    if (head_dim % kWide == 0) {
        launch(Team<T, kWide, 1>::of(head_dim));
    } else {
        launch(Team<T, 1, 4>::of(head_dim));
    }
}

// Calls launch(BLOCKS) with the number of blocks for each head, as a type: as many as run at once on an H200, at_once
// on each multiprocessor, and have more than one batch for each team between them.  Without a look at the device,
// unless it has no clusters.  `kernel` is one of those to choose from.
template <typename Team, typename Launch>
cudaError_t dispatch_blocks(const void* kernel, const Team& team, int64_t heads, int64_t tokens, int at_once,
                            Launch launch) {
    constexpr int kMultiprocessorsOfH200 = 132;
    int64_t blocks = 1;
    while (blocks < kMaxClusterBlocks && 2 * blocks * heads <= at_once * kMultiprocessorsOfH200 &&
           blocks * kDecodeBatch * team.count() < tokens) {
        blocks *= 2;
    }
    bool clusters = false;
    if (blocks > 1) {
        const auto error = find_whether_clusters(kernel, clusters);
        if (error) return error;
    }
    if (!clusters) return launch(std::integral_constant<int, 1>{});
    if (blocks == 2) return launch(std::integral_constant<int, 2>{});
    if (blocks == 4) return launch(std::integral_constant<int, 4>{});
    return launch(std::integral_constant<int, kMaxClusterBlocks>{});
}

// Launches a kernel for `heads` heads, BLOCKS blocks for each.
template <int BLOCKS, typename... Parameters, typename... Arguments>
cudaError_t launch_decode_attention(void (*kernel)(Parameters...), int64_t heads, cudaStream_t stream,
                                    Arguments&&... arguments) {
    const auto grid = static_cast<unsigned>(heads * BLOCKS);
    if constexpr (BLOCKS == 1) {
        return launch_dependent(kernel, grid, kDecodeThreads, 0, stream, std::forward<Arguments>(arguments)...);
    } else {
        return launch_dependent_clusters(kernel, BLOCKS, grid, kDecodeThreads, stream,
                                         std::forward<Arguments>(arguments)...);
    }
}

// The tokens begin … begin + count − 1 of 0 … tokens − 1 are this block's, one of BLOCKS.
template <int BLOCKS>
struct TokenShare {
    int begin, count;

    __device__ explicit TokenShare(int tokens) {
        const int share = tokens / BLOCKS + (tokens % BLOCKS > 0), block = blockIdx.x % BLOCKS;
        begin = static_cast<int>(min(unsigned(block) * share, unsigned(tokens)));
        count = min(share, tokens - begin);
    }

    // Of them, how many all teams load at once.
    template <typename Team>
    __device__ int first_batch(const Team& team) const {
        return min(count, kDecodeBatch * team.count());
    }
};

// y = softmax(query · scale · keyᵀ) · value by BLOCKS blocks of kDecodeThreads threads, for one head: QUERIES queries
// and y of head_dim elements, `stride` apart, of which `queries` exist.  The block's own token t, 0 ≤ t < count, lies
// in memory as place(t) says, and key_row(t, place) and value_row(t, place) point to its rows.  take(t, key, value) is
// called once for each by the team that has loaded them.  In a cluster, all threads must have called cluster_begin.
template <int BLOCKS, int QUERIES, typename T, int N, int PACKS, typename Place, typename KeyRow, typename ValueRow,
          typename Take>
__device__ void decode_attention(const Team<T, N, PACKS>& team, const T* query, int stride, int queries, Place place,
                                 KeyRow key_row, ValueRow value_row, Take take, T* y, int count, float scale) {
    constexpr int kWarps = kDecodeThreads / 32;
    constexpr unsigned kAllLanes = 0xffffffffu;

    Pack<T, N> unscaled[QUERIES][PACKS];
    for (int q = 0; q < QUERIES; ++q) team.load(unscaled[q], query + q * stride, q < queries);

    // Over the team's tokens: the highest score, Σ exp(score − highest), Σ exp(score − highest) · value.  The highest
    // begins finite: of a team without tokens, −∞ − −∞ would make a NaN.
    float highest[QUERIES], sum[QUERIES] = {}, mixed[QUERIES][PACKS][N] = {};
    for (int q = 0; q < QUERIES; ++q) highest[q] = -FLT_MAX;

    // All teams run as often as the first: the shuffles need every lane.
#pragma unroll 1
    for (int first = 0; first < count; first += kDecodeBatch * team.count()) {
        const auto token = [&](int b) { return first + b * team.count() + team.index(); };
        int places[kDecodeBatch];
        for (int b = 0; b < kDecodeBatch; ++b) places[b] = place(token(b));
        Pack<T, N> keys[kDecodeBatch][PACKS], values[kDecodeBatch][PACKS];
        for (int b = 0; b < kDecodeBatch; ++b) team.load(keys[b], key_row(token(b), places[b]), token(b) < count);
        for (int b = 0; b < kDecodeBatch; ++b) team.load(values[b], value_row(token(b), places[b]), token(b) < count);

        float scores[QUERIES][kDecodeBatch] = {};
        for (int p = 0; p < PACKS; ++p) {
            for (int n = 0; n < N; ++n) {
                for (int q = 0; q < QUERIES; ++q) {
                    const float factor = to_float(unscaled[q][p].values[n]) * scale;
                    for (int b = 0; b < kDecodeBatch; ++b) scores[q][b] += factor * to_float(keys[b][p].values[n]);
                }
            }
        }
        for (int b = 0; b < kDecodeBatch; ++b) {
            if (token(b) < count) take(token(b), keys[b], values[b]);
        }
        for (int offset = team.lanes / 2; offset > 0; offset /= 2) {
            for (int q = 0; q < QUERIES; ++q) {
                for (int b = 0; b < kDecodeBatch; ++b) {
                    scores[q][b] += __shfl_xor_sync(kAllLanes, scores[q][b], offset);
                }
            }
        }

        for (int q = 0; q < QUERIES; ++q) {
            const float previous = highest[q];
            for (int b = 0; b < kDecodeBatch; ++b) {
                if (token(b) >= count) scores[q][b] = -INFINITY;
                highest[q] = fmaxf(highest[q], scores[q][b]);
            }
            const float shrink = expf(previous - highest[q]);
            sum[q] *= shrink;
            for (int p = 0; p < PACKS; ++p) {
                for (int n = 0; n < N; ++n) mixed[q][p][n] *= shrink;
            }
        }
        for (int q = 0; q < QUERIES; ++q) {
            for (int b = 0; b < kDecodeBatch; ++b) {
                const float weight = expf(scores[q][b] - highest[q]);
                sum[q] += weight;
                for (int p = 0; p < PACKS; ++p) {
                    for (int n = 0; n < N; ++n) mixed[q][p][n] += weight * to_float(values[b][p].values[n]);
                }
            }
        }
    }

    // The teams of a warp: put on a common highest score, they add up.
    __shared__ float warp_highest[QUERIES][kWarps], warp_sums[QUERIES][kWarps];
    __shared__ float warp_mixed[QUERIES][kWarps][kDecodeMaxHeadDim];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int q = 0; q < QUERIES; ++q) {
        const float highest_of_warp = warp_max(highest[q]);
        const float shrink = expf(highest[q] - highest_of_warp);
        sum[q] *= shrink;
        for (int p = 0; p < PACKS; ++p) {
            for (int n = 0; n < N; ++n) mixed[q][p][n] *= shrink;
        }
        for (int offset = team.lanes; offset < 32; offset *= 2) {
            sum[q] += __shfl_xor_sync(kAllLanes, sum[q], offset);
            for (int p = 0; p < PACKS; ++p) {
                for (int n = 0; n < N; ++n) mixed[q][p][n] += __shfl_xor_sync(kAllLanes, mixed[q][p][n], offset);
            }
        }
        if (lane == 0) {
            warp_highest[q][warp] = highest_of_warp;
            warp_sums[q][warp] = sum[q];
        }
        if (lane < team.lanes) {
            for (int p = 0; p < PACKS; ++p) {
                for (int n = 0; n < N; ++n) {
                    if (team.column(p) < team.head_dim) warp_mixed[q][warp][team.column(p) + n] = mixed[q][p][n];
                }
            }
        }
    }

    // The warps of the block, likewise, through shared memory: a thread for each column of y.
    const auto columns = [&](auto visit) {
        if constexpr (QUERIES == 1) {
            const int column = threadIdx.x;
            if (column < team.head_dim) visit(0, column);
        } else {
            for (int i = threadIdx.x; i < QUERIES * team.head_dim; i += kDecodeThreads) {
                visit(i / team.head_dim, i % team.head_dim);
            }
        }
    };
    const auto combined = [](const float* peaks, const float* sums, auto part_of, int parts, float& peak,
                             float& total) {
        peak = peaks[0];
        for (int w = 1; w < parts; ++w) peak = fmaxf(peak, peaks[w]);
        float result = total = 0;
        for (int w = 0; w < parts; ++w) {
            const float part = expf(peaks[w] - peak);
            total += part * sums[w];
            result += part * part_of(w);
        }
        return result;
    };
    __syncthreads();
    if constexpr (BLOCKS == 1) {
        columns([&](int q, int column) {
            float peak, total;
            const auto part_of = [&](int w) { return warp_mixed[q][w][column]; };
            const float result = combined(warp_highest[q], warp_sums[q], part_of, kWarps, peak, total);
            if (q < queries) y[q * stride + column] = from_float<T>(result / total);
        });
    } else {
        // The blocks of the cluster, likewise, through the first one's shared memory, into which all others write.
        __shared__ float block_highest[QUERIES][BLOCKS], block_sums[QUERIES][BLOCKS];
        __shared__ float block_mixed[QUERIES][BLOCKS][kDecodeMaxHeadDim];
        const int block = blockIdx.x % BLOCKS;
        cluster_wait();  // all blocks have begun
        columns([&](int q, int column) {
            float peak, total;
            const auto part_of = [&](int w) { return warp_mixed[q][w][column]; };
            const float result = combined(warp_highest[q], warp_sums[q], part_of, kWarps, peak, total);
            if (column == 0) {
                store_in_first_block(block_highest[q][block], peak);
                store_in_first_block(block_sums[q][block], total);
            }
            store_in_first_block(block_mixed[q][block][column], result);
        });
        cluster_arrive();
        cluster_wait();
        if (block > 0) return;
        columns([&](int q, int column) {
            float peak, total;
            const auto part_of = [&](int b) { return block_mixed[q][b][column]; };
            const float result = combined(block_highest[q], block_sums[q], part_of, BLOCKS, peak, total);
            if (q < queries) y[q * stride + column] = from_float<T>(result / total);
        });
    }
}

}  // namespace trt_graft
