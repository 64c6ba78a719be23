// Linear layers of one new token for each row, whose input may pass a LayerNorm first: what layer_norm_linear,
// layer_norm_qkv and linear_residual share.
//
// Floor: weights are read once, however many rows there are; all the rest is small.  Steps of a decoder follow each
// other at once and each has but a few bytes for each multiprocessor, so what counts is how early these are on their
// way:
//
//   - few_rows_kernel and cluster_linear_kernel, where the GPU has bulk copies and clusters (compute capability 9.0),
//     take 256, 512, 1024 or, without LayerNorm, 4096 inputs: weights come into shared memory while the kernel before
//     still runs (see dependent_launch.cuh).
//   - decode_linear_kernel takes all other rows that begin on boundaries, and few rows of so many outputs that blocks
//     must take turns: weights come into registers.
//   - All other types and sizes are multiplied on FP32 units, by a warp for each output.
//
// The sums of several warps are added in a fixed order: results repeat bit for bit.
//
// With tensor cores as in pointwise.cuh: lane (group, pair) multiplies inputs 8·pair … 8·pair + 7 of a granule of 32,
// of rows group and group + 8, by those of output `group` of a tile of 8.
#pragma once

#include <algorithm>

#include "common/bulk_copy.cuh"
#include "common/cluster.cuh"
#include "common/dependent_launch.cuh"
#include "common/gelu.cuh"
#include "common/pointwise.cuh"

namespace trt_graft {

constexpr int kMaxSplits = 3;  // parts of the outputs, each a tensor of its own
constexpr int kMaxDecodeRows = 1 << 20;
constexpr int kDecodeLinearWarps = 8;  // of a block, at most: more would have fewer registers for weights
constexpr int kOutputTile = 8;
constexpr int kMaxLoads = 16;  // of 16 bytes by each lane: tiles of outputs · granules

// y = activation(h · weightᵀ + bias + residual), where h is LayerNorm(x) or x itself.
//
// weight, bias, gamma and beta are constants: they are read while other kernels still run.
template <typename T>
struct DecodeLinear {
    const T* x;                        // (rows, inputs)
    const T *gamma, *beta;             // (inputs); nullptr: no LayerNorm
    const T *weight, *bias;            // (outputs, inputs), (outputs)
    const T* residual;                 // (rows, outputs) or nullptr
    T* h;                              // (rows, inputs) or nullptr
    T* y[kMaxSplits];                  // (rows, width) each
    int rows, inputs, outputs, width;  // outputs: of all splits; width: of one
    float epsilon;
    Activation activation;

    __device__ void store(int row, int output, float sum) const {
        sum = activated(sum, activation);
        T* target = y[0];
        for (int i = 1; i < kMaxSplits; ++i) {
            if (output >= width) {
                target = y[i];
                output -= width;
            }
        }
        target[int64_t{row} * width + output] = from_float<T>(sum);
    }
};

// ---- Tensor cores, weights through registers ------------------------------------------------------------------------

// A block takes up to 32 outputs, its warps divide the inputs between them.  What a warp needs of the weights it loads
// into registers, all of it, while the kernel before still runs.  Then x comes through shared memory, in tiles of 16
// rows: each warp copies and reads back what it multiplies.

// How a kernel shares out its work.
struct DecodePlan {
    int halves;     // of 8 rows in a tile of rows: 1 or 2
    int row_tiles;  // that are in shared memory at once
    int blocks;     // of TILES·8 outputs
};

// Shared memory: rows as fragments, gamma, beta, a mean and a sum of squares for each row and warp, and sums.
template <int TILES, int GRANULES>
struct DecodeShared {
    // Floats from one row of sums to the next: rows of two or four tiles would begin on the same banks.
    static constexpr int kPitch = TILES * kOutputTile + (TILES % 2 ? 0 : 8);

    int fragments, parameters, statistics, bytes;  // where each part ends

