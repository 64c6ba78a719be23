// Compiled for sm_90a alone, in an object of its own.
#include "pointwise_conv_residual/stream_sm90.cuh"
#include "transposed_attention_residual/sm90.cuh"

namespace trt_graft {

bool launch_folded_residual_sm90(const PointwiseArguments& a, int64_t images, const FoldedWeights& weights,
                                 const Gpu& gpu, cudaStream_t stream, cudaError_t& error) {
    switch (a.channels) {
        case 48:
            return launch_residual_stream<1, 1, 48, 2>(a, images, weights, gpu, stream, error);
        case 96:
            return launch_residual_stream<1, 2, 96, 2>(a, images, weights, gpu, stream, error);
        case 192:
            return launch_residual_stream<1, 3, 48, 2>(a, images, weights, gpu, stream, error);
        case 384:
            return launch_residual_stream<1, 6, 48, 1>(a, images, weights, gpu, stream, error);
        default:
            return false;
    }
}

}  // namespace trt_graft
