// One step of beam search: the next tokens of all beams, and all that changes with them.
//
// Floor: the logits are read once, 100 KB a row in FP16: what counts is latency.  A first kernel spreads them over many
// blocks, each with all its loads on their way at once, and leaves the highest logit of each segment of a row, and each
// chunk's share of the row's Σ exp(logit), with which a logit becomes a continuation's total.  A second kernel, a block
// for each image, ranks the segments by their highest.  The `kept` best continuations are all in the first `kept` of
// them, ties included, since equal ones are in the order of their places: only these are read again.  Then it moves the
// state on, and is the only one that does; the position, which all its blocks read, is the first kernel's copy.
#include <cfloat>

#include "beam_choice/kernel.cuh"
#include "common/candidate.cuh"
#include "common/dependent_launch.cuh"

namespace trt_graft {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kScanThreads = 256;
constexpr int kTokens = 8;                    // of a thread
constexpr int kSegment = 32 * kTokens;        // a warp's tokens
constexpr int kSegments = kScanThreads / 32;  // of a chunk
constexpr int kChunk = kSegments * kSegment;
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kKeys = 4;       // of a thread, out of which all together find the best
constexpr int kStaged = 1536;  // elements of each table that are in shared memory at once
constexpr float kOut = -1e9f;  // what puts a score out of the running

// Σ exp(logit) of some tokens = sum · exp(highest)
struct Mass {
    float highest, sum;
};

// What the first kernel leaves for the second.
struct Scan {
    Candidate* best;  // (rows, segments): the highest logit and its token
    Mass* masses;     // (rows, chunks)
    int32_t* position;
    int segments, chunks;

    Scan(void* workspace, int64_t rows, int64_t vocabulary)
        : segments(static_cast<int>(ceil_div(vocabulary, kSegment))),
          chunks(static_cast<int>(ceil_div(vocabulary, kChunk))) {
        best = static_cast<Candidate*>(workspace);
        masses = reinterpret_cast<Mass*>(best + rows * segments);
        position = reinterpret_cast<int32_t*>(masses + rows * chunks);
    }
};

// What may be chosen at a position.
struct Restrictions {
    const int32_t* allowed_from;
    const int32_t* forced;
    bool all_alike;  // allowed_from is one number
    int forced_count;

    __device__ int32_t from(int token) const { return allowed_from[all_alike ? 0 : token]; }
    __device__ int32_t forced_at(int32_t now) const { return forced[max(0, min(now, forced_count - 1))]; }
};

// The logit of a token, or what it is made to be.
__device__ float restricted(float logit, int token, int32_t from, int32_t now, int32_t forced_token) {
    if (forced_token >= 0) return token == forced_token ? 0 : -INFINITY;
    return now < from ? -INFINITY : logit;
}

struct State {
    const int32_t *sequences, *ancestors, *hypotheses, *lengths, *finished;
    const float *scores, *hypothesis_scores;
    int32_t *next_sequences, *next_ancestors, *next_hypotheses, *next_lengths, *next_finished, *next_position;
    float *next_scores, *next_hypothesis_scores;
};

struct Search {
    const int32_t* ends;
    const float *penalties, *hopes;
    int beams, kept, vocabulary, end_count, positions, max_length;
    int64_t capacity;
    bool stop_when_full;

