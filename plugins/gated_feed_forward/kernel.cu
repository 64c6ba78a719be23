// Layer normalisation, two 1 × 1 convolutions with a gated depthwise one between them, and the residual connection.
//
// Floor: x is read and y written once, but 3·hidden·channels multiply-adds for each pixel weigh more: tensor cores have
// to be busy all the time, also with the depthwise convolution.  There are two kernels.  The first one goes from x to
// the gated hidden channels, see common/norm_conv_depthwise.cuh: what project_in makes, twice as wide, never goes to
// memory.  A chunk has 16 channels of the gate and the 16 values that they are multiplied by.  Where an image has few
// tiles, the hidden channels are cut into slices, one for a block, so that every multiprocessor has work.  Up to 96
// channels Hopper has a first kernel of its own, see sm90.cu.  The second kernel is pointwise_conv_residual's.
//
// Three other plugins' kernels take over for many channels and for few pixels on Hopper, where they are faster, and, a
// strip of rows at a time, for FP32 and for sizes that are not whole packs of 16 bytes.
#include <algorithm>

#include "common/gelu.cuh"
#include "common/norm_conv_depthwise.cuh"
#include "gated_depthwise_conv/kernel.cuh"
#include "gated_feed_forward/kernel.cuh"
#include "gated_feed_forward/sm90.cuh"
#include "norm_pointwise_conv/kernel.cuh"
#include "pointwise_conv_residual/kernel.cuh"

namespace trt_graft {
namespace {

struct Arguments {
    const void *x, *norm_weight, *norm_bias, *project_in, *project_in_bias, *depthwise, *depthwise_bias, *project_out,
        *project_out_bias;
    void *y, *workspace;
    int64_t batch, height, width, channels, hidden;
    float epsilon;
    int32_t subtract_mean;
};

// ---- Tensor cores ---------------------------------------------------------------------------------------------------

constexpr int kGates = 16;  // of a chunk; as many values follow them

// max(x, y); NaN stays NaN.
__device__ float maximum(float x, float y) {
#if __CUDA_ARCH__ >= 800
    float z;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
#else
    return x <= y ? y : x;
#endif
}

// Gates a chunk.  A warp has two channels of many pixels, memory wants all 16 of a pixel: 32 bytes, which pass shared
// memory.
template <typename Core>
struct Gate {
    static constexpr int kWords = 8;                   // of two channels
    static constexpr int kStride = Core::kPixels + 4;  // from word to word of a pixel: 16 banks from half to half
    static constexpr int kBytes = 2 * kWords * kStride * 4;
    static constexpr int kPacks = Core::kPixels * 2 / Core::kThreads;  // of 8 channels, of a thread
    static_assert(Core::kPixels * 2 % Core::kThreads == 0);

    uint32_t* staged;         // two buffers
    __half* targets[kPacks];  // of the thread's packs of the next chunk; null for those that do not exist
    int left;                 // hidden channels from these on

    // `target` is the tile's first pixel, of which `rows` and `columns` exist; `first` is a hidden channel.
    __device__ Gate(uint32_t* shared, __half* target, int rows, int columns, int width, int hidden, int first)
        : staged(shared) {
        const int channel = first + threadIdx.x % 2 * 8;
        left = hidden - channel;
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
            const int slot = threadIdx.x / 2 + i * (Core::kThreads / 2);
            const auto pixel =
                Core::pixel_of(slot / (128 * Core::kLines), slot / 128 % Core::kLines, slot / 32 % 4, slot % 32);
            const bool exists = pixel.row < rows && pixel.column < columns;
            targets[i] = exists ? target + (int64_t{pixel.row} * width + pixel.column) * hidden + channel : nullptr;
        }
    }

