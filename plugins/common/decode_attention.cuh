// One new token's attention to rows of keys and values, for one head: the core of cross_attention and
// cached_self_attention.
//
// Floor: keys and values are read once.  A block takes a head.  Lanes side by side hold one row between them, a team;
// each team walks over tokens of its own with an online softmax, several tokens at a time, so that enough loads are on
// their way.  Teams are then combined in a fixed order: results repeat bit for bit.
#pragma once

#include <cfloat>

#include "common/kernel.cuh"

namespace trt_graft {

constexpr int kDecodeThreads = 512;
constexpr int kDecodeMaxHeadDim = 128;

// How rows of head_dim elements are shared: lane i of a team holds the packs i, i + lanes, …, PACKS of N elements.
template <typename T, int N, int PACKS>
struct Team {
    int head_dim;
    int lanes;  // a power of two, at most 32

    static Team of(int64_t head_dim) {
        int lanes = 1;
        while (lanes * N * PACKS < head_dim) lanes *= 2;
        return {static_cast<int>(head_dim), lanes};
    }

    __device__ int index() const { return threadIdx.x / lanes; }
    __device__ int count() const { return kDecodeThreads / lanes; }
    __device__ int column(int p) const { return (p * lanes + threadIdx.x % lanes) * N; }

    // The lane's part of a row; what lies behind head_dim is left as it is.
    __device__ void load(Pack<T, N> (&part)[PACKS], const T* row) const {
        for (int p = 0; p < PACKS; ++p) {
            if (column(p) < head_dim) part[p] = load_pack<N>(row + column(p));
        }
    }

    __device__ void store(T* row, const Pack<T, N> (&part)[PACKS]) const {
        for (int p = 0; p < PACKS; ++p) {
            if (column(p) < head_dim) store_pack(row + column(p), part[p]);
        }
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

// y = softmax(query · scale · keyᵀ) · value by a block of kDecodeThreads threads, for one head: query and y (head_dim).
// key_row(t) and value_row(t) point to the rows of token t, 0 ≤ t < tokens.
template <typename T, int N, int PACKS, typename KeyRow, typename ValueRow>
__device__ void decode_attention(const Team<T, N, PACKS>& team, const T* query, KeyRow key_row, ValueRow value_row,
                                 T* y, int64_t tokens, float scale) {
    constexpr int kBatch = 4;  // tokens whose loads are on their way at once
    constexpr int kWarps = kDecodeThreads / 32;
    constexpr unsigned kAllLanes = 0xffffffffu;

    Pack<T, N> unscaled[PACKS] = {};
    team.load(unscaled, query);
    float scaled[PACKS][N];
    for (int p = 0; p < PACKS; ++p) {
        for (int n = 0; n < N; ++n) scaled[p][n] = to_float(unscaled[p].values[n]) * scale;
    }

    // Over the team's tokens: the highest score, Σ exp(score − highest), Σ exp(score − highest) · value.  The highest
    // begins finite: of a team without tokens, −∞ − −∞ would make a NaN.
    float highest = -FLT_MAX, sum = 0, mixed[PACKS][N] = {};

    // All teams run as often as the first: the shuffles need every lane.
    for (int64_t first = 0; first < tokens; first += kBatch * team.count()) {
        const auto token = [&](int b) { return first + b * team.count() + team.index(); };
        Pack<T, N> keys[kBatch][PACKS] = {}, values[kBatch][PACKS] = {};
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
            if (token(b) < tokens) {
                team.load(keys[b], key_row(token(b)));
                team.load(values[b], value_row(token(b)));
            }
        }

        float scores[kBatch] = {};
        for (int b = 0; b < kBatch; ++b) {
            for (int p = 0; p < PACKS; ++p) {
                for (int n = 0; n < N; ++n) scores[b] += scaled[p][n] * to_float(keys[b][p].values[n]);
            }
        }
        for (int offset = team.lanes / 2; offset > 0; offset /= 2) {
            for (int b = 0; b < kBatch; ++b) scores[b] += __shfl_xor_sync(kAllLanes, scores[b], offset);
        }

        const float previous = highest;
        for (int b = 0; b < kBatch; ++b) {
            if (token(b) >= tokens) scores[b] = -INFINITY;
            highest = fmaxf(highest, scores[b]);
        }
        const float shrink = expf(previous - highest);
        sum *= shrink;
        for (int p = 0; p < PACKS; ++p) {
            for (int n = 0; n < N; ++n) mixed[p][n] *= shrink;
        }
        for (int b = 0; b < kBatch; ++b) {
            const float weight = expf(scores[b] - highest);
            sum += weight;
            for (int p = 0; p < PACKS; ++p) {
                for (int n = 0; n < N; ++n) mixed[p][n] += weight * to_float(values[b][p].values[n]);
            }
        }
    }

    // The teams of a warp: put on a common highest score, they add up.
    const float highest_of_warp = warp_max(highest);
    const float shrink = expf(highest - highest_of_warp);
    sum *= shrink;
    for (int p = 0; p < PACKS; ++p) {
        for (int n = 0; n < N; ++n) mixed[p][n] *= shrink;
    }
    for (int offset = team.lanes; offset < 32; offset *= 2) {
        sum += __shfl_xor_sync(kAllLanes, sum, offset);
        for (int p = 0; p < PACKS; ++p) {
            for (int n = 0; n < N; ++n) mixed[p][n] += __shfl_xor_sync(kAllLanes, mixed[p][n], offset);
        }
    }

    // The warps of the block, likewise, through shared memory: a thread for each column of y.
    __shared__ float warp_highest[kWarps], warp_sums[kWarps], warp_mixed[kWarps][kDecodeMaxHeadDim];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) {
        warp_highest[warp] = highest_of_warp;
        warp_sums[warp] = sum;
    }
    if (lane < team.lanes) {
        for (int p = 0; p < PACKS; ++p) {
            for (int n = 0; n < N; ++n) {
                if (team.column(p) < team.head_dim) warp_mixed[warp][team.column(p) + n] = mixed[p][n];
            }
        }
    }
    __syncthreads();
    const int column = threadIdx.x;
    if (column >= team.head_dim) return;
    highest = warp_highest[0];
    for (int w = 1; w < kWarps; ++w) highest = fmaxf(highest, warp_highest[w]);
    float total = 0, result = 0;
    for (int w = 0; w < kWarps; ++w) {
        const float share = expf(warp_highest[w] - highest);
        total += share * warp_sums[w];
        result += share * warp_mixed[w][column];
    }
    y[column] = from_float<T>(result / total);
}

}  // namespace trt_graft
