// Layer normalisation of each pixel over its channels and the 1 × 1 convolution behind it.
//
// Floor: x is read once and y, which is three to five times as large, written once; 2·channels·outputs operations for
// each pixel weigh as much from 96 channels on.  A block keeps the weights of a slice of the outputs in shared memory,
// and takes one tile of pixels after the other: it normalises them there, each warp 16, and multiplies them by one
// chunk of outputs after the other, with the next tile on its way.  Where pixels are few there are more slices, so that
// every multiprocessor has work; each slice normalises the pixels again.
//
// Restormer's numbers of channels have a kernel of their own on Hopper, see sm90.cu.
#include "common/pixel_norm.cuh"
#include "common/pointwise.cuh"
#include "norm_pointwise_conv/kernel.cuh"
#include "norm_pointwise_conv/sm90.cuh"

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

constexpr int kWarps = 8, kThreads = kWarps * 32;
constexpr int kChunk = 32;  // outputs

// A warp multiplies 32 pixels by a chunk; 8 / ROWS warps take turns with the chunks.  STEPS times 16 channels.
template <int STEPS, int ROWS>
struct Tile {
    static constexpr int kPixels = ROWS * 32, kColumns = kWarps / ROWS, kPitch = kRowPitch<STEPS>;
    static constexpr int kPixelBytes = kPixels * kPitch * 2, kFactorBytes = STEPS * 16 * 2 * 2;
    static constexpr int kOutputBytes = kPitch * 2 + 2;  // with the bias
    static constexpr int kBlocks = STEPS > 12 ? 1 : 2;   // of a multiprocessor, if shared memory has room
};

// The first `count` of a word's two values, and zeros.
__device__ uint32_t first_of(uint32_t word, int count) { return count >= 2 ? word : count == 1 ? word & 0xffff : 0; }

// Normalises a warp's pixels where they are: `place` is what the lane passes to load_matrices, `target` its first
// channels of pixel `group`.  The factors are pairs of gamma and of beta, zeros behind the last channel.
template <int STEPS, bool WHOLE>
__device__ void normalise(const __half* place, __half* target, const uint2* factors, int channels, float epsilon,
                          bool subtract_mean) {
    constexpr int kUnrolled = STEPS < 6 ? STEPS : 6;
    const int pair = threadIdx.x % 4;
    PixelNorm norm;
#pragma unroll kUnrolled
    for (int k = 0; k < STEPS; ++k) {
        uint32_t x[4];
        load_matrices(x, place + k * 16);
        norm.add_sum(x, k);
    }
    norm.find_means(channels);
    const auto deviations = [&](uint32_t (&x)[4], int k) {
        load_matrices(x, place + k * 16);
        for (int n = 0; n < 4; ++n) {
            x[n] = norm.deviation(x[n], n);
            if (!WHOLE && (k + 1) * 16 > channels) x[n] = first_of(x[n], channels - k * 16 - n / 2 * 8 - 2 * pair);
        }
    };
#pragma unroll kUnrolled
    for (int k = 0; k < STEPS; ++k) {
        uint32_t x[4];
        deviations(x, k);
        norm.add_squares(x);
    }
    norm.find_scales(epsilon, subtract_mean);
#pragma unroll kUnrolled
    for (int k = 0; k < STEPS; ++k) {
        uint32_t x[4];
        deviations(x, k);
        __syncwarp();  // other lanes have read what this one is to write
        for (int n = 0; n < 4; ++n) {
            *reinterpret_cast<uint32_t*>(target + n % 2 * 8 * kRowPitch<STEPS> + k * 16 + n / 2 * 8) =
                norm.normalised(x[n], n, factors[k * 8 + n / 2 * 4 + pair]);
        }
    }
}

