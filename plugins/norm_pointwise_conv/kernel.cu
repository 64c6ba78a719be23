// Layer normalisation of each pixel over its channels and the 1 × 1 convolution behind it.
//
// Floor: x is read once and y, which is three to five times as large, written once; 2·channels·outputs operations for
// each pixel weigh as much from 96 channels on.  A warp keeps its pixels in registers, as the fragments that tensor
// cores take (see common/pointwise.cuh): it normalises them there and multiplies them by one chunk of outputs after
// the other, with the weights in shared memory.  Where pixels are few the outputs are cut into slices, one for a block,
// so that every multiprocessor has work; each slice normalises the pixels again.
#include "common/pointwise.cuh"
#include "norm_pointwise_conv/kernel.cuh"

namespace trt_graft {
namespace {

struct Arguments {
    const void *x, *norm_weight, *norm_bias, *weight, *bias;
    void* y;
    int64_t pixels;
    int channels, outputs, pitch_x, pitch_y;
    float epsilon;
    bool subtract_mean;
};

// ---- Tensor cores ---------------------------------------------------------------------------------------------------

// Sum over the four lanes of a pixel.
__device__ float pixel_sum(float x) {
    for (int offset = 1; offset < 4; offset *= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// Normalises the lane's shares of PIXELS pixels, in place.  Granules from WHOLE on may reach behind the last channel;
// x, gammas and betas are zeros there.
template <int WHOLE, int GRANULES, int PIXELS>
__device__ void normalise(uint4 (&x)[PIXELS][GRANULES], const __half* gammas, const __half* betas, int channels,
                          float epsilon, bool subtract_mean) {
    const int first = threadIdx.x % 4 * 8;  // the lane's first channel of a granule
    float values[8], offset[PIXELS], scale[PIXELS];
#pragma unroll
    for (int p = 0; p < PIXELS; ++p) {
        float sum = 0;
#pragma unroll
        for (int g = 0; g < GRANULES; ++g) {
            unpack(x[p][g], values);
            float part = 0;  // short chains of additions
            for (float value : values) part += value;
            sum += part;
        }
        const float mean = pixel_sum(sum) / channels;
        float squares = 0;
#pragma unroll
        for (int g = 0; g < GRANULES; ++g) {
            unpack(x[p][g], values);
            float part = 0;
            for (int n = 0; n < 8; ++n) {
                const bool exists = g < WHOLE || g * kGranule + first + n < channels;
                const float deviation = exists ? values[n] - mean : 0;
                part += deviation * deviation;
            }
            squares += part;
        }
        offset[p] = subtract_mean ? mean : 0;
        scale[p] = rsqrtf(pixel_sum(squares) / channels + epsilon);
    }
#pragma unroll
    for (int g = 0; g < GRANULES; ++g) {
        float gamma[8], beta[8];
        unpack(*reinterpret_cast<const uint4*>(gammas + g * kGranule + first), gamma);
        unpack(*reinterpret_cast<const uint4*>(betas + g * kGranule + first), beta);
#pragma unroll
        for (int p = 0; p < PIXELS; ++p) {
            unpack(x[p][g], values);
            for (int n = 0; n < 8; ++n) values[n] = (values[n] - offset[p]) * scale[p] * gamma[n] + beta[n];
            x[p][g] = pack(values);
        }
    }
}

// GRANULES: of a pixel; WHOLE: those that certainly are whole.  A warp takes STRIPS · 16 pixels at once.  As many warps
// as the registers allow share the weights.
//
// blockIdx is (slice, share of the pixels): blocks that read the same pixels are neighbours.
template <int GRANULES, int WHOLE, int WARPS, int STRIPS>
__global__ void __launch_bounds__(WARPS * 32, 1)
    tensor_core_kernel(const __half* __restrict__ x, const __half* __restrict__ norm_weight,
                       const __half* __restrict__ norm_bias, const __half* __restrict__ weight,
                       const __half* __restrict__ bias, __half* __restrict__ y, int64_t pixels, int shares,
                       int channels, int outputs, int pitch_x, int pitch_y, float epsilon, bool subtract_mean,
                       int columns) {
    constexpr int kPixels = 2 * STRIPS;  // of a lane: `group`, group + 8, …
    // The slice, of `columns` outputs: fragments (tiles, granules), bias, gamma, beta.
    extern __shared__ uint4 shared[];
    allow_dependents();
    uint4* const fragments = shared;
    auto* const biases = reinterpret_cast<__half*>(fragments + columns / 8 * GRANULES * 32);
    __half *const gammas = biases + columns, *const betas = gammas + GRANULES * kGranule;
    const int first = static_cast<int>(blockIdx.x) * columns;
    const int tiles = outputs - first < columns ? (outputs - first + 15) / 16 * 2 : columns / 8;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;

    const auto pixel_of = [&](int share) { return (int64_t{share} * WARPS + warp) * (STRIPS * 16) + group; };
    uint4 fragment[kPixels][GRANULES];  // of x, then of what is multiplied
    const auto load = [&](int share) {
#pragma unroll
        for (int p = 0; p < kPixels; ++p) {
            const int64_t pixel = pixel_of(share) + 8 * p;
            // Pixels behind the last one repeat it and are not stored.
            const __half* const source = x + (pixel < pixels ? pixel : pixels - 1) * pitch_x + 8 * pair;
#pragma unroll
            for (int g = 0; g < GRANULES; ++g) {
                const bool exists = g < WHOLE || g * kGranule + 8 * pair < channels;
                fragment[p][g] = exists ? *reinterpret_cast<const uint4*>(source + g * kGranule) : uint4{};
            }
        }
    };
    // Three copies, in the order in which they are needed.
    copy_values(gammas, norm_weight, channels, GRANULES * kGranule);
    copy_values(betas, norm_bias, channels, GRANULES * kGranule);
    copy_values(biases, bias + first, outputs - first, columns);
    __pipeline_commit();
    const int half = (tiles + 2 * kChunkTiles - 1) / (2 * kChunkTiles) * kChunkTiles;
    const auto copy_tiles = [&](int begin, int end) {
        for (int tile = begin + warp; tile < end; tile += WARPS) {
            copy_fragments(fragments + tile * GRANULES * 32, 32, weight, first, tile, tiles, 0, GRANULES, 1, outputs,
                           channels);
        }
        __pipeline_commit();
    };
    copy_tiles(0, half < tiles ? half : tiles);
    copy_tiles(half, tiles);
    wait_for_previous();
    load(blockIdx.y);

    for (int share = blockIdx.y; share < shares; share += gridDim.y) {
        if (channels % 8 != 0) {  // padding
#pragma unroll
            for (int p = 0; p < kPixels; ++p) {
#pragma unroll
                for (int g = WHOLE; g < GRANULES; ++g) {
                    fragment[p][g] = first_of(fragment[p][g], channels - g * kGranule - 8 * pair);
                }
            }
        }
        const bool starting = share == static_cast<int>(blockIdx.y);
        if (starting) {
            __pipeline_wait_prior(2);
            __syncthreads();
        }
        normalise<WHOLE>(fragment, gammas, betas, channels, epsilon, subtract_mean);

        const int64_t pixel = pixel_of(share);
        const int rows = pixels - pixel < kPixels * 8 ? static_cast<int>(pixels - pixel) : kPixels * 8;
        __half* const target = y + pixel * pitch_y + first;
        // Multiplies by a chunk of tiles, which begins at `tile`.
        const auto multiply = [&](int tile, auto chunk) {
            constexpr int kTiles = decltype(chunk)::value, kOutputs = 2 * kTiles;
            const int column = tile * 8 + kOutputs * pair;  // the lane's first
            const auto offsets = load_pack<kOutputs>(biases + column);
            float c[STRIPS][kTiles][4];
            for (auto& strip : c) {
                for (int n = 0; n < kTiles * 4; ++n) strip[n / 4][n % 4] = to_float(offsets.values[n / 4 * 2 + n % 2]);
            }
#pragma unroll
            for (int g = 0; g < GRANULES; ++g) {
#pragma unroll
                for (int j = 0; j < kTiles; ++j) {
                    const uint4 weights = fragments[((tile + j) * GRANULES + g) * 32 + lane];
                    for (int i = 0; i < STRIPS; ++i) {
                        multiply_granule(c[i][j], fragment[2 * i][g], fragment[2 * i + 1][g], weights);
                    }
                }
            }
            const int existing = outputs - first - column;  // outputs from the lane's first one on
            if (existing < kOutputs) {
                for (auto& strip : c) clear_from(strip, existing);
            }
            if (first + column >= pitch_y) return;
            for (int p = 0; p < kPixels; ++p) {
                if (8 * p < rows) store_outputs(target + column + p * 8 * pitch_y, c[p / 2], p % 2);
            }
        };
        for (int tile = 0; tile < tiles; tile += kChunkTiles) {
            if (starting && tile == 0) {
                __pipeline_wait_prior(1);
                __syncthreads();
            } else if (starting && tile == half) {
                __pipeline_wait_prior(0);
                __syncthreads();
            }
            if (tile + kChunkTiles <= tiles) {
                multiply(tile, Int<kChunkTiles>{});
            } else {
                multiply(tile, Int<2>{});
            }
        }
        if (share + static_cast<int>(gridDim.y) < shares) load(share + gridDim.y);
    }
}

// Outputs are cut into `slices` of `columns`, a multiple of 16.
struct Cut {
    int columns = 0, slices = 0;
};

// The cut with which the multiprocessors, a block each, do the least one after the other.  For each of the shares of
// the pixels a block normalises, which is as much work as some columns, and multiplies.
Cut best_cut(const Gpu& gpu, int64_t shares, int outputs, int column_bytes, int more_bytes) {
    constexpr int kNormalisation = 64;
    const int64_t sixteens = ceil_div(outputs, 16);
    int64_t least = INT64_MAX;
    Cut best;
    for (int64_t count = 1; count <= sixteens; ++count) {
        const int64_t columns = ceil_div(sixteens, count) * 16;
        if (columns * column_bytes + more_bytes > gpu.shared_bytes) continue;
        const int64_t slices = ceil_div(outputs, columns);
        const int64_t blocks = gpu.multiprocessors > slices ? gpu.multiprocessors / slices : 1;  // of one slice
        const int64_t work =
            ceil_div(shares, blocks) * ceil_div(slices, gpu.multiprocessors) * (columns + kNormalisation);
        if (work < least) {
            least = work;
            best = {static_cast<int>(columns), static_cast<int>(slices)};
        }
    }
    return best;
}

template <int GRANULES, int WHOLE, int WARPS, int STRIPS>
cudaError_t launch_tensor_cores(const Arguments& a, cudaStream_t stream) {
    Gpu gpu;
    if (const cudaError_t error = find_gpu(gpu)) return error;
    constexpr int kColumnBytes = GRANULES * kFragmentBytes / 8 + 2;  // with the bias
    constexpr int kMoreBytes = 2 * GRANULES * kGranule * 2;          // gamma and beta
    const int64_t shares = ceil_div(a.pixels, WARPS * STRIPS * 16);
    const auto [columns, slices] = best_cut(gpu, shares, a.outputs, kColumnBytes, kMoreBytes);
    if (columns == 0 || shares > INT32_MAX / 2) return cudaErrorInvalidValue;
    const int64_t most = gpu.multiprocessors > slices ? gpu.multiprocessors / slices : 1;
    const dim3 grid(slices, static_cast<unsigned>(shares < most ? shares : most));
    return launch_dependent(tensor_core_kernel<GRANULES, WHOLE, WARPS, STRIPS>, grid, WARPS * 32,
                            columns * kColumnBytes + kMoreBytes, stream, static_cast<const __half*>(a.x),
                            static_cast<const __half*>(a.norm_weight), static_cast<const __half*>(a.norm_bias),
                            static_cast<const __half*>(a.weight), static_cast<const __half*>(a.bias),
                            static_cast<__half*>(a.y), a.pixels, static_cast<int>(shares), a.channels, a.outputs,
                            a.pitch_x, a.pitch_y, a.epsilon, a.subtract_mean, columns);
}

// ---- FP32 multiply-adds ---------------------------------------------------------------------------------------------

// blockIdx.x is (pixels, outputs).
template <typename T, int ROWS>
__global__ void __launch_bounds__(kSide* kSide, 2)
    multiply_add_kernel(const T* __restrict__ x, const T* __restrict__ norm_weight, const T* __restrict__ norm_bias,
                        const T* __restrict__ weight, const T* __restrict__ bias, T* __restrict__ y, int64_t pixels,
                        int channels, int outputs, int pitch_x, int pitch_y, float epsilon, bool subtract_mean) {
    constexpr int kPixels = ROWS * kSide;
    __shared__ float offsets[kPixels], scales[kPixels];
    const unsigned slices = (outputs + kBlockOutputs - 1) / kBlockOutputs;
    const int64_t first = int64_t{blockIdx.x / slices} * kPixels;
    const auto pixel_of = [&](int row) { return first + row < pixels ? first + row : pixels - 1; };
    for (int row = threadIdx.x / 32; row < kPixels; row += kSide * kSide / 32) {
        const T* source = x + pixel_of(row) * pitch_x;
        float sum = 0, squares = 0;
        for (int c = threadIdx.x % 32; c < channels; c += 32) sum += to_float(source[c]);
        const float mean = warp_sum(sum) / channels;
        for (int c = threadIdx.x % 32; c < channels; c += 32) {
            const float deviation = to_float(source[c]) - mean;
            squares += deviation * deviation;
        }
        offsets[row] = subtract_mean ? mean : 0;
        scales[row] = rsqrtf(warp_sum(squares) / channels + epsilon);
    }
    __syncthreads();
    const auto normalised = [&](int row, int channel) {
        const float value = (to_float(x[pixel_of(row) * pitch_x + channel]) - offsets[row]) * scales[row];
        return to_float(from_float<T>(value * to_float(norm_weight[channel]) + to_float(norm_bias[channel])));
    };
    const auto store = [&](int row, int output, float (&sums)[4]) {
        if (first + row >= pixels) return;
        for (int n = 0; n < 4; ++n) sums[n] += output + n < outputs ? to_float(bias[output + n]) : 0;
        store_four(y + (first + row) * pitch_y, output, outputs, pitch_y, sums);
    };
    multiply_block<ROWS>(weight, blockIdx.x % slices * kBlockOutputs, outputs, channels, normalised, store);
}

template <typename T>
cudaError_t launch_multiply_adds(const Arguments& a, cudaStream_t stream) {
    const auto launch = [&](auto kernel, int rows) {
        const int64_t blocks = ceil_div(a.pixels, rows * kSide) * ceil_div(a.outputs, kBlockOutputs);
        if (blocks > INT32_MAX) return cudaErrorInvalidValue;
        kernel<<<static_cast<unsigned>(blocks), kSide * kSide, 0, stream>>>(
            static_cast<const T*>(a.x), static_cast<const T*>(a.norm_weight), static_cast<const T*>(a.norm_bias),
            static_cast<const T*>(a.weight), static_cast<const T*>(a.bias), static_cast<T*>(a.y), a.pixels, a.channels,
            a.outputs, a.pitch_x, a.pitch_y, a.epsilon, a.subtract_mean);
        return cudaGetLastError();
    };
    return a.pixels > kFewPixels ? launch(multiply_add_kernel<T, 8>, 8) : launch(multiply_add_kernel<T, 4>, 4);
}

}  // namespace

cudaError_t launch_norm_pointwise_conv(DataType type, const void* x, const void* norm_weight, const void* norm_bias,
                                       const void* weight, const void* bias, void* y, int64_t pixels, int64_t channels,
                                       int64_t outputs, float epsilon, int32_t subtract_mean, cudaStream_t stream) {
    if (pixels * outputs == 0) return cudaSuccess;
    if (channels < 1 || channels > kMaxWidth || outputs > kMaxWidth) return cudaErrorInvalidValue;
    const Arguments a = {x,
                         norm_weight,
                         norm_bias,
                         weight,
                         bias,
                         y,
                         pixels,
                         static_cast<int>(channels),
                         static_cast<int>(outputs),
                         static_cast<int>(pitch(type, channels)),
                         static_cast<int>(pitch(type, outputs)),
                         epsilon,
                         subtract_mean != 0};
    if (type == DataType::kFloat) return launch_multiply_adds<float>(a, stream);
    if (type != DataType::kHalf) return cudaErrorInvalidValue;
    // Two strips use each fragment of the weights twice; more granules leave registers for one only.
    if (channels <= 32) return launch_tensor_cores<1, 0, 16, 2>(a, stream);
    if (channels <= 64) return launch_tensor_cores<2, 1, 16, 2>(a, stream);
    if (channels <= 96) return launch_tensor_cores<3, 2, 16, 2>(a, stream);
    if (channels <= 128) return launch_tensor_cores<4, 3, 8, 2>(a, stream);
    if (channels <= 192) return launch_tensor_cores<6, 4, 8, 2>(a, stream);
    if (channels <= 256) return launch_tensor_cores<8, 6, 8, 1>(a, stream);
    if (channels <= 384) return launch_tensor_cores<12, 8, 8, 1>(a, stream);
    return launch_multiply_adds<__half>(a, stream);
}

}  // namespace trt_graft