    __host__ __device__ DecodeShared(bool norm, int warps, int inputs, const DecodePlan& plan) {
        fragments = plan.row_tiles * plan.halves * warps * GRANULES * kFragmentBytes;
        parameters = fragments + (norm ? 2 * inputs * static_cast<int>(sizeof(__half)) : 0);
        statistics =
            parameters + (norm ? plan.row_tiles * plan.halves * 8 * warps * static_cast<int>(sizeof(float2)) : 0);
        bytes = statistics + warps * plan.halves * 8 * kPitch * static_cast<int>(sizeof(float));
    }
};

// 16 bytes that nobody reads again, or zeros.
__device__ inline uint4 load_streamed(const __half* source, bool exists) {
    uint4 words;
    asm volatile(
        "{\n"
        ".reg .pred exists;\n"
        "setp.ne.s32 exists, %5, 0;\n"
        "mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
        "@exists ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];\n"
        "}\n"
        : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
        : "l"(source), "r"(static_cast<int>(exists)));
    return words;
}

// Registers for two blocks on a multiprocessor: this kernel's and the next one's.
template <int TILES, int GRANULES, bool NORM>
__global__ void __launch_bounds__(kDecodeLinearWarps * 32, 2)
    decode_linear_kernel(const DecodeLinear<__half> a, const DecodePlan plan) {
    static_assert(TILES * GRANULES <= kMaxLoads);
    using Layout = DecodeShared<TILES, GRANULES>;
    constexpr int kOutputs = TILES * kOutputTile;
    constexpr unsigned kAllLanes = 0xffffffffu;
    extern __shared__ uint4 shared[];
    allow_dependents();

    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int group = lane / 4, pair = lane % 4;
    const Layout layout(NORM, warps, a.inputs, plan);
    char* const bytes = reinterpret_cast<char*>(shared);
    uint4* const fragments = shared + warp * GRANULES * 32;
    auto* const gamma = reinterpret_cast<__half*>(bytes + layout.fragments);
    auto* const statistics = reinterpret_cast<float2*>(bytes + layout.parameters);
    auto* const sums = reinterpret_cast<float*>(bytes + layout.statistics);
    const int height = 8 * plan.halves;            // rows of a tile
    const int begin = warp * GRANULES * kGranule;  // the warp's first input
    const auto input = [&](int g) { return begin + g * kGranule + 8 * pair; };
    // Granule g of row r of 8·half … 8·half + 7: what lane (r, pair) multiplies.
    const auto fragment = [&](int half, int r, int g) -> uint4& {
        return fragments[(half * warps * GRANULES + g) * 32 + r * 4 + pair];
    };

    uint4 weights[TILES][GRANULES];
    const auto load_weights = [&](int block) {
        for (int t = 0; t < TILES; ++t) {
            const int output = min(block * kOutputs + t * kOutputTile + group, a.outputs - 1);
            const __half* const row = a.weight + int64_t{output} * a.inputs + input(0);
            for (int g = 0; g < GRANULES; ++g) weights[t][g] = load_streamed(row + g * kGranule, input(g) < a.inputs);
        }
    };
    load_weights(blockIdx.x);
    if constexpr (NORM) {
        for (int i = 8 * threadIdx.x; i < a.inputs; i += 8 * blockDim.x) {
            __pipeline_memcpy_async(gamma + i, a.gamma + i, 16);
            __pipeline_memcpy_async(gamma + a.inputs + i, a.beta + i, 16);
        }
    }
    // To prepare x, the eight groups divide 1, 2, 4 or 8 rows between them; those of one row take turns with its
    // granules.
    const int rows = plan.halves == 2 || a.rows > 4 ? 8 : a.rows > 2 ? 4 : a.rows;
    const int r = group % rows, first_granule = group / rows, next_granule = 8 / rows;
    if (group >= rows) {  // rows that are not there
        for (int g = 0; g < GRANULES; ++g) fragment(0, group, g) = {};
    }
    wait_for_previous();

    const int row_tiles = static_cast<int>(ceil_div(a.rows, height));
    for (int first = 0; first < row_tiles; first += plan.row_tiles) {
        const int count = min(plan.row_tiles, row_tiles - first);
#pragma unroll 1
        for (int half = 0; half < count * plan.halves; ++half) {
            const int row = first * height + half * 8 + r;
            for (int g = first_granule; g < GRANULES; g += next_granule) {
                if (row < a.rows && input(g) < a.inputs) {
                    __pipeline_memcpy_async(&fragment(half, r, g), a.x + int64_t{row} * a.inputs + input(g), 16);
                } else {
                    fragment(half, r, g) = {};
                }
            }
        }
        __pipeline_commit();

        // What is added to the sum of the thread's first element: loaded early.
        __half bias, residual;
        const auto load_addends = [&](int block, int tile) {
            const int row = (first + tile) * height + static_cast<int>(threadIdx.x) / kOutputs;
            const int output = block * kOutputs + static_cast<int>(threadIdx.x) % kOutputs;
            const bool exist = row < a.rows && output < a.outputs;
            bias = exist ? a.bias[output] : __half();
            residual = exist && !NORM ? a.residual[int64_t{row} * a.outputs + output] : __half();
        };
        load_addends(blockIdx.x, 0);
        __pipeline_wait_prior(0);

        if constexpr (NORM) {
            // Mean and sum of squared deviations of the warp's inputs, then of all: as exact as two passes.  Means are
            // quotients, not products with 1 / inputs: for equal inputs they must be exact, since epsilon is small.
            const auto sum_of_row = [&](float x) {
                for (int offset = 1; offset < 4; offset *= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
                for (int offset = 4 * rows; offset < 32; offset *= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
                return x;
            };
            const auto inputs_of = [&](int w) { return min(a.inputs - w * GRANULES * kGranule, GRANULES * kGranule); };
#pragma unroll 1
            for (int half = 0; half < count * plan.halves; ++half) {
                float mean = 0, squares = 0, x[8];
                for (int g = first_granule; g < GRANULES; g += next_granule) {
                    unpack(fragment(half, r, g), x);
                    for (int n = 0; n < 8; ++n) mean += x[n];
                }
                mean = sum_of_row(mean) / inputs_of(warp);
                for (int g = first_granule; g < GRANULES; g += next_granule) {
                    if (input(g) >= a.inputs) continue;
                    unpack(fragment(half, r, g), x);
                    for (int n = 0; n < 8; ++n) squares += (x[n] - mean) * (x[n] - mean);
                }
                squares = sum_of_row(squares);
                if (lane < 4 * rows && pair == 0) {
                    statistics[(warp * count * plan.halves + half) * 8 + r] = {mean, squares};
                }
            }
            __syncthreads();
#pragma unroll 1
            for (int half = 0; half < count * plan.halves; ++half) {
                constexpr int kShare = kDecodeLinearWarps / 4;  // the lanes of a row divide the warps between them
                float2 statistic[kShare];
                float mean = 0, squares = 0;
                for (int i = 0; i < kShare; ++i) {
                    const int w = pair + 4 * i;
                    if (w < warps) statistic[i] = statistics[(w * count * plan.halves + half) * 8 + r];
                    if (w < warps) mean += statistic[i].x * inputs_of(w);
                }
                for (int offset = 1; offset < 4; offset *= 2) mean += __shfl_xor_sync(kAllLanes, mean, offset);
                mean /= a.inputs;
                for (int i = 0; i < kShare; ++i) {
                    const int w = pair + 4 * i;
                    const float deviation = statistic[i].x - mean;
                    if (w < warps) squares += statistic[i].y + deviation * deviation * inputs_of(w);
                }
                for (int offset = 1; offset < 4; offset *= 2) squares += __shfl_xor_sync(kAllLanes, squares, offset);
                const float scale = rsqrtf(squares / a.inputs + a.epsilon);

                const int row = first * height + half * 8 + r;
                const bool mine = (half * warps + warp) % gridDim.x == blockIdx.x;  // the block that stores this of h
                for (int g = first_granule; g < GRANULES; g += next_granule) {
                    if (row >= a.rows || input(g) >= a.inputs) continue;  // zeros
                    float x[8], factors[8], terms[8];
                    unpack(fragment(half, r, g), x);
                    unpack(*reinterpret_cast<const uint4*>(gamma + input(g)), factors);
                    unpack(*reinterpret_cast<const uint4*>(gamma + a.inputs + input(g)), terms);
                    for (int n = 0; n < 8; ++n) x[n] = (x[n] - mean) * scale * factors[n] + terms[n];
                    const uint4 normalised = fragment(half, r, g) = pack(x);
                    if (mine) *reinterpret_cast<uint4*>(a.h + int64_t{row} * a.inputs + input(g)) = normalised;
                }
            }
        }
        __syncwarp();

        for (int block = blockIdx.x; block < plan.blocks; block += gridDim.x) {
            for (int tile = 0; tile < count; ++tile) {
                if (tile > 0 || block != blockIdx.x) load_addends(block, tile);
                float c[TILES][4] = {};
                for (int g = 0; g < GRANULES; ++g) {
                    const uint4 upper = fragment(tile * plan.halves, group, g);
                    const uint4 lower = plan.halves == 2 ? fragment(tile * plan.halves + 1, group, g) : uint4{};
                    for (int t = 0; t < TILES; ++t) multiply_granule(c[t], upper, lower, weights[t][g]);
                }
                if (tile == count - 1) {  // the next weights, while sums are added
                    if (block + gridDim.x < plan.blocks) {
                        load_weights(block + gridDim.x);
                    } else if (block != blockIdx.x && first + count < row_tiles) {
                        load_weights(blockIdx.x);
                    }
                }
                float* const row = sums + (warp * height + group) * Layout::kPitch + 2 * pair;
                for (int t = 0; t < TILES; ++t) {
                    *reinterpret_cast<float2*>(row + t * kOutputTile) = {c[t][0], c[t][1]};
                    if (plan.halves == 2) {
                        *reinterpret_cast<float2*>(row + 8 * Layout::kPitch + t * kOutputTile) = {c[t][2], c[t][3]};
                    }
                }
                __syncthreads();
#pragma unroll 1
                for (int i = threadIdx.x; i < height * kOutputs; i += blockDim.x) {
                    const int r = (first + tile) * height + i / kOutputs, output = block * kOutputs + i % kOutputs;
                    if (r >= a.rows || output >= a.outputs) continue;
                    float sum = 0;
                    const float* const part = sums + i / kOutputs * Layout::kPitch + i % kOutputs;
#pragma unroll 4
                    for (int w = 0; w < warps; ++w) sum += part[w * height * Layout::kPitch];
                    if (i != threadIdx.x) {
                        bias = a.bias[output];
                        if (!NORM) residual = a.residual[int64_t{r} * a.outputs + output];
                    }
                    sum += to_float(bias);
                    if (!NORM) sum += to_float(residual);
                    a.store(r, output, sum);
                }
                __syncthreads();
            }
        }
    }
}

// ---- Tensor cores, weights through shared memory (compute capability 9.0) -------------------------------------------

// Weights on their way into registers can hold up what the same multiprocessor loads after them: one kernel's x behind
// the next kernel's weights.  The engine for bulk copies works beside all that.  A block asks it for the rows of its
// weights, whole ones or an eighth of each, and they lie in shared memory when x comes.
//
//   Up to 8 rows of x   Each block has all inputs of its outputs.  Its warps divide them between them, and load what
//                       they multiply of x straight into fragments.
//   More rows           Eight blocks in a cluster divide the inputs of eight times as many outputs: each loads and
//                       normalises an eighth of x, not all of it.  They exchange parts of the rows' statistics and of
//                       the sums through shared memory; of the outputs each completes an eighth.

constexpr int kFewRows = 8;        // up to which blocks work alone
constexpr int kClusterBlocks = 8;  // among which inputs are divided
constexpr int kClusterRows = 32;   // of x that a cluster takes at a time

// Rows of 64·granules bytes in shared memory, as numbers of 16 bytes.  Lanes of a fragment read 64 bytes of each of
// eight rows, those of two rows at once: of rows i and i + 4, which 64 more bytes behind every fourth row put on
// different banks.
__host__ __device__ constexpr int row_offset(int row, int granules) { return 4 * (row * granules + row / 4); }

// Which of eight rows that is for the lanes of a group.
__device__ inline int row_of(int group) { return group % 2 * 4 + group / 2; }

// target = x in a block of the cluster, where `target` is the variable's address in the caller's own shared memory.
__device__ inline void store_in_block(float4* target, int block, const float4& x) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n"
        ".reg .b32 address;\n"
        "mapa.shared::cluster.u32 address, %0, %1;\n"
        "st.shared::cluster.v4.f32 [address], {%2, %3, %4, %5};\n"
        "}\n" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(target))),
        "r"(block), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
        : "memory");
