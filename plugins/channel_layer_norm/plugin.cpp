// ChannelLayerNorm (x (B, C, H, W), weight (C), bias (C)) → y (B, C, H, W); attributes epsilon, subtract_mean.
#include "channel_layer_norm/kernel.cuh"
#include "common/op.h"

namespace trt_graft {
namespace {

class ChannelLayerNormPlugin final : public ClonableOp<ChannelLayerNormPlugin> {
  public:
    const char* name() const override { return "ChannelLayerNorm"; }
    std::vector<Attribute> attributes() override {
        return {attribute("epsilon", epsilon_), attribute("subtract_mean", subtract_mean_)};
    }
    int32_t inputs() const override { return 3; }
    std::vector<Shape> outputs() const override { return {like(0)}; }
    bool is_image(int32_t tensor) const override { return tensor == 0 || tensor == 3; }
    const char* refuse(const Sizes& sizes) const override {
        if (sizes.rank(0) != 4) return "x must be (B, C, H, W)";
        if (differ(sizes(0, 1), sizes(1, 0)) || differ(sizes(0, 1), sizes(2, 0))) return "weight and bias must be (C)";
        return nullptr;
    }
    cudaError_t enqueue(const Sizes& sizes, const Call& call) const override {
        return launch_channel_layer_norm(call.type, call.in[0], call.in[1], call.in[2], call.out[0],
                                         sizes(0, 0) * sizes.product_from(0, 2), sizes(0, 1), epsilon_, subtract_mean_,
                                         call.stream);
    }

  private:
    float epsilon_ = 0;
    int32_t subtract_mean_ = 0;
};

const Registered<ChannelLayerNormPlugin> registered;

}  // namespace
}  // namespace trt_graft