// blockIdx is (slice, share of the pixels): blocks that read the same pixels are neighbours.  A slice has `columns`
// outputs, whole chunks.  There is room for two tiles of pixels, if a block takes several.
template <int STEPS, int ROWS>
__global__ void __launch_bounds__(kThreads, Tile<STEPS, ROWS>::kBlocks)
    tensor_core_kernel(const __half* __restrict__ x, const __half* __restrict__ norm_weight,
                       const __half* __restrict__ norm_bias, const __half* __restrict__ weight,
                       const __half* __restrict__ bias, __half* __restrict__ y, int64_t pixels, int shares,
                       int channels, int outputs, int pitch_x, int pitch_y, float epsilon, bool subtract_mean,
                       int columns) {
    using Sizes = Tile<STEPS, ROWS>;
    constexpr int kPitch = Sizes::kPitch, kColumns = Sizes::kColumns;
    constexpr int kPart = STEPS % 4 == 0 ? 4 : 3;  // of the steps, which is copied at once
    extern __shared__ uint4 shared[];
    allow_dependents();
    auto* const factors = reinterpret_cast<uint2*>(shared);
    auto* const biases = reinterpret_cast<__half*>(factors + STEPS * 8);  // (chunk, group, tile)
    __half *const weights = biases + columns, *const tiles = weights + columns * kPitch;
    const int first = static_cast<int>(blockIdx.x) * columns;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
    const int existing = outputs - first < columns ? outputs - first : columns;
    const int chunks = (existing + kChunk - 1) / kChunk;
    const bool aligned = channels % 8 == 0;

    const auto copy_pixels = [&](int share, int buffer) {
        const int64_t begin = int64_t{share} * Sizes::kPixels;
        for (int step = 0; step < STEPS; step += kPart) {
            copy_rows<Sizes::kPixels, kPart, kPitch, kThreads>(
                tiles + buffer * (Sizes::kPixels * kPitch) + step * 16, x + begin * pitch_x + step * 16, pixels - begin,
                pitch_x, channels - step * 16, aligned, [](int place) { return place; });
        }
        __pipeline_commit();
    };
    for (int i = threadIdx.x; i < STEPS * 16; i += kThreads) {  // pairs of gamma and beta alternate
        auto* const values = reinterpret_cast<__half*>(factors) + i / 2 * 4 + i % 2;
        values[0] = i < channels ? norm_weight[i] : __half();
        values[2] = i < channels ? norm_bias[i] : __half();
    }
    for (int i = threadIdx.x; i < chunks * kChunk; i += kThreads) {
        const int output = first + output_at<4>(i);
        biases[i / kChunk * kChunk + i % 8 * 4 + i / 8 % 4] = output < outputs ? bias[output] : __half();
    }
    wait_for_previous();
    copy_pixels(blockIdx.y, 0);
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
#pragma unroll
        for (int step = 0; step < STEPS; step += kPart) {
            copy_rows<kChunk, kPart, kPitch, kThreads>(weights + chunk * kChunk * kPitch + step * 16,
                                                       weight + int64_t{first + chunk * kChunk} * channels + step * 16,
                                                       existing - chunk * kChunk, channels, channels - step * 16,
                                                       aligned, output_at<4>);
        }
    }
    __pipeline_commit();
    __pipeline_wait_prior(1);

    const int row = warp / kColumns, column = warp % kColumns;
    const uint32_t ones[] = {one_in(0), one_in(1)};
    int buffer = 0;
#pragma unroll 1
    for (int share = blockIdx.y; share < shares; share += gridDim.y, buffer ^= 1) {
        __half* const tile = tiles + buffer * (Sizes::kPixels * kPitch);
        __syncthreads();  // the tile is there
        if (ROWS == 4 || warp < 2 * ROWS) {
            __half* const own = tile + warp * 16 * kPitch;
            const __half* const place = own + pixel_place(lane, kPitch);
            __half* const target = own + group * kPitch + 2 * pair;
            if (channels == STEPS * 16) {
                normalise<STEPS, true>(place, target, factors, channels, epsilon, subtract_mean);
            } else {
                normalise<STEPS, false>(place, target, factors, channels, epsilon, subtract_mean);
            }
        }
        __pipeline_wait_prior(0);  // the weights, at first
        __syncthreads();           // the tile is normalised, and nobody reads the one before any more
        if (share + static_cast<int>(gridDim.y) < shares) copy_pixels(share + gridDim.y, buffer ^ 1);

        const int64_t begin = int64_t{share} * Sizes::kPixels + row * 32 + group;
        const int rows = pixels - begin < 32 ? static_cast<int>(pixels - begin) : 32;
        __half* const target = y + begin * pitch_y + first + 8 * pair;
        const int left = pitch_y - first - 8 * pair;
        const __half* const from = tile + row * 32 * kPitch + pixel_place(lane, kPitch);
#pragma unroll 1
        for (int chunk = column; chunk < chunks; chunk += kColumns) {
            const auto words = reinterpret_cast<const uint2*>(biases)[chunk * 8 + group];
            float c[2][4][4];
            for (int i = 0; i < 2; ++i) {
                for (int j = 0; j < 4; ++j) {
                    multiply(c[i][j], {ones[j % 2], ones[j % 2], 0, 0}, j < 2 ? words.x : words.y, 0);
                }
            }
            const __half* const chosen = weights + chunk * kChunk * kPitch + output_place(lane, kPitch);
#pragma unroll(STEPS < 12 ? STEPS : 6)
            for (int k = 0; k < STEPS; ++k) {
                const __half* const strips[] = {from + k * 16, from + 16 * kPitch + k * 16};
                multiply_step(c, strips, chosen + k * 16, kPitch);
            }
            // The sums of padding are zeros.
            for (int n = 0; n < 4; ++n) {
                if (8 * n < rows && chunk * kChunk < left) {
                    store_outputs<4>(target + chunk * kChunk + int64_t{8 * n} * pitch_y, c[n / 2], n % 2);
                }
            }
        }
        __pipeline_wait_prior(0);  // the next tile
    }
}

