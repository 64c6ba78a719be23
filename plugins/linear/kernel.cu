// A linear layer of many rows.
//
// Hopper in FP16: see sm90.cu.  All others take what is here, for which nothing need be aligned: FP16 on the tensor
// cores of any GPU, FP32 on its multiply-adds.
#include <cuda_pipeline.h>

#include "common/gelu.cuh"
#include "common/kernel.cuh"
#include "common/pointwise.cuh"
#include "common/tensor_core.cuh"
#include "linear/kernel.cuh"
#include "linear/sm90.cuh"

namespace trt_graft {
namespace {

template <typename T>
struct Linear {
    const T* x;       // (rows, inputs)
    const T* weight;  // (outputs, inputs)
    const T* bias;    // (outputs)
    T* y;             // (rows, outputs)
    int64_t rows;
    int inputs, outputs;
    Activation activation;

    __device__ T rounded(float sum, int output) const {
        return from_float<T>(activated(sum + to_float(bias[output]), activation));
    }
};

// ---- Tensor cores ---------------------------------------------------------------------------------------------------

constexpr int kTileOutputs = 64;
constexpr int kDepth = 32;          // inputs at a time
constexpr int kPitch = kDepth + 8;  // elements from row to row in shared memory: eight rows of 16 bytes miss no bank
constexpr int kStages = 3;          // of shared memory: one is multiplied, the others are on their way
constexpr int kWarpsDown = 2, kWarpsAcross = 2;
constexpr int kThreads = 32 * kWarpsDown * kWarpsAcross;

// Starts to copy columns begin … begin + kDepth − 1 of ROWS rows, and zeros where the matrix (height, width) ends.
template <int ROWS, bool ALIGNED>
__device__ void copy_tile(__half* tile, const __half* __restrict__ matrix, int64_t first, int64_t height, int begin,
                          int width) {
    constexpr int kPacks = kDepth / 8;
    for (int i = threadIdx.x; i < ROWS * kPacks; i += kThreads) {
        const int64_t row = first + i / kPacks;
        const int column = begin + i % kPacks * 8;
        __half* const to = tile + i / kPacks * kPitch + i % kPacks * 8;
        const bool exists = row < height && column < width;
        const __half* const from = matrix + (exists ? row * width + column : 0);
        if constexpr (ALIGNED) {
            copy_or_clear(to, from, exists);
        } else {
            Pack<__half, 8> values = {};
            for (int n = 0; n < 8; ++n) {
                if (exists && column + n < width) values.values[n] = from[n];
            }
            store_pack(to, values);
        }
    }
}

// A block computes ROWS × 64 of y; its warps are two below each other, two next to each other.
//
// ALIGNED  rows of x and weight begin on boundaries of 16 bytes
template <int ROWS, bool ALIGNED>
__global__ void __launch_bounds__(kThreads) multiply_on_tensor_cores(const Linear<__half> a) {
    constexpr int kRowTiles = ROWS / kWarpsDown / 16;
    constexpr int kOutputTiles = kTileOutputs / kWarpsAcross / 8;
    __shared__ alignas(16) __half values[kStages][ROWS * kPitch], factors[kStages][kTileOutputs * kPitch];

    const int across = (a.outputs + kTileOutputs - 1) / kTileOutputs;
    const int64_t first_row = int64_t{blockIdx.x / across} * ROWS;
    const int first_output = blockIdx.x % across * kTileOutputs;
    const int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
    const int warp = threadIdx.x / 32;
    const int warp_row = warp / kWarpsAcross * kRowTiles * 16;
    const int warp_output = warp % kWarpsAcross * kOutputTiles * 8;

    const int steps = (a.inputs + kDepth - 1) / kDepth;
    const auto copy = [&](int step) {
        if (step < steps) {
            const int stage = step % kStages;
            copy_tile<ROWS, ALIGNED>(values[stage], a.x, first_row, a.rows, step * kDepth, a.inputs);
            copy_tile<kTileOutputs, ALIGNED>(factors[stage], a.weight, first_output, a.outputs, step * kDepth,
                                             a.inputs);
        }
        __pipeline_commit();
    };

    float c[kRowTiles][kOutputTiles][4] = {};
    for (int step = 0; step < kStages - 1; ++step) copy(step);
    for (int step = 0; step < steps; ++step) {
        __pipeline_wait_prior(kStages - 2);
        __syncthreads();  // everybody's part of this stage is there, and nobody reads the one before it any more
        copy(step + kStages - 1);
        // Where matrices begin for load_matrices: of x rows 0 … 7, rows 8 … 15, then both with 8 columns more; of
        // weight 8 outputs, the same with 8 columns more, then the next 8 outputs.
        const __half* const x = values[step % kStages] + (warp_row + lane % 16) * kPitch + lane / 16 * 8;
        const __half* const weight =
            factors[step % kStages] + (warp_output + lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 8;
        for (int k = 0; k < kDepth; k += 16) {
            uint32_t x_words[kRowTiles][4];
            for (int i = 0; i < kRowTiles; ++i) load_matrices(x_words[i], x + i * 16 * kPitch + k);
            for (int j = 0; j < kOutputTiles; j += 2) {
                uint32_t words[4];
                load_matrices(words, weight + j * 8 * kPitch + k);
                for (int i = 0; i < kRowTiles; ++i) {
                    multiply_add(c[i][j], x_words[i], words[0], words[1]);
                    multiply_add(c[i][j + 1], x_words[i], words[2], words[3]);
                }
            }
        }
    }
    __pipeline_wait_prior(0);

    const bool pairs = a.outputs % 2 == 0 && reinterpret_cast<uintptr_t>(a.y) % 4 == 0;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t row = first_row + warp_row + i * 16 + half * 8 + group;
            if (row >= a.rows) continue;
#pragma unroll
            for (int j = 0; j < kOutputTiles; ++j) {
                const int output = first_output + warp_output + j * 8 + 2 * pair;
                __half* const target = a.y + row * a.outputs + output;
                if (pairs && output < a.outputs) {
                    store_pack(target, Pack<__half, 2>{a.rounded(c[i][j][2 * half], output),
                                                       a.rounded(c[i][j][2 * half + 1], output + 1)});
                } else {
                    for (int n = 0; n < 2; ++n) {
                        if (output + n < a.outputs) target[n] = a.rounded(c[i][j][2 * half + n], output + n);
                    }
                }
            }
        }
    }
}

template <int ROWS>
cudaError_t launch_tensor_cores(const Linear<__half>& a, bool aligned, cudaStream_t stream) {
    const int64_t blocks = ceil_div(a.rows, ROWS) * ceil_div(a.outputs, kTileOutputs);
    if (blocks > INT32_MAX) return cudaErrorInvalidValue;
    if (aligned) {
        multiply_on_tensor_cores<ROWS, true><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(a);
    } else {
        multiply_on_tensor_cores<ROWS, false><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(a);
    }
    return cudaSuccess;
}

// ---- FP32 multiply-adds ---------------------------------------------------------------------------------------------

constexpr int kThreadRows = 4;

__global__ void __launch_bounds__(kSide* kSide, 2) multiply(const Linear<float> a) {
    const int across = (a.outputs + kBlockOutputs - 1) / kBlockOutputs;
    const int64_t first_row = int64_t{blockIdx.x / across} * kThreadRows * kSide;
    const int first_output = blockIdx.x % across * kBlockOutputs;
    multiply_block<kThreadRows>(
        a.weight, first_output, a.outputs, a.inputs,
        [&](int row, int input) { return first_row + row < a.rows ? a.x[(first_row + row) * a.inputs + input] : 0; },
        [&](int row, int output, const float (&sums)[4]) {
            if (first_row + row >= a.rows) return;
            float* const target = a.y + (first_row + row) * a.outputs + output;
            for (int n = 0; n < 4; ++n) {
                if (output + n < a.outputs) target[n] = a.rounded(sums[n], output + n);
            }
        });
}

// ---- Which of them --------------------------------------------------------------------------------------------------

cudaError_t launch(const Linear<float>& a, int, cudaStream_t stream) {
    const int64_t blocks = ceil_div(a.rows, kThreadRows * kSide) * ceil_div(a.outputs, kBlockOutputs);
    if (blocks > INT32_MAX) return cudaErrorInvalidValue;
    multiply<<<static_cast<unsigned>(blocks), kSide * kSide, 0, stream>>>(a);
    return cudaSuccess;
}

cudaError_t launch(const Linear<__half>& a, int device, cudaStream_t stream) {
    int multiprocessors = 0;
    cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error) return error;
    const bool aligned = a.inputs % 8 == 0 && on_boundary(a.x) && on_boundary(a.weight);
#ifdef TRT_GRAFT_CUTLASS
    int major = 0, minor = 0;
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (!error) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error) return error;
    if (major == 9 && minor == 0 && aligned && a.inputs > 0 && a.outputs % 8 == 0 && on_boundary(a.y) &&
        on_boundary(a.bias) && a.rows <= INT32_MAX) {
        return launch_linear_sm90(a.x, a.weight, a.bias, a.y, static_cast<int>(a.rows), a.inputs, a.outputs,
                                  a.activation, multiprocessors, stream);
    }