    template <typename Convolve>
    __device__ void take(int chunk, int task, int part, const Convolve& convolve) const {
        float gated[2][Core::kLines][4];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            float gates[Core::kLines][4], values[Core::kLines][4];
            convolve(task * 2 + n, gates);
            convolve(kGates + task * 2 + n, values);
#pragma unroll
            for (int line = 0; line < Core::kLines; ++line) {
#pragma unroll
                // From −65504 on, so that of −∞ nothing is left, too.
                for (int i = 0; i < 4; ++i) {
                    gated[n][line][i] = fast_gelu(maximum(gates[line][i], -65504)) * values[line][i];
                }
            }
        }
        uint32_t* const stage =
            staged + (chunk % 2 * kWords + task) * kStride + part * (128 * Core::kLines) + threadIdx.x % 32;
#pragma unroll
        for (int line = 0; line < Core::kLines; ++line) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                stage[line * 128 + i * 32] = as_word(__floats2half2_rn(gated[0][line][i], gated[1][line][i]));
            }
        }
    }

    __device__ void finish(int chunk) {
        const uint32_t* const stage = staged + (chunk % 2 * kWords + threadIdx.x % 2 * 4) * kStride + threadIdx.x / 2;
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
            const uint32_t* const words = stage + i * (Core::kThreads / 2);
            const uint4 pack = {words[0], words[kStride], words[2 * kStride], words[3 * kStride]};
            if (targets[i] && chunk * kGates < left) *reinterpret_cast<uint4*>(targets[i] + chunk * kGates) = pack;
        }
    }
};

// blockIdx.x is (image, row of tiles, tile, slice of the hidden channels): blocks that read the same pixels are
// neighbours.
template <int STEPS, int WARPS, int STRIPS, int ROWS, int COLUMNS>
__global__ void __launch_bounds__(WARPS * 32, 1)
    gate_kernel(const NormConvDepthwiseArguments a, __half* __restrict__ y, int hidden, int slices, int chunks) {
    using Core = NormConvDepthwise<STEPS, WARPS, STRIPS, ROWS, COLUMNS>;
    extern __shared__ uint4 shared[];
    allow_dependents();
    Core core(shared, a);
    const int first = static_cast<int>(blockIdx.x % slices) * chunks * kGates;
    const auto units = [&](int chunk, int unit) {
        const int channel = first + chunk * kGates + unit % 2 * kUnit;
        return channel < hidden ? unit / 2 * hidden + channel : kNoUnit;
    };
    core.start(units);
    wait_for_previous();

    const unsigned tile = blockIdx.x / slices;
    const unsigned across = (a.width + COLUMNS - 1) / COLUMNS, down = (a.height + ROWS - 1) / ROWS;
    const int row = tile / across % down * ROWS, column = tile % across * COLUMNS;
    const int64_t image = tile / across / down;
    core.load(image, row, column);
    Gate<Core> gate(reinterpret_cast<uint32_t*>(shared + Core::kBytes / 16),
                    y + ((image * a.height + row) * a.width + column) * hidden, a.height - row, a.width - column,
                    a.width, hidden, first);
    const int left = (hidden - first + kGates - 1) / kGates;
    core.run(left < chunks ? left : chunks, units, gate);
}

NormConvDepthwiseArguments first_layers(const Arguments& a) {
    const auto half = [](const void* pointer) { return static_cast<const __half*>(pointer); };
    return {half(a.x),
            half(a.norm_weight),
            half(a.norm_bias),
            half(a.project_in),
            half(a.project_in_bias),
            half(a.depthwise),
            half(a.depthwise_bias),
            static_cast<int>(a.channels),
            static_cast<int>(a.height),
            static_cast<int>(a.width),
            a.epsilon,
            a.subtract_mean != 0};
}

