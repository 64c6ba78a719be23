// Linear layers of one new token for each row, whose input may pass a LayerNorm first: what layer_norm_linear,
// layer_norm_qkv and linear_residual share.
//
// Floor: weights are read once, however many rows there are; all the rest is small.  Steps of a decoder follow each
// other at once and each has but a few bytes for each multiprocessor, so what counts is how early these are on their
// way:
//
//   - A block takes up to 32 outputs, its warps divide the inputs between them.  What a warp needs of the weights it
//     loads into registers, all of it, while the kernel before still runs (see dependent_launch.cuh).
//   - Then x comes through shared memory, in tiles of 16 rows: each warp copies and reads back what it multiplies.
//   - The sums of the warps meet in shared memory and are added in a fixed order: results repeat bit for bit.
//
// With tensor cores as in pointwise.cuh: lane (group, pair) multiplies inputs 8·pair … 8·pair + 7 of a granule of 32,
// of rows group and group + 8, by those of output `group` of a tile of 8.
//
// All other types and sizes are multiplied on FP32 units, by a warp for each output.
#pragma once

#include <algorithm>

#include "common/dependent_launch.cuh"
#include "common/pointwise.cuh"

namespace trt_graft {

enum class Activation : int32_t { kNone = 0, kGelu = 1, kRelu = 2 };

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
        if (activation == Activation::kGelu) sum *= 0.5f * (1 + erff(sum * 0.70710678f));
        if (activation == Activation::kRelu) sum = sum < 0 ? 0 : sum;
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

// ---- Tensor cores ---------------------------------------------------------------------------------------------------

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

// Launches the kernel if it takes these sizes; `error` is what became of it.
template <bool NORM>
bool launch_decode_linear_kernel(const DecodeLinear<__half>& a, cudaStream_t stream, cudaError_t& error) {
    if (a.inputs % 8) return false;  // rows that do not begin on boundaries
    Gpu gpu;
    if ((error = find_gpu(gpu))) return true;
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
        error =
            launch_dependent(decode_linear_kernel<TILES, GRANULES, NORM>, grid, warps * 32, bytes(), stream, a, plan);
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