#endif
    // Tall tiles read the weights half as often, where they are enough to give each multiprocessor two.
    const int64_t tall = ceil_div(a.rows, 128) * ceil_div(a.outputs, kTileOutputs);
    return tall >= 2 * multiprocessors ? launch_tensor_cores<128>(a, aligned, stream)
                                       : launch_tensor_cores<64>(a, aligned, stream);
}

}  // namespace

cudaError_t launch_linear(DataType type, const void* x, const void* weight, const void* bias, void* y, int64_t rows,
                          int64_t inputs, int64_t outputs, int64_t activation, cudaStream_t stream) {
    if (rows * outputs == 0) return cudaSuccess;
    if (inputs < 0 || inputs > kMaxWidth || outputs > kMaxWidth) return cudaErrorInvalidValue;
    if (activation < 0 || activation > static_cast<int64_t>(Activation::kRelu)) return cudaErrorInvalidValue;
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error) return error;
    const cudaError_t launched = dispatch(type, [&](auto tag) {
        using T = decltype(tag);
        Linear<T> a{};
        a.x = static_cast<const T*>(x);
        a.weight = static_cast<const T*>(weight);
        a.bias = static_cast<const T*>(bias);
        a.y = static_cast<T*>(y);
        a.rows = rows;
        a.inputs = static_cast<int>(inputs);
        a.outputs = static_cast<int>(outputs);
        a.activation = static_cast<Activation>(activation);
        error = launch(a, device, stream);
    });
    return error ? error : launched;
}

}  // namespace trt_graft
