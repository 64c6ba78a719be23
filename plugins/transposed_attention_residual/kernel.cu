// Attention between the channels of an image, the 1 × 1 convolution behind it and the residual connection.
//
// Floor: q, k, v and residual are read once and y written once.  The attention of all heads is a matrix that is the
// same for all pixels of an image, and so is what the convolution makes of it:
//
//   folded = weight · attention,   y = residual + folded · v + bias
//
// What the heads make of v never goes to memory.  There are three kernels: gram and softmax, see
// transposed_attention/gram.cuh, and the convolution on v, see pointwise_conv_residual/tensor_core.cuh and, for Hopper,
// stream_sm90.cuh beside it.  Its blocks keep their weights in shared memory for all of their pixels anyway.  Here each
// one multiplies them there, on tensor cores, once it has copied them: a tile of `folded` costs less than another
// kernel would.
//
// FP32, and heads that are not whole packs of 16 bytes, leave `folded` in memory and multiply on the ordinary units.
#include "pointwise_conv_residual/tensor_core.cuh"
#include "transposed_attention/gram.cuh"
#include "transposed_attention/kernel.cuh"
#include "transposed_attention_residual/folded_weights.cuh"
#include "transposed_attention_residual/kernel.cuh"
#include "transposed_attention_residual/sm90.cuh"

namespace trt_graft {
namespace {

// ---- Tensor cores ---------------------------------------------------------------------------------------------------

// Where softmax puts an element of a head's attention: transposed, since the columns are what `folded` sums over.
template <int WIDTH>
struct Columns {
    using Element = __half;
    static __device__ int place(int row, int column) { return column * WIDTH + row; }
};

// ---- FP32 multiply-adds ---------------------------------------------------------------------------------------------

constexpr int kFoldThreads = 256;

template <int WIDTH>
struct Rows {
    using Element = float;
    static __device__ int place(int row, int column) { return row * WIDTH + column; }
};

// folded (images, channels, channels), of `count` elements: each a thread's.
template <typename T>
__global__ void fold_kernel(const T* __restrict__ weight, const float* __restrict__ attention,
                            float* __restrict__ folded, int64_t count, int heads, int head_channels, int width) {
    const int64_t index = int64_t{blockIdx.x} * kFoldThreads + threadIdx.x;
    if (index >= count) return;
    const int channels = heads * head_channels;
    const int column = static_cast<int>(index % channels), head = column / head_channels;
    const int64_t output = index / channels % channels, image = index / channels / channels;
    const T* row = weight + output * channels + head * head_channels;
    attention += (image * heads + head) * width * width + column % head_channels;
    float sum = 0;
    for (int i = 0; i < head_channels; ++i) sum += to_float(row[i]) * attention[i * width];
    folded[index] = sum;
}

// blockIdx.x is (image, share of its pixels, slice of the outputs).
template <typename T, int ROWS>
__global__ void __launch_bounds__(kSide* kSide, 2)
    apply_kernel(const T* __restrict__ v, const float* __restrict__ folded, const T* __restrict__ bias,
                 const T* __restrict__ residual, T* __restrict__ y, int64_t pixels, unsigned shares, int channels,
                 int pitch_qkv, int pitch_y) {
    const unsigned slices = (channels + kBlockOutputs - 1) / kBlockOutputs;
    const int64_t image = blockIdx.x / slices / shares;
    const int64_t first = int64_t{blockIdx.x / slices % shares} * (ROWS * kSide);
    v += image * pixels * pitch_qkv;
    const auto value = [&](int row, int channel) {
        return to_float(v[(first + row < pixels ? first + row : pixels - 1) * pitch_qkv + channel]);
    };
    const auto store = [&](int row, int output, float (&sums)[4]) {
        if (first + row >= pixels) return;
        const int64_t origin = (image * pixels + first + row) * pitch_y;
        for (int n = 0; n < 4; ++n) {
            if (output + n < channels) sums[n] += to_float(bias[output + n]) + to_float(residual[origin + output + n]);
        }
        store_four(y + origin, output, channels, pitch_y, sums);
    };
    multiply_block<ROWS>(folded + image * channels * channels, blockIdx.x % slices * kBlockOutputs, channels, channels,
                         value, store);
}

// ---------------------------------------------------------------------------------------------------------------------

// One call; images of `a` are those of v.
template <typename T>
struct Call {
    Scores<T> scores;
    PointwiseArguments a;
    int64_t batch;

    cudaError_t on_tensor_cores(const Gpu& gpu, cudaStream_t stream) const {
        dispatch_heads<T>(scores.shape.channels, [&](auto width, auto aligned) {
            if constexpr (decltype(aligned)::value && std::is_same_v<T, __half>) {
                scores.template launch_gram<decltype(width)::value, true>(stream);
            }
        });
        return behind_gram(gpu, stream);
    }

    // The same, once gram's sums are there.
    cudaError_t behind_gram(const Gpu& gpu, cudaStream_t stream) const {
        auto* const attention = reinterpret_cast<__half*>(scores.behind());
        const int head_channels = scores.shape.channels;
        dispatch_heads<T>(head_channels, [&](auto width, auto aligned) {
            constexpr int kWidth = decltype(width)::value;
            if constexpr (decltype(aligned)::value && std::is_same_v<T, __half>) {
                scores.template launch_softmax<kWidth, Columns<kWidth>>(attention, stream);
            }
        });
        cudaError_t error = cudaGetLastError();
        if (error) return error;
        const FoldedWeights weights = {attention, head_channels, padded(head_channels)};
#ifdef TRT_GRAFT_SM90
        if (gpu.is_hopper && launch_folded_residual_sm90(a, batch, weights, gpu, stream, error)) return error;
#endif
        launch_residual_kernel(a, batch, weights, gpu, stream, error);
        return error;
    }