// How the outputs are cut into slices of `columns`; blocks for each, and shared memory of one.
struct Cut {
    int64_t columns = 0, slices = 0, blocks = 0, bytes = 0, work = INT64_MAX;
};

// The cut with which a multiprocessor does the least.  For each tile of pixels a block normalises, which is as much
// work as some pixels × outputs, and multiplies.
template <int STEPS, int ROWS>
Cut best_cut(const Gpu& gpu, int64_t pixels, int outputs) {
    using Sizes = Tile<STEPS, ROWS>;
    constexpr int kNormalisation = 96 * 128;  // of a tile of any size, since each warp has 16 pixels
    const int64_t shares = ceil_div(pixels, Sizes::kPixels), chunks = ceil_div(outputs, kChunk);
    Cut best;
    for (int64_t count = 1; count <= chunks; ++count) {
        Cut cut;
        cut.columns = ceil_div(chunks, count) * kChunk;
        cut.slices = ceil_div(outputs, cut.columns);
        const int64_t least = Sizes::kFactorBytes + cut.columns * Sizes::kOutputBytes + Sizes::kPixelBytes;
        // Blocks of a multiprocessor, with room for one tile or for two; besides, each takes 1 KB.
        for (int tiles = 1; tiles <= 2; ++tiles) {
            cut.bytes = least + (tiles - 1) * Sizes::kPixelBytes;
            const int64_t room = (gpu.shared_bytes + 1024) / (cut.bytes + 1024);
            if (room < 1) break;
            const int64_t each = room < Sizes::kBlocks ? room : Sizes::kBlocks, all = gpu.multiprocessors * each;
            const int64_t most = all > cut.slices ? all / cut.slices : 1;
            if (tiles == 1 && shares > most) continue;
            cut.blocks = shares < most ? shares : most;
            // The blocks of a multiprocessor take turns; a single one waits more.
            const int64_t together = ceil_div(cut.slices * cut.blocks, gpu.multiprocessors);
            cut.work = ceil_div(shares, cut.blocks) * together * (cut.columns * Sizes::kPixels + kNormalisation) *
                       (together > 1 ? 4 : 5);
            if (cut.work < best.work) best = cut;
            break;
        }
    }
    return best;
}

template <int STEPS, int ROWS>
cudaError_t launch_cut(const Arguments& a, const Cut& cut, cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(cut.slices), static_cast<unsigned>(cut.blocks));
    return launch_dependent(tensor_core_kernel<STEPS, ROWS>, grid, kThreads, static_cast<int>(cut.bytes), stream,
                            static_cast<const __half*>(a.x), static_cast<const __half*>(a.norm_weight),
                            static_cast<const __half*>(a.norm_bias), static_cast<const __half*>(a.weight),
                            static_cast<const __half*>(a.bias), static_cast<__half*>(a.y), a.pixels,
                            static_cast<int>(ceil_div(a.pixels, Tile<STEPS, ROWS>::kPixels)), a.channels, a.outputs,
                            a.pitch_x, a.pitch_y, a.epsilon, a.subtract_mean, static_cast<int>(cut.columns));
}

// False if there is no room for so many channels.
template <int STEPS>
bool launch_tensor_cores(const Arguments& a, cudaStream_t stream, cudaError_t& error) {
    Gpu gpu;
    error = find_gpu(gpu);
    if (error) return true;
    if (ceil_div(a.pixels, 64) > INT32_MAX / 2) return false;
    const Cut large = best_cut<STEPS, 4>(gpu, a.pixels, a.outputs),
              small = best_cut<STEPS, 2>(gpu, a.pixels, a.outputs);
    if (large.columns + small.columns == 0) return false;
    error = large.work <= small.work ? launch_cut<STEPS, 4>(a, large, stream) : launch_cut<STEPS, 2>(a, small, stream);
    return true;
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
    cudaError_t error = cudaSuccess;
#ifdef TRT_GRAFT_SM90
    Gpu gpu;
    if ((error = find_gpu(gpu))) return error;
    if (gpu.is_hopper &&
        launch_norm_pointwise_conv_sm90(x, norm_weight, norm_bias, weight, bias, y, pixels, channels, outputs, epsilon,
                                        a.subtract_mean, gpu.multiprocessors, gpu.shared_bytes, stream, error)) {
        return error;
    }
#endif
    if (channels <= 384 && (channels <= 48    ? launch_tensor_cores<3>(a, stream, error)
                            : channels <= 96  ? launch_tensor_cores<6>(a, stream, error)
                            : channels <= 192 ? launch_tensor_cores<12>(a, stream, error)
                                              : launch_tensor_cores<24>(a, stream, error))) {
        return error;
    }
    return launch_multiply_adds<__half>(a, stream);
}

}  // namespace trt_graft
