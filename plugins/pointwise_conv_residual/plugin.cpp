// PointwiseConvResidual (x (B, K, H, W), weight (N, K, 1, 1), bias (N), residual (B, N, H, W)) → y (B, N, H, W).
#include "common/op.h"
#include "pointwise_conv_residual/kernel.cuh"

namespace trt_graft {
namespace {

class PointwiseConvResidualPlugin final : public ClonableOp<PointwiseConvResidualPlugin> {
  public:
    const char* name() const override { return "PointwiseConvResidual"; }
    std::vector<Attribute> attributes() override { return {}; }
    int32_t inputs() const override { return 4; }
    std::vector<Shape> outputs() const override { return {like(3)}; }
    bool is_image(int32_t tensor) const override { return tensor == 0 || tensor == 3 || tensor == 4; }
    const char* refuse(const Sizes& sizes) const override {
        if (sizes.rank(0) != 4) return "x must be (B, K, H, W)";
        if (sizes.rank(1) != 4 || differ(sizes(0, 1), sizes(1, 1)) || differ(sizes(1, 2), 1) ||
            differ(sizes(1, 3), 1)) {
            return "weight must be (N, K, 1, 1)";
        }
        if (differ(sizes(1, 0), sizes(2, 0))) return "bias must be (N)";
        if (sizes.rank(3) != 4 || differ(sizes(0, 0), sizes(3, 0)) || differ(sizes(1, 0), sizes(3, 1)) ||
            differ(sizes(0, 2), sizes(3, 2)) || differ(sizes(0, 3), sizes(3, 3))) {
            return "residual must be (B, N, H, W)";
        }
        return nullptr;
    }
    cudaError_t enqueue(const Sizes& sizes, const Call& call) const override {
        return launch_pointwise_conv_residual(call.type, call.in[0], call.in[1], call.in[2], call.in[3], call.out[0],
                                              sizes(0, 0) * sizes.product_from(0, 2), sizes(0, 1), sizes(1, 0),
                                              call.stream);
    }
};

const Registered<PointwiseConvResidualPlugin> registered;

}  // namespace
}  // namespace trt_graft