// Launches the kernel, if shared memory has room for it and the grid for its blocks.
template <int STEPS, int WARPS, int STRIPS, int ROWS, int COLUMNS>
bool try_gate_kernel(const Arguments& a, const Gpu& gpu, cudaStream_t stream, cudaError_t& error) {
    using Core = NormConvDepthwise<STEPS, WARPS, STRIPS, ROWS, COLUMNS>;
    constexpr int kBytes = Core::kBytes + Gate<Core>::kBytes;
    const int64_t tiles = a.batch * ceil_div(a.height, ROWS) * ceil_div(a.width, COLUMNS);
    if (kBytes > gpu.shared_bytes || tiles > INT32_MAX / ceil_div(a.hidden, kGates)) return false;
    // The cut with which the multiprocessors, a block each, do the least one after the other: to begin and to end with
    // a tile is as much work as some chunks.
    constexpr int kMore = 4;
    const int64_t all = ceil_div(a.hidden, kGates);
    int64_t best = all;
    const auto work = [&](int64_t n) { return ceil_div(tiles * ceil_div(all, n), gpu.multiprocessors) * (n + kMore); };
    for (int64_t n = all - 1; n > 0; --n) {
        if (work(n) < work(best)) best = n;
    }
    const int slices = static_cast<int>(ceil_div(all, best));
    error = launch_dependent(gate_kernel<STEPS, WARPS, STRIPS, ROWS, COLUMNS>, dim3(tiles * slices), WARPS * 32, kBytes,
                             stream, first_layers(a), static_cast<__half*>(a.workspace), static_cast<int>(a.hidden),
                             slices, static_cast<int>(best));
    return true;
}

// Launches the gate's kernel that suits the channels; false if none does.
bool launch_gate_kernel(const Arguments& a, cudaStream_t stream, cudaError_t& error) {
    if (a.channels % 8 != 0 || a.hidden % 8 != 0 || a.height > INT32_MAX / 2) return false;
    Gpu gpu;
    error = find_gpu(gpu);
    if (error) return true;
#ifdef TRT_GRAFT_SM90
    if (gpu.is_hopper && launch_gate_sm90(first_layers(a), a.workspace, a.batch, a.hidden, gpu.multiprocessors,
                                          gpu.shared_bytes, stream, error)) {
        return true;
    }
#endif
    // The larger the tile, the less of it is halo.  The second ones are for GPUs with 99 KB of shared memory.
    const auto launch = [&](auto... tries) { return (tries(a, gpu, stream, error) || ...); };
    if (a.channels <= 48) return launch(try_gate_kernel<3, 16, 5, 16, 32>, try_gate_kernel<3, 8, 6, 16, 16>);
    if (a.channels <= 96) return launch(try_gate_kernel<6, 16, 5, 16, 32>, try_gate_kernel<6, 8, 6, 16, 16>);
    if (a.channels <= 192) return launch(try_gate_kernel<12, 16, 3, 16, 16>, try_gate_kernel<12, 8, 3, 8, 16>);
    if (a.channels <= 384) return launch(try_gate_kernel<24, 8, 3, 8, 16>);
    return false;
}

// ---- Other plugins' kernels -----------------------------------------------------------------------------------------

// Rows `origin` … of all images, one behind the other: the first `skipped`, and those behind `kept` more, only surround
// what is made.  Several images are whole ones.
struct Piece {
    int64_t origin, rows, skipped, kept, images;
};

// project_in's result is left in the workspace, and what is gated behind it.
cudaError_t launch_piece(DataType type, const Arguments& a, const Piece& piece, cudaStream_t stream) {
    const int64_t size = type == DataType::kHalf ? 2 : 4;
    const int64_t row_x = a.width * pitch(type, a.channels) * size;
    const int64_t row_projected = a.width * pitch(type, 2 * a.hidden) * size;
    const int64_t row_gated = a.width * pitch(type, a.hidden) * size;
    auto* const projected = static_cast<char*>(a.workspace);
    char* const gated = projected + piece.images * piece.rows * row_projected;
    const char* const x = static_cast<const char*>(a.x) + piece.origin * row_x;
    cudaError_t error = launch_norm_pointwise_conv(type, x, a.norm_weight, a.norm_bias, a.project_in, a.project_in_bias,
                                                   projected, piece.images * piece.rows * a.width, a.channels,
                                                   2 * a.hidden, a.epsilon, a.subtract_mean, stream);
    if (error) return error;
    error = launch_gated_depthwise_conv(type, projected, a.depthwise, a.depthwise_bias, gated, piece.images, piece.rows,
                                        a.width, a.hidden, stream);
    if (error) return error;
    return launch_pointwise_conv_residual(type, gated + piece.skipped * row_gated, a.project_out, a.project_out_bias,
                                          x + piece.skipped * row_x,
                                          static_cast<char*>(a.y) + (piece.origin + piece.skipped) * row_x,
                                          piece.images * piece.kept * a.width, a.hidden, a.channels, stream);
}

