// Compiled for sm_90a alone, in an object of its own.
#include "pointwise_conv_residual/sm90.cuh"
#include "pointwise_conv_residual/stream_sm90.cuh"

namespace trt_graft {

bool launch_pointwise_conv_residual_sm90(const PointwiseArguments& a, const Gpu& gpu, cudaStream_t stream,
                                         cudaError_t& error) {
    constexpr GivenWeights kWeights;
    switch (a.channels) {
        case 128:
            return launch_residual_stream<1, 2, 48, 2>(a, 1, kWeights, gpu, stream, error);
        case 256:
            return launch_residual_stream<1, 4, 96, 2>(a, 1, kWeights, gpu, stream, error);
        case 512:
            return launch_residual_stream<2, 4, 96, 2>(a, 1, kWeights, gpu, stream, error);
        case 1024:
            return launch_residual_stream<4, 4, 48, 3>(a, 1, kWeights, gpu, stream, error);
        default:
            return false;
    }
}

}  // namespace trt_graft
