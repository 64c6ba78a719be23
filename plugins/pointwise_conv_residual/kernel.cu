// 1 × 1 convolution and the residual connection behind it.
//
// Floor: x and residual are read once, y is written once; 2·channels·outputs operations for each pixel weigh as much
// from 192 outputs on.  A warp sums 16 pixels × all outputs of its block, from the residual on; the pixels pass through
// its registers, as the fragments that tensor cores take (see common/pointwise.cuh), with the next ones always on
// their way.  Where pixels are few, the outputs are cut into slices and the channels of a pixel are shared among
// several warps, so that every multiprocessor has work and loads much at once.
#include "common/pointwise.cuh"
#include "pointwise_conv_residual/kernel.cuh"

namespace trt_graft {
namespace {

struct Arguments {
    const void *x, *weight, *bias, *residual;
    void* y;
    int64_t pixels;
    int channels, outputs, pitch_x, pitch_y;
};

// ---- Tensor cores ---------------------------------------------------------------------------------------------------

constexpr int kWarps = 16;
constexpr int kAhead = 4;  // granules on their way

// Calls f(tile, n) for each chunk: its first tile and its tiles, as constants.
template <int TILES, int TILE = 0, typename F>
__device__ void for_each_chunk(F f) {
    if constexpr (TILE < TILES) {
        f(Int<TILE>{}, Int<(TILES - TILE < kChunkTiles ? TILES - TILE : kChunkTiles)>{});
        for_each_chunk<TILES, TILE + kChunkTiles>(f);
    }
}

// The lane's channels of two pixels, `group` and group + 8 of a warp's 16.
struct Source {
    const __half* upper;
    int to_lower;  // from there
    int channels;  // that exist
};
struct Granule {
    uint4 upper, lower;
};

// ROWS warps of a block take 16 pixels each, PARTS share the channels of one of these rows: part p takes the granules
// p, p + PARTS, …  A slice has TILES tiles of outputs.
//
// blockIdx is (slice, share of the pixels): blocks that read the same pixels are neighbours.  With several parts each
// block has one share only, since the partial sums take the place of the weights.
template <int TILES, int ROWS, int PARTS>
__global__ void __launch_bounds__(kWarps * 32, 1)
    tensor_core_kernel(const __half* __restrict__ x, const __half* __restrict__ weight, const __half* __restrict__ bias,
                       const __half* __restrict__ residual, __half* __restrict__ y, int64_t pixels, int shares,
                       int channels, int outputs, int pitch_x, int pitch_y, int steps) {
    static_assert(ROWS * PARTS == kWarps);
    // The slice: bias, fragments (granules, tiles).  A step is a granule for each part.
    extern __shared__ uint4 shared[];
    auto* const biases = reinterpret_cast<__half*>(shared);
    uint4* const fragments = shared + TILES;
    const int first = static_cast<int>(blockIdx.x) * TILES * 8;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
    const int row = warp % ROWS, part = warp / ROWS;

    const auto pixel_of = [&](int share) { return (int64_t{share} * ROWS + row) * 16 + group; };
    // Pixels behind the last one repeat it and are not stored.
    const auto existing = [&](int64_t pixel) { return pixel < pixels ? pixel : pixels - 1; };
    const auto source_of = [&](int share) -> Source {
        if (share >= shares) return {};
        const int64_t upper = existing(pixel_of(share)), lower = existing(pixel_of(share) + 8);
        return {x + upper * pitch_x + 8 * pair, static_cast<int>(lower - upper) * pitch_x, channels};
    };
    const auto load = [&](const Source& source, int step) {
        const int channel = (step * PARTS + part) * kGranule;
        const int count = source.channels - channel - 8 * pair;  // of the lane
        if (count <= 0) return Granule{};
        Granule granule = {__ldg(reinterpret_cast<const uint4*>(source.upper + channel)),
                           __ldg(reinterpret_cast<const uint4*>(source.upper + source.to_lower + channel))};
        if (channels % 8 != 0) granule = {first_of(granule.upper, count), first_of(granule.lower, count)};  // padding
        return granule;
    };

    Source source = source_of(blockIdx.y);
    Granule ahead[kAhead];
    for (int i = 0; i < kAhead; ++i) ahead[i] = load(source, i);

    // Two copies, in the order in which they are needed.
    const int half = (steps + 2 * kAhead - 1) / (2 * kAhead) * kAhead;
    const auto copy_steps = [&](int begin, int end) {
        constexpr int kTurns = kWarps / TILES;  // warps that share a tile
        const int tile = warp % TILES, turn = warp / TILES;
        if (turn < kTurns) {
            copy_fragments(fragments + tile * 32, TILES * 32, weight, first, tile, TILES, begin * PARTS + turn,
                           end * PARTS, kTurns, outputs, channels);
        }
        __pipeline_commit();
    };
    copy_values(biases, bias + first, outputs - first, TILES * 8);
    copy_steps(0, half < steps ? half : steps);
    copy_steps(half, steps);

    for (int share = blockIdx.y; share < shares; share += gridDim.y) {
        const int64_t pixel = pixel_of(share);
        float c[TILES][4] = {};
        if (part == 0) {
            const __half* rows[] = {residual + existing(pixel) * pitch_y, residual + existing(pixel + 8) * pitch_y};
            for_each_chunk<TILES>([&](auto tile, auto tiles) {
                constexpr int kTile = decltype(tile)::value, kOutputs = 2 * decltype(tiles)::value;
                const int output = first + kTile * 8 + kOutputs * pair;
                for (int i = 0; i < 2; ++i) {
                    Pack<__half, kOutputs> values = {};
                    if (output < pitch_y) values = load_pack<kOutputs>(rows[i] + output);
                    for (int n = 0; n < kOutputs; ++n) c[kTile + n / 2][2 * i + n % 2] = to_float(values.values[n]);
                }
            });
        }
        const bool starting = share == static_cast<int>(blockIdx.y);
        if (starting) {
            __pipeline_wait_prior(1);
            __syncthreads();
        }
        for (int begin = 0; begin < steps; begin += kAhead) {
            if (starting && begin == half) {
                __pipeline_wait_prior(0);
                __syncthreads();
            }
            // What is loaded here is multiplied after the next steps, or for the next pixels.
            const bool last = begin + kAhead >= steps;
            if (last) source = PARTS == 1 ? source_of(share + gridDim.y) : Source{};
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                if (begin + i < steps) {
                    const uint4* weights = fragments + ((begin + i) * PARTS + part) * TILES * 32 + lane;
#pragma unroll
                    for (int j = 0; j < TILES; ++j) {
                        multiply_granule(c[j], ahead[i].upper, ahead[i].lower, weights[j * 32]);
                    }
                }
                ahead[i] = load(source, last ? i : begin + kAhead + i);
            }
        }

        if constexpr (PARTS > 1) {
            auto* const sums = reinterpret_cast<float4*>(fragments);
            const auto sum_of = [&](int p, int j) -> float4& {
                return sums[((p * ROWS + row) * TILES + j) * 32 + lane];
            };
            __syncthreads();  // nobody reads the weights any more
            if (part > 0) {
                for (int j = 0; j < TILES; ++j) sum_of(part - 1, j) = {c[j][0], c[j][1], c[j][2], c[j][3]};
            }
            __syncthreads();
            if (part > 0) return;
            for (int p = 0; p < PARTS - 1; ++p) {
                for (int j = 0; j < TILES; ++j) {
                    const float4 sum = sum_of(p, j);
                    c[j][0] += sum.x;
                    c[j][1] += sum.y;
                    c[j][2] += sum.z;
                    c[j][3] += sum.w;
                }
            }
        }
        for_each_chunk<TILES>([&](auto tile, auto tiles) {
            constexpr int kTile = decltype(tile)::value, kTiles = decltype(tiles)::value, kOutputs = 2 * kTiles;
            const int column = kTile * 8 + kOutputs * pair;
            const auto offsets = load_pack<kOutputs>(biases + column);
            auto& chunk = reinterpret_cast<float (&)[kTiles][4]>(c[kTile]);
            for (int n = 0; n < kTiles * 4; ++n) chunk[n / 4][n % 4] += to_float(offsets.values[n / 4 * 2 + n % 2]);
            if (first + column + kOutputs > outputs) clear_from(chunk, outputs - first - column);
            if (first + column >= pitch_y) return;
            for (int i = 0; i < 2; ++i) {
                if (pixel + 8 * i < pixels) {
                    store_outputs(y + (pixel + 8 * i) * pitch_y + first + column, chunk, i);
                }
            }
        });
    }
}

// Launches the kernel if it gives most multiprocessors a block, or if it `must`; it may not fit shared memory.
template <int TILES, int ROWS, int PARTS>
bool try_tensor_cores(const Arguments& a, const Gpu& gpu, bool must, cudaStream_t stream, cudaError_t& error) {
    const int64_t shares = ceil_div(a.pixels, ROWS * 16), slices = ceil_div(a.outputs, TILES * 8);
    const int64_t steps = ceil_div(a.channels, kGranule * PARTS);
    const int64_t weights = steps * PARTS * TILES * kFragmentBytes;
    const int64_t sums = int64_t{PARTS - 1} * ROWS * TILES * 32 * sizeof(float4);
    const int64_t bytes = TILES * 8 * 2 + (weights > sums ? weights : sums);
    if (bytes > gpu.shared_bytes || shares > INT32_MAX / 2) return false;
    if (!must && shares * slices * 4 < gpu.multiprocessors * 3) return false;
    const int64_t most = gpu.multiprocessors > slices ? gpu.multiprocessors / slices : 1;
    const dim3 grid(static_cast<unsigned>(slices), static_cast<unsigned>(PARTS > 1 || shares < most ? shares : most));
    error = launch_with_shared(tensor_core_kernel<TILES, ROWS, PARTS>, grid, kWarps * 32, static_cast<int>(bytes),
                               stream, static_cast<const __half*>(a.x), static_cast<const __half*>(a.weight),
                               static_cast<const __half*>(a.bias), static_cast<const __half*>(a.residual),
                               static_cast<__half*>(a.y), a.pixels, static_cast<int>(shares), a.channels, a.outputs,
                               a.pitch_x, a.pitch_y, static_cast<int>(steps));
    return true;
}

// ---- FP32 multiply-adds ---------------------------------------------------------------------------------------------

// blockIdx.x is (pixels, outputs).
template <typename T, int ROWS>
__global__ void __launch_bounds__(kSide* kSide, 2)
    multiply_add_kernel(const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias,
                        const T* __restrict__ residual, T* __restrict__ y, int64_t pixels, int channels, int outputs,
                        int pitch_x, int pitch_y) {
    const unsigned slices = (outputs + kBlockOutputs - 1) / kBlockOutputs;
    const int64_t first = int64_t{blockIdx.x / slices} * (ROWS * kSide);
    const auto value = [&](int row, int channel) {
        return to_float(x[(first + row < pixels ? first + row : pixels - 1) * pitch_x + channel]);
    };
    const auto store = [&](int row, int output, float (&sums)[4]) {
        if (first + row >= pixels) return;
        const int64_t origin = (first + row) * pitch_y;
        for (int n = 0; n < 4; ++n) {
            if (output + n < outputs) sums[n] += to_float(bias[output + n]) + to_float(residual[origin + output + n]);
        }
        store_four(y + origin, output, outputs, pitch_y, sums);
    };
    multiply_block<ROWS>(weight, blockIdx.x % slices * kBlockOutputs, outputs, channels, value, store);
}

template <typename T>
cudaError_t launch_multiply_adds(const Arguments& a, cudaStream_t stream) {
    const auto launch = [&](auto kernel, int rows) {
        const int64_t blocks = ceil_div(a.pixels, rows * kSide) * ceil_div(a.outputs, kBlockOutputs);
        if (blocks > INT32_MAX) return cudaErrorInvalidValue;
        return launch_with_shared(kernel, static_cast<unsigned>(blocks), kSide * kSide, 0, stream,
                                  static_cast<const T*>(a.x), static_cast<const T*>(a.weight),
                                  static_cast<const T*>(a.bias), static_cast<const T*>(a.residual),
                                  static_cast<T*>(a.y), a.pixels, a.channels, a.outputs, a.pitch_x, a.pitch_y);
    };
    return a.pixels > kFewPixels ? launch(multiply_add_kernel<T, 8>, 8) : launch(multiply_add_kernel<T, 4>, 4);
}

}  // namespace

