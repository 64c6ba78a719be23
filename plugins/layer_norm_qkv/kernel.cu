// Layer normalisation of one new token for each row, and the linear layers behind it that make queries, keys and
// values.
//
// Floor: weight is read once; see common/decode_linear.cuh.
#include "common/decode_linear.cuh"
#include "layer_norm_qkv/kernel.cuh"

namespace trt_graft {

cudaError_t launch_layer_norm_qkv(DataType type, const void* x, const void* gamma, const void* beta, const void* weight,
                                  const void* bias, void* h, void* y0, void* y1, void* y2, int64_t rows, int64_t inputs,
                                  int64_t width, float epsilon, cudaStream_t stream) {
    if (rows * width == 0) return cudaSuccess;
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
        a.y[0] = static_cast<T*>(y0);
        a.y[1] = static_cast<T*>(y1);
        a.y[2] = static_cast<T*>(y2);
        a.rows = static_cast<int>(rows);
        a.inputs = static_cast<int>(inputs);
        a.outputs = 3 * static_cast<int>(width);
        a.width = static_cast<int>(width);
        a.epsilon = epsilon;
        error = launch_decode_linear<true>(a, stream);
    });
    return error ? error : launched;
}

}  // namespace trt_graft