    __device__ int entry(int32_t now) const { return max(0, min(now, positions - 1)); }  // of penalties and hopes
};

template <typename T>
__global__ void __launch_bounds__(kScanThreads)
    scan_logits_kernel(const T* logits, const int32_t* position, Restrictions restrictions, Scan scan, int vocabulary) {
    allow_dependents();
    const int chunk = blockIdx.x % scan.chunks, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t row = blockIdx.x / scan.chunks;
    const int segment = chunk * kSegments + warp;
    const auto token = [&](int i) { return segment * kSegment + i * 32 + lane; };
    int32_t from[kTokens];  // constants
#pragma unroll
    for (int i = 0; i < kTokens; ++i) from[i] = token(i) < vocabulary ? restrictions.from(token(i)) : 0;
    wait_for_previous();

    const T* of_row = logits + row * vocabulary;
    const int32_t now = *position, forced_token = restrictions.forced_at(now);
    if (blockIdx.x == 0 && threadIdx.x == 0) *scan.position = now;
    float values[kTokens] = {};
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
        if (token(i) < vocabulary) values[i] = to_float(of_row[token(i)]);
    }
    Candidate best = 0;
    Mass mass{-FLT_MAX, 0};  // finite: of no tokens, −∞ − −∞ would make a NaN
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
        if (token(i) >= vocabulary) continue;
        best = max(best, candidate(restricted(values[i], token(i), from[i], now, forced_token), token(i)));
        mass.highest = fmaxf(mass.highest, values[i]);
    }
    mass.highest = warp_max(mass.highest);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
        if (token(i) < vocabulary) mass.sum += expf(values[i] - mass.highest);
    }
    mass.sum = warp_sum(mass.sum);
    best = warp_max(best);

    __shared__ Mass of_warps[kSegments];
    if (lane == 0) {
        of_warps[warp] = mass;
        if (segment < scan.segments) scan.best[row * scan.segments + segment] = best;
    }
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (const Mass other : of_warps) mass.highest = fmaxf(mass.highest, other.highest);
    mass.sum = 0;
    for (const Mass other : of_warps) mass.sum += other.sum * expf(other.highest - mass.highest);
    scan.masses[blockIdx.x] = mass;
}

// The place of a key among others, all different: how many are greater.
__device__ int place_among(const Candidate* all, int count, Candidate key) {
    int greater = 0;
    for (int i = 0; i < count; ++i) greater += all[i] > key;
    return greater;
}

// found = the `count` greatest of all threads' keys and of `before`, from the greatest to the least, and zeros behind
// them.  Keys that are not 0 all differ.  `before` is nullptr, or a list that this function has made.
//
// Each warp names its greatest, all together at least `count`: what is less than the count-th of these is out, and
// little is left whose place must be found.
__device__ void find_best(const Candidate (&keys)[kKeys], int count, const Candidate* before, Candidate* found) {
    static_assert(kMaxCandidates % kWarps == 0 && kMaxCandidates <= kThreads);
    __shared__ Candidate named[kMaxCandidates], left[kKeys * kThreads + kMaxCandidates], least;
    __shared__ int left_count;
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, each = (count + kWarps - 1) / kWarps;
    Candidate own = 0;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) own = max(own, keys[i]);
    for (int r = 0; r < each; ++r) {
        const Candidate best = warp_max(own);
        if (lane == 0) named[warp * each + r] = best;
        if (own == best) {  // then the next of this lane's
            own = 0;
#pragma unroll
            for (int i = 0; i < kKeys; ++i) own = max(own, keys[i] < best ? keys[i] : 0);
        }
    }
    if (thread < count) found[thread] = 0;
    if (thread == 0) {
        least = 0;
        left_count = 0;
    }
    __syncthreads();
    if (thread < kWarps * each && named[thread] > 0 && place_among(named, kWarps * each, named[thread]) == count - 1) {
        least = named[thread];
    }
    __syncthreads();
    const auto keep = [&](Candidate key) {  // in any order
        if (key > 0 && key >= least) left[atomicAdd(&left_count, 1)] = key;
    };
#pragma unroll
    for (int i = 0; i < kKeys; ++i) keep(keys[i]);
    if (before != nullptr && thread < count) keep(before[thread]);
    __syncthreads();
    for (int i = thread; i < left_count; i += kThreads) {
        const int place = place_among(left, left_count, left[i]);
        if (place < count) found[place] = left[i];
    }
    __syncthreads();
}