#endif
}

__device__ inline void store_in_block(float2* target, int block, const float2& x) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n"
        ".reg .b32 address;\n"
        "mapa.shared::cluster.u32 address, %0, %1;\n"
        "st.shared::cluster.v2.f32 [address], {%2, %3};\n"
        "}\n" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(target))),
        "r"(block), "f"(x.x), "f"(x.y)
        : "memory");
#endif
}

// Starts to copy granules of the inputs from `begin` on: of OUTPUTS rows of weights, or as many as there are, and of
// gamma and beta.  Each has a barrier: x needs gamma and beta first.
template <int OUTPUTS, int GRANULES, int INPUTS, bool NORM>
__device__ void copy_constants(uint64_t* barriers, uint4* weights, uint4* parameters, const DecodeLinear<__half>& a,
                               int first, int begin) {
    constexpr int kBytes = GRANULES * kGranule * static_cast<int>(sizeof(__half));
    const int warp = threadIdx.x / 32, count = min(OUTPUTS, a.outputs - first);
    if (threadIdx.x == 0) {
        expect_copies(barriers, count * kBytes);
        if (NORM) expect_copies(barriers + 1, 2 * kBytes);
    }
    __syncthreads();
    if (threadIdx.x % 32 > 0) return;  // copies of one warp follow each other: share them out
    if (NORM && warp < 2) {
        copy_bulk(parameters + warp * GRANULES * 4, (warp ? a.beta : a.gamma) + begin, kBytes, barriers + 1);
    }
    const __half* source = a.weight + int64_t{first + warp} * INPUTS + begin;
    uint4* target = weights + row_offset(warp, GRANULES);
    for (int i = warp; i < count; i += kDecodeLinearWarps) {
        copy_bulk(target, source, kBytes, barriers);
        source += kDecodeLinearWarps * INPUTS;
        target += row_offset(kDecodeLinearWarps, GRANULES);
    }
}

