// A linear layer of one new token for each row, and the residual connection behind it.
//
// Floor: weight is read once; see common/decode_linear.cuh.
#include "common/decode_linear.cuh"
#include "linear_residual/kernel.cuh"

namespace trt_graft {

cudaError_t launch_linear_residual(DataType type, const void* x, const void* weight, const void* bias,
                                   const void* residual, void* y, int64_t rows, int64_t inputs, int64_t outputs,
                                   cudaStream_t stream) {
    if (rows * outputs == 0) return cudaSuccess;
    cudaError_t error = cudaSuccess;
    const cudaError_t launched = dispatch(type, [&](auto tag) {
        using T = decltype(tag);
        DecodeLinear<T> a{};
        a.x = static_cast<const T*>(x);
        a.weight = static_cast<const T*>(weight);
        a.bias = static_cast<const T*>(bias);
        a.residual = static_cast<const T*>(residual);
        a.y[0] = static_cast<T*>(y);
        a.rows = static_cast<int>(rows);
        a.inputs = static_cast<int>(inputs);
        a.outputs = a.width = static_cast<int>(outputs);
        error = launch_decode_linear<false>(a, stream);
    });
    return error ? error : launched;
}

}  // namespace trt_graft
