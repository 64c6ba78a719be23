// NormPointwiseConv (x (B, C, H, W), norm_weight, norm_bias (C), weight (N, C, 1, 1), bias (N)) → y (B, N, H, W);
// attributes epsilon, subtract_mean.
#include "common/op.h"
#include "norm_pointwise_conv/kernel.cuh"

namespace trt_graft {
namespace {

class NormPointwiseConvPlugin final : public ClonableOp<NormPointwiseConvPlugin> {
  public:
    const char* name() const override { return "NormPointwiseConv"; }
    std::vector<Attribute> attributes() override {
        return {attribute("epsilon", epsilon_), attribute("subtract_mean", subtract_mean_)};
    }
    int32_t inputs() const override { return 5; }
    std::vector<Shape> outputs() const override { return {of({{0, 0}, {3, 0}, {0, 2}, {0, 3}})}; }
    bool is_image(int32_t tensor) const override { return tensor == 0 || tensor == 5; }
    const char* refuse(const Sizes& sizes) const override {
        if (sizes.rank(0) != 4) return "x must be (B, C, H, W)";
        if (differ(sizes(0, 1), sizes(1, 0)) || differ(sizes(0, 1), sizes(2, 0))) {
            return "norm_weight and norm_bias must be (C)";
        }
        if (sizes.rank(3) != 4 || differ(sizes(0, 1), sizes(3, 1)) || differ(sizes(3, 2), 1) ||
            differ(sizes(3, 3), 1)) {
            return "weight must be (N, C, 1, 1)";
        }
        if (differ(sizes(3, 0), sizes(4, 0))) return "bias must be (N)";
        return nullptr;
    }
    cudaError_t enqueue(const Sizes& sizes, const Call& call) const override {
        return launch_norm_pointwise_conv(call.type, call.in[0], call.in[1], call.in[2], call.in[3], call.in[4],
                                          call.out[0], sizes(0, 0) * sizes.product_from(0, 2), sizes(0, 1), sizes(3, 0),
                                          epsilon_, subtract_mean_, call.stream);
    }

  private:
    float epsilon_ = 0;
    int32_t subtract_mean_ = 0;
};

const Registered<NormPointwiseConvPlugin> registered;

}  // namespace
}  // namespace trt_graft