// Sums of deviations from a row's first value and of their squares.  So a constant row has neither, the exact mean and
// no variance, and one pass is enough: it would lose what counts only where that value is far off all the others, but
// then it is most of the variance itself.
struct Deviations {
    float sum = 0, squares = 0;

    __device__ void add(const uint4& words, float origin) {
        float x[8];
        unpack(words, x);
        for (int n = 0; n < 8; ++n) x[n] -= origin;
        sum += ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
        float even = x[0] * x[0], odd = x[1] * x[1];
        for (int n = 2; n < 8; n += 2) {
            even += x[n] * x[n];
            odd += x[n + 1] * x[n + 1];
        }
        squares += even + odd;
    }
    // Over lanes whose numbers differ in the bits from `begin` on, below `end`.
    __device__ void add_lanes(int begin, int end) {
        for (int offset = begin; offset < end; offset *= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, offset);
            squares += __shfl_xor_sync(0xffffffffu, squares, offset);
        }
    }
};

struct Normalisation {
    float mean, scale;

    // From eight parts of a row, `step` apart.
    template <int INPUTS>
    static __device__ Normalisation of(const float2* parts, int step, float origin, float epsilon) {
        float sum = 0, squares = 0;
        for (int i = 0; i < 8; ++i) {
            const float2 part = parts[i * step];
            sum += part.x;
            squares += part.y;
        }
        constexpr float kShare = 1.0f / INPUTS;
        const float variance = fmaxf(squares - sum * sum * kShare, 0) * kShare;
        return {origin + sum * kShare, rsqrtf(variance + epsilon)};
    }
    __device__ uint4 operator()(const uint4& words, const uint4& gamma, const uint4& beta) const {
        float x[8], factors[8], terms[8];
        unpack(words, x);
        unpack(gamma, factors);
        unpack(beta, terms);
        for (int n = 0; n < 8; ++n) x[n] = (x[n] - mean) * scale * factors[n] + terms[n];
        return pack(x);
    }
};

// Sums of tiles, each in CHAINS parts: an instruction of tensor cores takes long, and each waits for the one before it
// that adds to the same sums.
template <int TILES, int GRANULES>
struct TileSums {
    static constexpr int kMost = TILES > 2 ? 1 : 4 / TILES;
    static constexpr int kChains = kMost < 2 * GRANULES ? kMost : 2 * GRANULES;
    float parts[kChains][TILES][4] = {};

    // As multiply_granule does, for granule `g`.
    __device__ void add(int t, int g, const uint4& upper, const uint4& lower, const uint4& weights) {
        multiply_add(parts[2 * g % kChains][t], {upper.x, lower.x, upper.y, lower.y}, weights.x, weights.y);
        multiply_add(parts[(2 * g + 1) % kChains][t], {upper.z, lower.z, upper.w, lower.w}, weights.z, weights.w);
    }
    __device__ float operator()(int t, int i) const {
        float sum = parts[0][t][i];
        for (int k = 1; k < kChains; ++k) sum += parts[k][t][i];
        return sum;
    }
};

__device__ inline uint4 load_words(const __half* source) { return *reinterpret_cast<const uint4*>(source); }

// Shared memory, in numbers of 16 bytes: where each part ends.
template <int TILES, int GRANULES>
struct FewRowsShared {
    static constexpr int kOutputs = TILES * kOutputTile, kRowGranules = GRANULES * kDecodeLinearWarps;
    static constexpr int kBarriers = 8;
    static constexpr int kWeights = kBarriers + row_offset(kOutputs, kRowGranules);
    static constexpr int kParameters = kWeights + 2 * 4 * kRowGranules;                  // gamma, beta
    static constexpr int kStatistics = kParameters + kDecodeLinearWarps * kFewRows / 2;  // float2
    static constexpr int kRows = kStatistics + kDecodeLinearWarps * 32;

    // Where a warp leaves element i of 64 of its sums of a tile: in place of those weights that it alone has read.
    static __device__ float* sum(uint4* weights, int warp, int tile, int i) {
        constexpr int kFloats = GRANULES * 16;  // of a row
        uint4* const row = weights + row_offset(tile * kOutputTile + i / kFloats, kRowGranules);
        return reinterpret_cast<float*>(row + warp * GRANULES * 4) + i % kFloats;
    }
};