// One block for each image.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    move_beams_kernel(const T* logits, Restrictions restrictions, Scan scan, State state, Search search) {
    __shared__ int32_t sequences[kStaged], ancestors[kStaged], hypotheses[kStaged];
    __shared__ Candidate lists[2][kMaxCandidates];
    __shared__ float row_scores[kMaxBeams], row_highest[kMaxBeams], row_log_sum[kMaxBeams];
    __shared__ float old_ratings[kMaxBeams];
    __shared__ int32_t old_lengths[kMaxBeams];
    __shared__ int32_t parents[kMaxCandidates], tokens[kMaxCandidates];
    __shared__ Candidate going_on[kMaxCandidates], ratings[kMaxBeams + kMaxCandidates];
    __shared__ bool ends_well[kMaxCandidates];
    __shared__ int32_t ends[kMaxCandidates];
    __shared__ int chosen[kMaxBeams], ranking[kMaxBeams];
    allow_dependents();
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    if (thread < search.end_count) ends[thread] = search.ends[thread];  // constants
    wait_for_previous();

    const int beams = search.beams, vocabulary = search.vocabulary, kept = search.kept;
    const int64_t first = int64_t{blockIdx.x} * beams;  // row of the image
    const int32_t now = *scan.position, forced_token = restrictions.forced_at(now);
    const float penalty = search.penalties[search.entry(now)], hope = search.hopes[search.entry(now)];
    const bool is_finished = state.finished[blockIdx.x] > 0;

    // The tables come into shared memory some columns at a time; the first ones are on their way from the beginning.
    const int columns = static_cast<int>(min(search.capacity, int64_t{kStaged / beams}));
    const auto stage = [&](int64_t begin) {
        for (int i = thread; i < beams * columns; i += kThreads) {
            const int64_t column = begin + i % columns, source = (first + i / columns) * search.capacity + column;
            if (column >= search.capacity) continue;
            sequences[i] = state.sequences[source];
            ancestors[i] = state.ancestors[source];
            hypotheses[i] = state.hypotheses[source];
        }
    };
    const int segments = beams * scan.segments;
    const auto best_of_segment = [&](int i) { return i < segments ? scan.best[first * scan.segments + i] : 0; };
    Candidate scanned[kKeys];
