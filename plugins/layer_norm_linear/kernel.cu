// Layer normalisation of one new token for each row, and the linear layer behind it.
//
// Floor: weight is read once; see common/decode_linear.cuh.
#include "common/decode_linear.cuh"
#include "layer_norm_linear/kernel.cuh"

namespace trt_graft {

cudaError_t launch_layer_norm_linear(DataType type, const void* x, const void* gamma, const void* beta,
                                     const void* weight, const void* bias, void* h, void* y, int64_t rows,
                                     int64_t inputs, int64_t outputs, float epsilon, int64_t activation,
                                     cudaStream_t stream) {
    if (rows * outputs == 0) return cudaSuccess;
    if (activation < 0 || activation > static_cast<int64_t>(Activation::kRelu)) return cudaErrorInvalidValue;
    cudaError_t error = cudaSuccess;
    const cudaError_t launched = dispatch(type, [&](auto tag) {
        using T = decltype(tag);
        DecodeLinear<T> a{};
        a.x = static_cast<const T*>(x);
        a.gamma = static_cast<const T*>(gamma);
        a.beta = static_cast<const T*>(beta);
        a.weight = static_cast<const T*>(weight);
        a.bias = static_cast<const T*>(bias);
        a.h = static_cast<T*>(h);
        a.y[0] = static_cast<T*>(y);
        a.rows = static_cast<int>(rows);
        a.inputs = static_cast<int>(inputs);
        a.outputs = a.width = static_cast<int>(outputs);
        a.epsilon = epsilon;
        a.activation = static_cast<Activation>(activation);
        error = launch_decode_linear<true>(a, stream);
    });
    return error ? error : launched;
}

}  // namespace trt_graft