// Up to ROWS rows.  Each warp has GRANULES of the inputs.
template <int TILES, int GRANULES, int ROWS, bool NORM>
__global__ void __launch_bounds__(kDecodeLinearWarps * 32, GRANULES > 4 ? 2 : 3)
    few_rows_kernel(const DecodeLinear<__half> a) {
    using Layout = FewRowsShared<TILES, GRANULES>;
    constexpr int kInputs = Layout::kRowGranules * kGranule;
    extern __shared__ uint4 shared[];
    allow_dependents();
    if (!clusters_exist()) return;

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
    auto* const barriers = reinterpret_cast<uint64_t*>(shared);
    uint4* const weights = shared + Layout::kBarriers;
    uint4* const parameters = shared + Layout::kWeights;
    auto* const statistics = reinterpret_cast<float2*>(shared + Layout::kParameters);
    uint4* const rows = shared + Layout::kStatistics + warp * 32;
    const int first_output = blockIdx.x * Layout::kOutputs;
    copy_constants<Layout::kOutputs, Layout::kRowGranules, kInputs, NORM>(barriers, weights, parameters, a,
                                                                          first_output, 0);

    // The sum that this thread completes: element threadIdx.x of the tiles' fragments.
    const int tile = threadIdx.x / 64, element = threadIdx.x % 64, result_row = element / 8;
    const int output = first_output + tile * kOutputTile + row_of(element % 8);
    const bool completes = tile < TILES && result_row < a.rows && output < a.outputs;
    const __half bias = completes ? a.bias[output] : __half();
    wait_for_previous();

    // The groups divide the rows between them, and take turns with the granules of one.
    constexpr int kTurns = 8 / ROWS, kShare = GRANULES / kTurns;
    const int row = group % ROWS, turn = group / ROWS;
    const bool exists = row < a.rows;
    const int place = (warp * GRANULES + turn) * 4 + pair, start = row * kInputs + place * 8;
    uint4 x[GRANULES] = {};
    float origin = 0;
    if (exists) {
        if (NORM) origin = to_float(a.x[row * kInputs]);
        for (int i = 0; i < kShare; ++i) x[i] = load_words(a.x + start + i * kTurns * kGranule);
    }
    const __half residual = !NORM && completes ? a.residual[result_row * a.outputs + output] : __half();

    if constexpr (NORM) {
        Deviations deviations;
        for (int i = 0; i < kShare; ++i) deviations.add(x[i], origin);
        deviations.add_lanes(1, 4);
        deviations.add_lanes(4 * ROWS, 32);
        if (turn == 0 && pair == 0) statistics[warp * kFewRows + row] = {deviations.sum, deviations.squares};
        wait_for_copies(barriers + 1);
        __syncthreads();
        const auto normalise = Normalisation::of<kInputs>(statistics + row, kFewRows, origin, a.epsilon);
        const uint4* const gamma = parameters + place;
        const bool mine = exists && min(warp, static_cast<int>(gridDim.x) - 1) ==
                                        static_cast<int>(blockIdx.x);  // the block that stores this of h
        for (int i = 0; i < kShare; ++i) {
            x[i] = normalise(x[i], gamma[i * kTurns * 4], gamma[(Layout::kRowGranules + i * kTurns) * 4]);
            if (mine) *reinterpret_cast<uint4*>(a.h + start + i * kTurns * kGranule) = x[i];
        }
    }
    if constexpr (ROWS < 8) {  // all granules for each group; groups behind the last row have one of the rows again
        static_assert(kShare == 1);
        rows[lane] = x[0];
        __syncwarp();
        for (int g = 0; g < GRANULES; ++g) x[g] = rows[(g * ROWS + row) * 4 + pair];
    }

    wait_for_copies(barriers);
    TileSums<TILES, GRANULES> c;
    const uint4* const factors = weights + row_offset(row_of(group), Layout::kRowGranules) + warp * GRANULES * 4 + pair;
    for (int g = 0; g < GRANULES; ++g) {
        for (int t = 0; t < TILES; ++t) {
            c.add(t, g, x[g], {}, factors[row_offset(t * kOutputTile, Layout::kRowGranules) + 4 * g]);
        }
    }
    __syncwarp();
    for (int t = 0; t < TILES; ++t) {
        *reinterpret_cast<float2*>(Layout::sum(weights, warp, t, 2 * lane)) = {c(t, 0), c(t, 1)};
    }
    __syncthreads();
    if (!completes) return;
    float sum = 0;
    for (int w = 0; w < kDecodeLinearWarps; ++w) sum += *Layout::sum(weights, w, tile, element);
    sum += to_float(bias);
    if (!NORM) sum += to_float(residual);
    a.store(result_row, output, sum);
}

// DEPTH warps divide the block's inputs between them, GRANULES for each; the others have other outputs.
template <int TILES, int GRANULES, int DEPTH>
struct ClusterShared {
    static_assert(TILES % DEPTH == 0);
    static constexpr int kOutputs = kDecodeLinearWarps / DEPTH * TILES * kOutputTile;  // of the cluster
    static constexpr int kRowGranules = GRANULES * DEPTH;                              // of the block
    static constexpr int kTiles = TILES / DEPTH;                                       // that the block completes
    static constexpr int kParts = kClusterBlocks * DEPTH;                              // of a sum
    static constexpr int kBarriers = 8;
    static constexpr int kWeights = kBarriers + row_offset(kOutputs, kRowGranules);
    static constexpr int kRows = kWeights + row_offset(kClusterRows, kRowGranules);
    static constexpr int kParameters = kRows + 2 * 4 * kRowGranules;                     // gamma, beta
    static constexpr int kStatistics = kParameters + kClusterBlocks * kClusterRows / 2;  // float2
    static constexpr int kSums = kStatistics + kParts * kTiles * 2 * 32;                 // float4
};