#pragma unroll
    for (int i = 0; i < kKeys; ++i) scanned[i] = best_of_segment(i * kThreads + thread);
    stage(0);
    if (thread < beams) {
        row_scores[thread] = state.scores[first + thread];
        old_ratings[thread] = state.hypothesis_scores[first + thread];
        old_lengths[thread] = state.lengths[first + thread];
        chosen[thread] = ranking[thread] = 0;
    }
    for (int row = warp; row < beams; row += kWarps) {
        const Mass* masses = scan.masses + (first + row) * scan.chunks;
        Mass own{-FLT_MAX, 0};
        for (int c = lane; c < scan.chunks; c += 32) {
            const Mass other = masses[c];
            const float higher = fmaxf(own.highest, other.highest);
            own = {higher, own.sum * expf(own.highest - higher) + other.sum * expf(other.highest - higher)};
        }
        const float highest = warp_max(own.highest);
        const float sum = warp_sum(own.sum * expf(own.highest - highest));
        if (lane == 0) {
            row_highest[row] = forced_token >= 0 ? 0 : highest;
            row_log_sum[row] = forced_token >= 0 ? 0 : logf(sum);
        }
    }
    __syncthreads();

    // A continuation's total as a key, whose place is row · vocabulary + token.
    const auto key = [&](int row, float logit, int token) {
        const float total = logit - row_highest[row] - row_log_sum[row] + row_scores[row];
        return candidate(total, row * vocabulary + token);
    };

    // The segments to look into.
    const Candidate* best_segments = nullptr;
    for (int begin = 0, turn = 0; begin < segments; begin += kKeys * kThreads, turn ^= 1) {
        Candidate keys[kKeys];
#pragma unroll
        for (int i = 0; i < kKeys; ++i) {
            const int at = begin + i * kThreads + thread;
            const Candidate best = begin == 0 ? scanned[i] : best_of_segment(at);
            keys[i] = best == 0 ? 0 : key(at / scan.segments, score_of(best), place_of(best));
        }
        find_best(keys, kept, best_segments, lists[turn]);
        best_segments = lists[turn];
    }
    __shared__ int looked_into[kMaxCandidates];  // row · segments + segment
    if (thread < kept) {
        const auto place = static_cast<int>(place_of(best_segments[thread]));
        const int row = place / vocabulary;
        looked_into[thread] = best_segments[thread] == 0 ? -1 : row * scan.segments + place % vocabulary / kSegment;
    }
    __syncthreads();

    // The best continuations in them.
    const Candidate* best = nullptr;
    for (int begin = 0, turn = 0; begin < kept * kSegment; begin += kKeys * kThreads, turn ^= 1) {
        Candidate keys[kKeys];
        float logit[kKeys];
        int32_t from[kKeys];
        int row[kKeys], token[kKeys];
#pragma unroll
        for (int i = 0; i < kKeys; ++i) {
            const int at = begin + i * kThreads + thread;
            const int segment = at < kept * kSegment ? looked_into[at / kSegment] : -1;
            row[i] = segment / scan.segments;
            token[i] = segment < 0 ? vocabulary : segment % scan.segments * kSegment + at % kSegment;
            if (token[i] >= vocabulary) continue;
            logit[i] = to_float(logits[(first + row[i]) * vocabulary + token[i]]);
            from[i] = restrictions.from(token[i]);
        }
#pragma unroll
        for (int i = 0; i < kKeys; ++i) {
            keys[i] = 0;
            if (token[i] >= vocabulary) continue;
            keys[i] = key(row[i], restricted(logit[i], token[i], from[i], now, forced_token), token[i]);
        }
        find_best(keys, kept, best, lists[turn]);
        best = lists[turn];
    }

    // What each candidate is worth as a beam and as a hypothesis.
    const int32_t after = now + 1, length = now + 2;
    if (thread < kept) {
        const float total = score_of(best[thread]);
        const auto place = static_cast<int>(place_of(best[thread]));
        parents[thread] = place / vocabulary;
        tokens[thread] = place % vocabulary;
        bool ended = length >= search.max_length;
        for (int e = 0; e < search.end_count; ++e) ended |= tokens[thread] == ends[e];
        going_on[thread] = candidate(ended ? total + kOut : total, thread);
        ends_well[thread] = ended && thread < beams;
        const float rating = total / penalty;
        ratings[beams + thread] = candidate(ends_well[thread] ? rating : rating + kOut, beams + thread);
    }
    if (thread < beams) ratings[thread] = candidate(old_ratings[thread], thread);
    __syncthreads();
    if (thread < kept) {
        const int place = place_among(going_on, kept, going_on[thread]);
        if (place < beams) chosen[place] = thread;
    }
    const int rival = thread - kThreads / 2;
    if (rival >= 0 && rival < beams + kept) {
        const int place = place_among(ratings, beams + kept, ratings[rival]);
        if (place < beams) ranking[place] = rival;
    }
    __syncthreads();

    if (warp == 0) {
        const bool is_beam = lane < beams;
        float rating = INFINITY, score = 0;
        int32_t its_length = 1;
        if (is_beam) {
            const int source = is_finished ? lane : ranking[lane];
            rating = is_finished ? old_ratings[lane] : score_of(ratings[source]);
            its_length = source < beams ? old_lengths[source] : ends_well[source - beams] ? length : 0;
            score = score_of(going_on[chosen[lane]]);
            state.next_scores[first + lane] = score;
            state.next_hypothesis_scores[first + lane] = rating;
            state.next_lengths[first + lane] = its_length;
        }
        const bool full = __all_sync(kAllLanes, its_length > 0);
        const float worst = full ? -warp_max(-rating) : kOut;
        if (lane == 0) {
            const bool hopeless = score / hope <= worst;
            const bool over = hopeless || (full && search.stop_when_full);
            state.next_finished[blockIdx.x] = max(state.finished[blockIdx.x], int32_t{over});
            if (blockIdx.x == 0) *state.next_position = after;
        }
    }

    for (int64_t begin = 0; begin < search.capacity; begin += columns) {
        if (begin > 0) {
            __syncthreads();
            stage(begin);
            __syncthreads();
        }
        for (int i = thread; i < beams * columns; i += kThreads) {
            const int beam = i / columns, offset = i % columns;
            const int64_t column = begin + offset, target = (first + beam) * search.capacity + column;
            if (column >= search.capacity) continue;
            const auto extended = [&](int one) {
                return column == after ? tokens[one] : sequences[parents[one] * columns + offset];
            };
            const int parent = parents[chosen[beam]], source = is_finished ? beam : ranking[beam];
            state.next_sequences[target] = extended(chosen[beam]);
            state.next_ancestors[target] = column == now ? parent : ancestors[parent * columns + offset];
            state.next_hypotheses[target] =
                source < beams ? hypotheses[source * columns + offset] : extended(source - beams);
        }
    }
}

}  // namespace

