// 1 × 1 convolution and the residual connection behind it.
//
// Floor: x and residual are read once, y is written once; 2·channels·outputs operations for each pixel weigh as much
// from 192 outputs on.  FP16 goes through tensor cores, see tensor_core.cuh and, for Hopper, stream_sm90.cuh.
#include "pointwise_conv_residual/kernel.cuh"
#include "pointwise_conv_residual/sm90.cuh"
#include "pointwise_conv_residual/tensor_core.cuh"

namespace trt_graft {
namespace {

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
cudaError_t launch_multiply_adds(const PointwiseArguments& a, cudaStream_t stream) {
    const auto launch = [&](auto kernel, int rows) {
        const int64_t blocks = ceil_div(a.pixels, rows * kSide) * ceil_div(a.outputs, kBlockOutputs);
        if (blocks > INT32_MAX) return cudaErrorInvalidValue;
        kernel<<<static_cast<unsigned>(blocks), kSide * kSide, 0, stream>>>(
            static_cast<const T*>(a.x), static_cast<const T*>(a.weight), static_cast<const T*>(a.bias),
            static_cast<const T*>(a.residual), static_cast<T*>(a.y), a.pixels, a.channels, a.outputs, a.pitch_x,
            a.pitch_y);
        return cudaGetLastError();
    };
    return a.pixels > kFewPixels ? launch(multiply_add_kernel<T, 8>, 8) : launch(multiply_add_kernel<T, 4>, 4);
}

}  // namespace

cudaError_t launch_pointwise_conv_residual(DataType type, const void* x, const void* weight, const void* bias,
                                           const void* residual, void* y, int64_t pixels, int64_t channels,
                                           int64_t outputs, cudaStream_t stream) {
    if (pixels * outputs == 0) return cudaSuccess;
    if (channels < 1 || channels > kMaxWidth || outputs > kMaxWidth) return cudaErrorInvalidValue;
    const PointwiseArguments a = {x,
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
    cudaError_t error = cudaSuccess;
#ifdef TRT_GRAFT_SM90
    if (gpu.is_hopper && launch_pointwise_conv_residual_sm90(a, gpu, stream, error)) return error;
#endif
    if (launch_residual_kernel(a, 1, GivenWeights{}, gpu, stream, error)) return error;
    return launch_multiply_adds<__half>(a, stream);  // more channels than shared memory holds
}

}  // namespace trt_graft