// Any number of rows, in clusters.
template <int TILES, int GRANULES, int DEPTH, bool NORM>
__global__ void __launch_bounds__(kDecodeLinearWarps * 32, 2) cluster_linear_kernel(const DecodeLinear<__half> a) {
    using Layout = ClusterShared<TILES, GRANULES, DEPTH>;
    constexpr int kBlockInputs = Layout::kRowGranules * kGranule, kInputs = kClusterBlocks * kBlockInputs;
    extern __shared__ uint4 shared[];
    allow_dependents();
    if (!clusters_exist()) return;

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
    const int cluster = blockIdx.x / kClusterBlocks, rank = blockIdx.x % kClusterBlocks;
    auto* const barriers = reinterpret_cast<uint64_t*>(shared);
    uint4* const weights = shared + Layout::kBarriers;
    uint4* const rows = shared + Layout::kWeights;
    uint4* const parameters = shared + Layout::kRows;
    auto* const statistics = reinterpret_cast<float2*>(shared + Layout::kParameters);
    auto* const sums = reinterpret_cast<float4*>(shared + Layout::kStatistics);
    copy_constants<Layout::kOutputs, Layout::kRowGranules, kInputs, NORM>(
        barriers, weights, parameters, a, cluster * Layout::kOutputs, rank * kBlockInputs);
    cluster_begin();

    // The lanes that share a row of x, and how many times 16 bytes of it each has.
    constexpr int kLanes = Layout::kRowGranules == 1 ? 4 : 8, kShare = Layout::kRowGranules * 4 / kLanes;
    const int row = static_cast<int>(threadIdx.x) / kLanes, place = threadIdx.x % kLanes;
    const int input = rank * kBlockInputs + 8 * place;
    const bool takes = row < kClusterRows;
    // The sums that this thread completes: element threadIdx.x of two fragments of each of the block's tiles.
    const int result_row = threadIdx.x / 128 * 16 + threadIdx.x % 4 / 2 * 8 + row_of(threadIdx.x % 128 / 16);
    const int output = cluster * Layout::kOutputs + rank * Layout::kTiles * kOutputTile +
                       row_of(threadIdx.x % 16 / 4 * 2 + threadIdx.x % 2);
    __half bias[Layout::kTiles], residual[Layout::kTiles];
    for (int t = 0; t < Layout::kTiles; ++t) {
        bias[t] = output + t * kOutputTile < a.outputs ? a.bias[output + t * kOutputTile] : __half();
    }
    cluster_wait();
    wait_for_previous();

    for (int first = 0; first < a.rows; first += kClusterRows) {
        const bool exists = takes && first + row < a.rows;
        const int64_t start = int64_t{first + row} * kInputs;
        uint4* const target = rows + row_offset(row, Layout::kRowGranules) + place;
        const bool completes = first + result_row < a.rows;
        for (int t = 0; t < Layout::kTiles; ++t) {
            const bool added = !NORM && completes && output + t * kOutputTile < a.outputs;
            const int64_t index = int64_t{first + result_row} * a.outputs + output + t * kOutputTile;
            residual[t] = added ? a.residual[index] : __half();
        }
        if constexpr (NORM) {
            uint4 x[kShare] = {};
            float origin = 0;
            if (exists) {
                origin = to_float(a.x[start]);
                for (int i = 0; i < kShare; ++i) x[i] = load_words(a.x + start + input + i * kLanes * 8);
            }
            Deviations deviations;
            for (int i = 0; i < kShare; ++i) deviations.add(x[i], origin);
            deviations.add_lanes(1, kLanes);
            if (takes) {  // each lane tells another block
                for (int block = place; block < kClusterBlocks; block += kLanes) {
                    store_in_block(&statistics[rank * kClusterRows + row], block, {deviations.sum, deviations.squares});
                }
            }
            cluster_arrive();
            wait_for_copies(barriers + 1);
            cluster_wait();
            if (takes) {
                const auto normalise = Normalisation::of<kInputs>(statistics + row, kClusterRows, origin, a.epsilon);
                const uint4* const gamma = parameters + place;
                for (int i = 0; i < kShare; ++i) {
                    target[i * kLanes] =
                        normalise(x[i], gamma[i * kLanes], gamma[Layout::kRowGranules * 4 + i * kLanes]);
                }
            }
        } else {
            if (first > 0) {  // nobody reads the last sums any more
                cluster_arrive();
                cluster_wait();
            }
            if (takes) {
                for (int i = 0; i < kShare; ++i) {
                    if (exists) {
                        __pipeline_memcpy_async(target + i * kLanes, a.x + start + input + i * kLanes * 8, 16);
                    } else {
                        target[i * kLanes] = {};
                    }
                }
            }
            __pipeline_commit();
            __pipeline_wait_prior(0);
        }
        __syncthreads();
        wait_for_copies(barriers);

        const int column = warp / DEPTH, depth = warp % DEPTH;
        const auto multiply = [&](auto tiles_of_rows) {
            constexpr int HALVES = decltype(tiles_of_rows)::value;  // of 16 rows
            TileSums<TILES * HALVES, GRANULES> c;
            const int place = row_offset(row_of(group), Layout::kRowGranules) + depth * GRANULES * 4 + pair;
            const uint4* const x = rows + place;
            const uint4* const factors =
                weights + row_offset(column * TILES * kOutputTile, Layout::kRowGranules) + place;
#pragma unroll
            for (int g = 0; g < GRANULES; ++g) {
                uint4 upper[HALVES], lower[HALVES];
                for (int i = 0; i < HALVES; ++i) {
                    upper[i] = x[row_offset(16 * i, Layout::kRowGranules) + 4 * g];
                    lower[i] = x[row_offset(16 * i + 8, Layout::kRowGranules) + 4 * g];
                }
                for (int t = 0; t < TILES; ++t) {
                    const uint4 factor = factors[row_offset(t * kOutputTile, Layout::kRowGranules) + 4 * g];
                    for (int i = 0; i < HALVES; ++i) c.add(t * HALVES + i, g, upper[i], lower[i], factor);
                }
            }
            for (int t = 0; t < TILES; ++t) {
                const int block = column * DEPTH + t / Layout::kTiles, tile = t % Layout::kTiles;
                float4* const part = sums + ((rank * DEPTH + depth) * Layout::kTiles + tile) * 64 + lane;
                for (int i = 0; i < HALVES; ++i) {
                    const int k = t * HALVES + i;
                    store_in_block(part + 32 * i, block, {c(k, 0), c(k, 1), c(k, 2), c(k, 3)});
                }
            }
        };
        if (a.rows - first > 16) {
            multiply(Int<2>{});
        } else {
            multiply(Int<1>{});
        }
        cluster_arrive();
        // Of h, clusters store a row or two each; only now, since a barrier waits for stores before it.
        if (NORM && exists && min(row / 2, static_cast<int>(gridDim.x) / kClusterBlocks - 1) == cluster) {
            for (int i = 0; i < kShare; ++i) {
                *reinterpret_cast<uint4*>(a.h + start + input + i * kLanes * 8) = target[i * kLanes];
            }
        }
        cluster_wait();
        for (int t = 0; t < Layout::kTiles; ++t) {
            if (!completes || output + t * kOutputTile >= a.outputs) continue;
            float sum = 0;
            const float* const part = reinterpret_cast<const float*>(sums) + t * 256 + threadIdx.x;
            for (int i = 0; i < Layout::kParts; ++i) sum += part[i * Layout::kTiles * 256];
            sum += to_float(bias[t]);
            if (!NORM) sum += to_float(residual[t]);
            a.store(first + result_row, output + t * kOutputTile, sum);
        }
    }
}

// launch_dependent for clusters with dynamic shared memory.  Where a grid is more than the GPU holds at once, it is not
// launched early: blocks of the next kernel would take the place of its own.
template <typename Kernel>
cudaError_t launch_clusters(Kernel kernel, int blocks, unsigned grid, bool early, int shared_bytes, cudaStream_t stream,
                            const DecodeLinear<__half>& a) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