int64_t beam_choice_workspace_bytes(int64_t rows, int64_t vocabulary) {
    const int64_t best = ceil_div(vocabulary, kSegment) * static_cast<int64_t>(sizeof(Candidate));
    const int64_t masses = ceil_div(vocabulary, kChunk) * static_cast<int64_t>(sizeof(Mass));
    return rows * (best + masses) + static_cast<int64_t>(sizeof(Candidate));
}

cudaError_t launch_beam_choice(DataType type, const void* logits, const int32_t* sequences, const float* scores,
                               const int32_t* ancestors, const int32_t* hypotheses, const int32_t* lengths,
                               const float* hypothesis_scores, const int32_t* position, const int32_t* finished,
                               const int32_t* allowed_from, const int32_t* forced, const int32_t* ends,
                               const float* penalties, const float* hopes, int32_t* next_sequences, float* next_scores,
                               int32_t* next_ancestors, int32_t* next_hypotheses, int32_t* next_lengths,
                               float* next_hypothesis_scores, int32_t* next_position, int32_t* next_finished,
                               void* workspace, int64_t images, int64_t beams, int64_t vocabulary, int64_t capacity,
                               int64_t restricted, int64_t forced_count, int64_t end_count, int64_t positions,
                               int64_t max_length, int64_t stop_when_full, cudaStream_t stream) {
    const int64_t kept = (1 + end_count) * beams;
    if (beams < 1 || beams > kMaxBeams || end_count < 1 || kept > kMaxCandidates || beams * vocabulary < kept ||
        (beams * vocabulary) > INT32_MAX - kChunk || forced_count < 1 || forced_count > INT32_MAX || positions < 1 ||
        positions > INT32_MAX || max_length > INT32_MAX || (restricted != 1 && restricted != vocabulary)) {
        return cudaErrorInvalidValue;
    }
    if (images == 0) return cudaSuccess;
    const Scan scan(workspace, images * beams, vocabulary);
    if (images * beams * scan.chunks > INT32_MAX) return cudaErrorInvalidValue;
    const Restrictions restrictions{allowed_from, forced, restricted == 1, static_cast<int>(forced_count)};
    const State state{sequences,    ancestors,         hypotheses,     lengths,        finished,
                      scores,       hypothesis_scores, next_sequences, next_ancestors, next_hypotheses,
                      next_lengths, next_finished,     next_position,  next_scores,    next_hypothesis_scores};
    const Search search{ends,
                        penalties,
                        hopes,
                        static_cast<int>(beams),
                        static_cast<int>(kept),
                        static_cast<int>(vocabulary),
                        static_cast<int>(end_count),
                        static_cast<int>(positions),
                        static_cast<int>(max_length),
                        capacity,
                        stop_when_full != 0};
    cudaError_t error = cudaSuccess;
    const cudaError_t launched = dispatch(type, [&](auto tag) {
        using T = decltype(tag);
        error = launch_dependent(scan_logits_kernel<T>, static_cast<unsigned>(images * beams * scan.chunks),
                                 kScanThreads, 0, stream, static_cast<const T*>(logits), position, restrictions, scan,
                                 static_cast<int>(vocabulary));
        if (error) return;
        error = launch_dependent(move_beams_kernel<T>, static_cast<unsigned>(images), kThreads, 0, stream,
                                 static_cast<const T*>(logits), restrictions, scan, state, search);
    });
    return error ? error : launched;
}

}  // namespace trt_graft
