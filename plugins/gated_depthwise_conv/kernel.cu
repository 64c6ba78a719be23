// Depthwise 3 × 3 convolution of two halves of the channels, GELU of the first, times the second: a thread computes the
// same channels of both, so that neither is stored.  Where these are FP16 sums, fast_gelu is exact enough.
#include "common/depthwise.cuh"
#include "common/gelu.cuh"
#include "gated_depthwise_conv/kernel.cuh"

namespace trt_graft {
namespace {

struct Gate {
    __device__ float operator()(const float (&z)[2]) const { return exact_gelu(z[0]) * z[1]; }
    __device__ __half2 operator()(const __half2 (&z)[2]) const {
        const float2 gate = __half22float2(z[0]), value = __half22float2(z[1]);
        return __floats2half2_rn(fast_gelu(gate.x) * value.x, fast_gelu(gate.y) * value.y);
    }
};

}  // namespace

cudaError_t launch_gated_depthwise_conv(DataType type, const void* x, const void* weight, const void* bias, void* y,
                                        int64_t batch, int64_t height, int64_t width, int64_t channels,
                                        cudaStream_t stream) {
    return launch_depthwise<2>(type, x, weight, bias, y, batch, height, width, channels, Gate{}, stream);
}

}  // namespace trt_graft