#ifdef TRT_GRAFT_EARLY_LAUNCH  // see launch_dependent
    bool possible = false;
    if (!error) error = find_whether_early(reinterpret_cast<const void*>(kernel), possible);
    if (!error) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                     cudaSharedmemCarveoutMaxShared);
    }
    early = early && possible;
#else
    early = false;
#endif
    if (error) return error;
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = blocks;
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = kDecodeLinearWarps * 32;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = early ? 2 : 1;
    return cudaLaunchKernelEx(&config, kernel, a);
}

// Launches one of the two if it takes these sizes; `error` is what became of it.
template <bool NORM>
bool launch_bulk_linear(const DecodeLinear<__half>& a, const Gpu& gpu, cudaStream_t stream, cudaError_t& error) {
    const int tiles = static_cast<int>(ceil_div(a.outputs, kOutputTile));
    const auto launch_few_rows = [&](auto tiles_of_block, auto granules) {
        constexpr int TILES = tiles_of_block, GRANULES = granules;
        constexpr int kBytes = 16 * FewRowsShared<TILES, GRANULES>::kRows;
        constexpr int kSpreadRows = NORM ? 8 / GRANULES : 8;  // of which each lane has but 16 bytes
        const auto kernel = a.rows <= kSpreadRows ? few_rows_kernel<TILES, GRANULES, kSpreadRows, NORM>
                                                  : few_rows_kernel<TILES, GRANULES, 8, NORM>;
        bool possible = false;
        if ((error = find_whether_clusters(reinterpret_cast<const void*>(kernel), possible))) return true;
        if (!possible || kBytes > gpu.shared_bytes) return false;
        const auto grid = static_cast<unsigned>(ceil_div(tiles, TILES));
        error = launch_dependent(kernel, grid, kDecodeLinearWarps * 32, kBytes, stream, a);
        return true;
    };
    const auto launch_cluster = [&](auto tiles_of_warp, auto granules, auto warps) {
        constexpr int TILES = tiles_of_warp, GRANULES = granules, DEPTH = warps;
        using Layout = ClusterShared<TILES, GRANULES, DEPTH>;
        constexpr int kBytes = 16 * Layout::kSums;
        const auto kernel = cluster_linear_kernel<TILES, GRANULES, DEPTH, NORM>;
        bool possible = false;
        if ((error = find_whether_clusters(reinterpret_cast<const void*>(kernel), possible))) return true;
        if (!possible || kBytes > gpu.shared_bytes) return false;
        const auto grid = static_cast<unsigned>(ceil_div(a.outputs, Layout::kOutputs) * kClusterBlocks);
        const bool early = static_cast<int>(grid) <= gpu.multiprocessors;
        error = launch_clusters(kernel, kClusterBlocks, grid, early, kBytes, stream, a);
        return true;
    };
    const auto launch = [&](auto granules) {
        if (a.rows <= kFewRows) {
            switch (ceil_div(tiles, gpu.multiprocessors)) {
                case 1:
                    return launch_few_rows(Int<1>{}, granules);
                case 2:
                    return launch_few_rows(Int<2>{}, granules);
                case 3:
                    return launch_few_rows(Int<3>{}, granules);
                case 4:
                    return launch_few_rows(Int<4>{}, granules);
                default:
                    return false;  // blocks that take turns load the next weights while they add sums
            }
        }
        const int warps = std::max(1, gpu.multiprocessors / kClusterBlocks) * kDecodeLinearWarps;
        if (tiles > 4 * warps) return false;  // clusters that take turns wait for each other: 66 µs where 53 will do
        switch (ceil_div(tiles, warps)) {
            case 1:
                return launch_cluster(Int<1>{}, granules, Int<1>{});
            case 2:
                return launch_cluster(Int<2>{}, granules, Int<1>{});
            case 3:
                return launch_cluster(Int<3>{}, granules, Int<1>{});
            default:
                return launch_cluster(Int<4>{}, granules, Int<1>{});
        }
    };
    switch (a.inputs) {
        case 256:
            return launch(Int<1>{});
        case 512:
            return launch(Int<2>{});
        case 1024:
            return launch(Int<4>{});
        case 4096:
            if constexpr (!NORM) {
                if (a.rows > kFewRows) return launch_cluster(Int<2>{}, Int<8>{}, Int<2>{});
                return tiles <= gpu.multiprocessors && launch_few_rows(Int<1>{}, Int<16>{});
            }
    }
    return false;
}