    cudaError_t on_multiply_adds(cudaStream_t stream) const {
        const HeadShape& shape = scores.shape;
        const int64_t width = padded(shape.channels), count = batch * a.channels * a.channels;
        float *const attention = scores.behind(), *const folded = attention + scores.all_heads * width * width;
        dispatch_heads<T>(shape.channels, [&](auto constant, auto aligned) {
            constexpr int kWidth = decltype(constant)::value;
            scores.template launch<kWidth, decltype(aligned)::value, Rows<kWidth>>(attention, stream);
        });
        const int64_t fold_blocks = ceil_div(count, kFoldThreads);
        if (fold_blocks > INT32_MAX) return cudaErrorInvalidValue;
        fold_kernel<T><<<static_cast<unsigned>(fold_blocks), kFoldThreads, 0, stream>>>(
            static_cast<const T*>(a.weight), attention, folded, count, shape.heads, shape.channels,
            static_cast<int>(width));
        const auto apply = [&](auto kernel, int rows) {
            const int64_t shares = ceil_div(a.pixels, rows * kSide);
            const int64_t blocks = batch * shares * ceil_div(a.channels, kBlockOutputs);
            if (blocks > INT32_MAX) return cudaErrorInvalidValue;
            kernel<<<static_cast<unsigned>(blocks), kSide * kSide, 0, stream>>>(
                static_cast<const T*>(a.x), static_cast<const float*>(folded), static_cast<const T*>(a.bias),
                static_cast<const T*>(a.residual), static_cast<T*>(a.y), a.pixels, static_cast<unsigned>(shares),
                a.channels, a.pitch_x, a.pitch_y);
            return cudaGetLastError();
        };
        return batch * a.pixels > kFewPixels ? apply(apply_kernel<T, 8>, 8) : apply(apply_kernel<T, 4>, 4);
    }
};

// Whether FP16 goes through tensor cores.
bool takes_tensor_cores(int64_t batch, int64_t channels, int64_t head_channels, const Gpu& gpu) {
    return head_channels % 8 == 0 && batch <= UINT16_MAX && fits_residual_kernel(static_cast<int>(channels), gpu);
}

}  // namespace

int64_t transposed_attention_residual_workspace_bytes(int64_t batch, int64_t heads, int64_t head_channels,
                                                      int64_t pixels) {
    if (batch * heads * head_channels * pixels == 0) return 0;
    const int64_t channels = heads * head_channels, folded = batch * channels * channels * sizeof(float);
    return transposed_attention_workspace_bytes(batch, heads, head_channels, pixels) + folded;
}

cudaError_t launch_transposed_attention_residual(DataType type, const void* qkv, const void* temperature,
                                                 const void* weight, const void* bias, const void* residual, void* y,
                                                 void* workspace, int64_t batch, int64_t heads, int64_t head_channels,
                                                 int64_t pixels, cudaStream_t stream) {
    if (batch * heads * head_channels * pixels == 0) return cudaSuccess;
    const int64_t channels = heads * head_channels;
    if (head_channels > kMaxChannels || batch * heads > INT32_MAX / kMaxChannels || channels > kMaxWidth / 3) {
        return cudaErrorInvalidValue;
    }
    const int64_t pitch_qkv = pitch(type, 3 * channels), pitch_y = pitch(type, channels);
    const HeadShape shape{
        static_cast<int>(heads), static_cast<int>(head_channels), channels, pixels, pitch_qkv, pitch_y};
    cudaError_t error = cudaSuccess;
    const cudaError_t launched = dispatch(type, [&](auto tag) {
        using T = decltype(tag);
        const Call<T> call = {
            Scores<T>(qkv, temperature, workspace, shape, batch),
            {static_cast<const T*>(qkv) + 2 * channels, weight, bias, residual, y, pixels, static_cast<int>(channels),
             static_cast<int>(channels), static_cast<int>(pitch_qkv), static_cast<int>(pitch_y)},
            batch};
        Gpu gpu;
        error = find_gpu(gpu);
        if (error) return;
        error = std::is_same_v<T, __half> && takes_tensor_cores(batch, channels, head_channels, gpu)
                    ? call.on_tensor_cores(gpu, stream)
                    : call.on_multiply_adds(stream);
    });
    return error ? error : launched;
}

cudaError_t launch_behind_gram(const void* v, const void* temperature, const void* weight, const void* bias,
                               const void* residual, void* y, float* partials, int64_t shares, int64_t batch,
                               int64_t heads, int64_t head_channels, int64_t pixels, cudaStream_t stream) {
    const int64_t channels = heads * head_channels;
    Gpu gpu;
    if (const cudaError_t error = find_gpu(gpu)) return error;
    if (!takes_tensor_cores(batch, channels, head_channels, gpu)) return cudaErrorInvalidValue;
    const HeadShape shape{static_cast<int>(heads), static_cast<int>(head_channels), channels, pixels, 0, channels};
    Call<__half> call = {Scores<__half>(nullptr, temperature, partials, shape, batch),
                         {v, weight, bias, residual, y, pixels, static_cast<int>(channels), static_cast<int>(channels),
                          static_cast<int>(channels), static_cast<int>(channels)},
                         batch};
    call.scores.shares.count = shares;
    return call.behind_gram(gpu, stream);
}

}  // namespace trt_graft