// Of so many pixels Hopper takes these kernels, of all images together: all if there are many hidden channels, few if
// there are less.  Limits are between sizes measured, see docs/restormer-tuning.md.
int64_t pixels_by_parts(int64_t pixels, int64_t hidden) {
    if (hidden >= 384) return pixels;
    return hidden >= 192 ? std::min<int64_t>(pixels, 1 << 14) : 0;
}

bool parts_are_faster(const Arguments& a) {
    const int64_t pixels = a.batch * a.height * a.width;
    Gpu gpu;
    return pixels_by_parts(pixels, a.hidden) == pixels && !find_gpu(gpu) && gpu.is_hopper;
}

constexpr int64_t kStrip = 32;  // rows, with one more above and one below

int64_t strip_rows(int64_t height) { return std::min(height, kStrip + 2); }

cudaError_t launch_strips(DataType type, const Arguments& a, cudaStream_t stream) {
    for (int64_t image = 0; image < a.batch; ++image) {
        for (int64_t first = 0; first < a.height; first += kStrip) {
            const int64_t end = std::min(first + kStrip, a.height);
            const int64_t above = first > 0 ? first - 1 : 0, below = end < a.height ? end + 1 : end;
            const Piece strip = {image * a.height + above, below - above, first - above, end - first, 1};
            const cudaError_t error = launch_piece(type, a, strip, stream);
            if (error) return error;
        }
    }
    return cudaSuccess;
}

}  // namespace

int64_t gated_feed_forward_workspace_bytes(int64_t batch, int64_t height, int64_t width, int64_t hidden) {
    if (batch == 0) return 0;
    const int64_t pixels = batch * height * width, gated = pixels * pitch(DataType::kHalf, hidden) * 2;
    // of the larger type: FP16 has padding, but half the size
    const int64_t channels = pitch(DataType::kHalf, 2 * hidden) + pitch(DataType::kHalf, hidden);
    const int64_t strips = strip_rows(height) * width * channels * 4;
    const int64_t images = pixels_by_parts(pixels, hidden) * channels * 2;
    return std::max({gated, strips, images});
}

cudaError_t launch_gated_feed_forward(DataType type, const void* x, const void* norm_weight, const void* norm_bias,
                                      const void* project_in, const void* project_in_bias, const void* depthwise,
                                      const void* depthwise_bias, const void* project_out, const void* project_out_bias,
                                      void* y, void* workspace, int64_t batch, int64_t height, int64_t width,
                                      int64_t channels, int64_t hidden, float epsilon, int32_t subtract_mean,
                                      cudaStream_t stream) {
    if (batch * height * width * channels == 0) return cudaSuccess;
    if (hidden < 1 || channels > kMaxWidth || hidden > kMaxWidth / 2) return cudaErrorInvalidValue;
    const Arguments a = {
        x,           norm_weight,      norm_bias, project_in,   project_in_bias, depthwise, depthwise_bias,
        project_out, project_out_bias, y,         workspace,    batch,           height,    width,
        channels,    hidden,           epsilon,   subtract_mean};
    if (type == DataType::kHalf && parts_are_faster(a)) {
        return launch_piece(type, a, {0, height, 0, height, batch}, stream);
    }
    cudaError_t error = cudaSuccess;
    if (type == DataType::kHalf && launch_gate_kernel(a, stream, error)) {
        if (error) return error;
        return launch_pointwise_conv_residual(type, workspace, project_out, project_out_bias, x, y,
                                              batch * height * width, hidden, channels, stream);
    }
    return launch_strips(type, a, stream);
}

}  // namespace trt_graft