// Launches a kernel if it takes these sizes; `error` is what became of it.
template <bool NORM>
bool launch_decode_linear_kernel(const DecodeLinear<__half>& a, cudaStream_t stream, cudaError_t& error) {
    if (a.inputs % 8) return false;  // rows that do not begin on boundaries
    Gpu gpu;
    if ((error = find_gpu(gpu))) return true;
    if (launch_bulk_linear<NORM>(a, gpu, stream, error)) return true;
    const int granules = static_cast<int>(ceil_div(a.inputs, kGranule));
    const int tiles = static_cast<int>(ceil_div(a.outputs, kOutputTile));
    const int share = static_cast<int>(ceil_div(tiles, gpu.multiprocessors));  // tiles of a multiprocessor

    const auto launch = [&](auto tiles_of_block, auto granules_of_warp) {
        constexpr int TILES = tiles_of_block, GRANULES = granules_of_warp;
        const int warps = static_cast<int>(ceil_div(granules, GRANULES));
        DecodePlan plan;
        plan.blocks = static_cast<int>(ceil_div(tiles, TILES));
        const auto bytes = [&] { return DecodeShared<TILES, GRANULES>(NORM, warps, a.inputs, plan).bytes; };
        plan.row_tiles = 1;
        plan.halves = a.rows > 8 ? 2 : 1;
        if (bytes() > gpu.shared_bytes) plan.halves = 1;
        if (bytes() > gpu.shared_bytes) return false;
        while (plan.row_tiles * plan.halves * 8 < a.rows) {
            ++plan.row_tiles;
            if (bytes() > gpu.shared_bytes) {
                --plan.row_tiles;
                break;
            }
        }
        // As many blocks as there is room for at once take turns; each needs 1 KB of shared memory besides.
        const int held = std::max(1, std::min(2 * kDecodeLinearWarps / warps, gpu.shared_bytes / (bytes() + 1024)));
        const unsigned grid = std::min(plan.blocks, held * gpu.multiprocessors);
        const auto kernel = decode_linear_kernel<TILES, GRANULES, NORM>;
        const int threads = warps * 32, shared_bytes = bytes();
        if (static_cast<int>(grid) == plan.blocks) {
            error = launch_dependent(kernel, grid, threads, shared_bytes, stream, a, plan);
            return true;
        }
        // Blocks that take turns would not gain from an early start, and their loads pass through L1, of which
        // launch_dependent leaves little.
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
#ifdef TRT_GRAFT_EARLY_LAUNCH
        if (!error) {
            error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                         cudaSharedmemCarveoutDefault);
        }
#endif
        if (error) return true;
        kernel<<<grid, threads, shared_bytes, stream>>>(a, plan);
        error = cudaGetLastError();
        return true;
    };
    if (granules <= 2 * kDecodeLinearWarps) {
        if (share <= 1) return launch(Int<1>{}, Int<2>{});
        return share == 2 ? launch(Int<2>{}, Int<2>{}) : launch(Int<4>{}, Int<2>{});
    }
    if (granules <= 4 * kDecodeLinearWarps) {
        if (share <= 1) return launch(Int<1>{}, Int<4>{});
        if (share == 2) return launch(Int<2>{}, Int<4>{});
        return share == 3 ? launch(Int<3>{}, Int<4>{}) : launch(Int<4>{}, Int<4>{});
    }
    if (granules <= 8 * kDecodeLinearWarps) {
        return share <= 1 ? launch(Int<1>{}, Int<8>{}) : launch(Int<2>{}, Int<8>{});
    }
    return granules <= 16 * kDecodeLinearWarps && launch(Int<1>{}, Int<16>{});
}

// ---- FP32 multiply-adds ---------------------------------------------------------------------------------------------

constexpr int kPlainWarps = 8;  // of a block
constexpr int kPlainRows = 4;   // that a warp multiplies at a time

// h = LayerNorm(x), a warp for each row.
template <typename T>
__global__ void __launch_bounds__(kPlainWarps * 32) plain_norm_kernel(const DecodeLinear<T> a) {
    allow_dependents();
    wait_for_previous();
    const int row = static_cast<int>(blockIdx.x * kPlainWarps + threadIdx.x / 32), lane = threadIdx.x % 32;
    if (row >= a.rows) return;
    const T* const x = a.x + int64_t{row} * a.inputs;
    float mean = 0, squares = 0;
    for (int i = lane; i < a.inputs; i += 32) mean += to_float(x[i]);
    mean = warp_sum(mean) / a.inputs;
    for (int i = lane; i < a.inputs; i += 32) {
        const float deviation = to_float(x[i]) - mean;
        squares += deviation * deviation;
    }
    const float scale = rsqrtf(warp_sum(squares) / a.inputs + a.epsilon);
    for (int i = lane; i < a.inputs; i += 32) {
        const float normalised = (to_float(x[i]) - mean) * scale;
        a.h[int64_t{row} * a.inputs + i] = from_float<T>(normalised * to_float(a.gamma[i]) + to_float(a.beta[i]));
    }
}

// y of a.x, a warp for each output.
template <typename T>
__global__ void __launch_bounds__(kPlainWarps * 32) plain_linear_kernel(const DecodeLinear<T> a) {
    allow_dependents();
    wait_for_previous();
    const int output = static_cast<int>(blockIdx.x * kPlainWarps + threadIdx.x / 32), lane = threadIdx.x % 32;
    if (output >= a.outputs) return;
    const T* const weight = a.weight + int64_t{output} * a.inputs;
    for (int first = 0; first < a.rows; first += kPlainRows) {
        float sums[kPlainRows] = {};
        for (int i = lane; i < a.inputs; i += 32) {
            const float factor = to_float(weight[i]);
            for (int r = 0; r < kPlainRows; ++r) {
                const int row = min(first + r, a.rows - 1);
                sums[r] += factor * to_float(a.x[int64_t{row} * a.inputs + i]);
            }
        }
        for (int r = 0; r < kPlainRows; ++r) sums[r] = warp_sum(sums[r]);
        if (lane > 0) continue;
        for (int r = 0; r < kPlainRows && first + r < a.rows; ++r) {
            const float added = a.residual ? to_float(a.residual[int64_t{first + r} * a.outputs + output]) : 0;
            a.store(first + r, output, sums[r] + to_float(a.bias[output]) + added);
        }
    }
}

template <typename T>
cudaError_t launch_plain_linear(DecodeLinear<T> a, cudaStream_t stream) {
    const auto blocks = [](int count) { return static_cast<unsigned>(ceil_div(count, kPlainWarps)); };
    if (a.gamma) {
        const auto error = launch_dependent(plain_norm_kernel<T>, blocks(a.rows), kPlainWarps * 32, 0, stream, a);
        if (error) return error;
        a.x = a.h;
    }
    return launch_dependent(plain_linear_kernel<T>, blocks(a.outputs), kPlainWarps * 32, 0, stream, a);
}

// Launches what `a` describes.  NORM: gamma, beta and h are there, and no residual; otherwise the other way round.
template <bool NORM, typename T>
cudaError_t launch_decode_linear(const DecodeLinear<T>& a, cudaStream_t stream) {
    if (a.inputs < 1 || a.inputs > kMaxWidth || a.width > kMaxWidth || a.rows > kMaxDecodeRows) {
        return cudaErrorInvalidValue;
    }
    if constexpr (std::is_same_v<T, __half>) {
        cudaError_t error = cudaSuccess;
        if (launch_decode_linear_kernel<NORM>(a, stream, error)) return error;
    }
    return launch_plain_linear(a, stream);
}

}  // namespace trt_graft
