// Depthwise 3 × 3 convolution of two halves of the channels, GELU of the first, times the second: a thread computes the
// same channels of both, so that neither is stored.
#include "common/depthwise.cuh"
#include "gated_depthwise_conv/kernel.cuh"

namespace trt_graft {
namespace {

struct Gate {
    __device__ float operator()(const float (&z)[2]) const {
        const float half = 0.5f * z[0];
        return fmaf(half, erff(z[0] * 0.70710678f), half) * z[1];
    }
};

}  // namespace

cudaError_t launch_gated_depthwise_conv(DataType type, const void* x, const void* weight, const void* bias, void* y,
                                        int64_t batch, int64_t height, int64_t width, int64_t channels,
                                        cudaStream_t stream) {
    return launch_depthwise<2>(type, x, weight, bias, y, batch, height, width, channels, Gate{}, stream);
}

}  // namespace trt_graft