cudaError_t launch_pointwise_conv_residual(DataType type, const void* x, const void* weight, const void* bias,
                                           const void* residual, void* y, int64_t pixels, int64_t channels,
                                           int64_t outputs, cudaStream_t stream) {
    if (pixels * outputs == 0) return cudaSuccess;
    if (channels < 1 || channels > kMaxWidth || outputs > kMaxWidth) return cudaErrorInvalidValue;
    const Arguments a = {x,
                         weight,
                         bias,
                         residual,
                         y,
                         pixels,
                         static_cast<int>(channels),
                         static_cast<int>(outputs),
                         static_cast<int>(pitch(type, channels)),
                         static_cast<int>(pitch(type, outputs))};
    if (type == DataType::kFloat) return launch_multiply_adds<float>(a, stream);
    if (type != DataType::kHalf) return cudaErrorInvalidValue;
    Gpu gpu;
    if (const cudaError_t error = find_gpu(gpu)) return error;
    // From the most work for a block to the least.
    cudaError_t error = cudaSuccess;
    const bool wide = outputs > 48;
    if ((wide && try_tensor_cores<12, 16, 1>(a, gpu, false, stream, error)) ||
        (wide && try_tensor_cores<12, 8, 2>(a, gpu, false, stream, error)) ||
        (wide && try_tensor_cores<12, 4, 4>(a, gpu, false, stream, error)) ||
        try_tensor_cores<6, 16, 1>(a, gpu, false, stream, error) ||
        try_tensor_cores<6, 8, 2>(a, gpu, false, stream, error) ||
        try_tensor_cores<6, 4, 4>(a, gpu, true, stream, error)) {
        return error;
    }
    return launch_multiply_adds<__half>(a, stream);  // more channels than shared memory holds
}

}  // namespace trt_graft
