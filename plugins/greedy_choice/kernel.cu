// Greedy decoding's choice of the next token.
//
// Floor: the logits are read once.  They are so few (100 KB a row) that what counts is latency: a first kernel spreads
// them over many blocks, each with all its loads on their way at once, and leaves the best token of each chunk; a
// second one, a single block, picks among these and moves the state on.  It is the only one that writes the position,
// which the first one reads.
#include "common/candidate.cuh"
#include "common/dependent_launch.cuh"
#include "greedy_choice/kernel.cuh"

namespace trt_graft {
namespace {

constexpr int kThreads = 256;
constexpr int kTokens = 8;  // of a thread
constexpr int kChunk = kThreads * kTokens;
constexpr int kStateThreads = 1024;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    find_candidates_kernel(const T* logits, const int32_t* position, const int32_t* allowed_from, Candidate* candidates,
                           int vocabulary, int chunks, bool all_alike) {
    allow_dependents();
    const int chunk = blockIdx.x % chunks;
    const auto token = [&](int i) { return chunk * kChunk + i * kThreads + static_cast<int>(threadIdx.x); };
    int32_t from[kTokens];  // constants
#pragma unroll
    for (int i = 0; i < kTokens; ++i) from[i] = token(i) < vocabulary ? allowed_from[all_alike ? 0 : token(i)] : 0;
    wait_for_previous();

    const T* row = logits + blockIdx.x / chunks * int64_t{vocabulary};
    const int32_t now = *position;
    float values[kTokens] = {};
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
        if (token(i) < vocabulary) values[i] = to_float(row[token(i)]);
    }
    Candidate best = 0;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
        if (token(i) < vocabulary) best = max(best, candidate(now < from[i] ? -INFINITY : values[i], token(i)));
    }

    __shared__ Candidate of_warps[kThreads / 32];
    best = warp_max(best);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (const Candidate other : of_warps) best = max(best, other);
    candidates[blockIdx.x] = best;
}

// A warp for each row.
__global__ void __launch_bounds__(kStateThreads)
    choose_kernel(const Candidate* candidates, const int32_t* sequences, const int32_t* position,
                  const int32_t* finished, const int32_t* forced, const int32_t* ends, int32_t* next_sequences,
                  int32_t* next_position, int32_t* next_finished, int64_t rows, int chunks, int64_t capacity,
                  int positions, int end_count, int32_t pad) {
    allow_dependents();
    wait_for_previous();
    const int32_t now = *position;
    const int32_t forced_token = forced[max(0, min(now, positions - 1))];
    __syncthreads();  // what all have read may change
    if (threadIdx.x == 0) *next_position = now + 1;

    const int lane = threadIdx.x % 32;
    const int64_t slot = int64_t{now} + 1;
    for (int64_t row = threadIdx.x / 32; row < rows; row += kStateThreads / 32) {
        Candidate best = 0;
        for (int c = lane; c < chunks; c += 32) best = max(best, candidates[row * chunks + c]);
        best = warp_max(best);
        const int32_t before = finished[row];
        __syncwarp();  // what all have read may change

        const int32_t token = before > 0          ? pad
                              : forced_token >= 0 ? forced_token
                                                  : static_cast<int32_t>(place_of(best));
        bool ended = false;
        for (int e = 0; e < end_count; ++e) ended |= token == ends[e];
        if (lane == 0) next_finished[row] = max(before, int32_t{ended});

        const int32_t* past = sequences + row * capacity;
        int32_t* next = next_sequences + row * capacity;
        if (next != past) {
            for (int64_t s = lane; s < capacity; s += 32) next[s] = s == slot ? token : past[s];
        } else if (lane == 0 && slot >= 0 && slot < capacity) {
            next[slot] = token;
        }
    }
}

}  // namespace

int64_t greedy_choice_workspace_bytes(int64_t rows, int64_t vocabulary) {
    return rows * ceil_div(vocabulary, kChunk) * static_cast<int64_t>(sizeof(Candidate));
}

cudaError_t launch_greedy_choice(DataType type, const void* logits, const int32_t* sequences, const int32_t* position,
                                 const int32_t* finished, const int32_t* allowed_from, const int32_t* forced,
                                 const int32_t* ends, int32_t* next_sequences, int32_t* next_position,
                                 int32_t* next_finished, void* workspace, int64_t rows, int64_t vocabulary,
                                 int64_t capacity, int64_t restricted, int64_t positions, int64_t end_count,
                                 int64_t pad, cudaStream_t stream) {
    if (vocabulary < 1 || vocabulary > INT32_MAX - kChunk || positions < 1 || positions > INT32_MAX ||
        end_count > INT32_MAX || (restricted != 1 && restricted != vocabulary)) {
        return cudaErrorInvalidValue;
    }
    const int64_t chunks = ceil_div(vocabulary, kChunk);
    if (rows * chunks > INT32_MAX) return cudaErrorInvalidValue;
    auto* candidates = static_cast<Candidate*>(workspace);
    cudaError_t error = cudaSuccess;
    const cudaError_t launched = dispatch(type, [&](auto tag) {
        using T = decltype(tag);
        if (rows == 0) return;
        error = launch_dependent(find_candidates_kernel<T>, static_cast<unsigned>(rows * chunks), kThreads, 0, stream,
                                 static_cast<const T*>(logits), position, allowed_from, candidates,
                                 static_cast<int>(vocabulary), static_cast<int>(chunks), restricted == 1);
    });
    if (error != cudaSuccess || launched != cudaSuccess) return error ? error : launched;
    return launch_dependent(choose_kernel, 1, kStateThreads, 0, stream, candidates, sequences, position, finished,
                            forced, ends, next_sequences, next_position, next_finished, rows, static_cast<int>(chunks),
                            capacity, static_cast<int>(positions), static_cast<int>(end_count),
                            static_cast<int32_t>(pad));
}

}  // namespace trt_graft
