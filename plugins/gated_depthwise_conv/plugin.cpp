// GatedDepthwiseConv (x (B, 2·C, H, W), weight (2·C, 1, 3, 3), bias (2·C)) → y (B, C, H, W); attribute channels = 2·C.
#include "common/op.h"
#include "gated_depthwise_conv/kernel.cuh"

namespace trt_graft {
namespace {

class GatedDepthwiseConvPlugin final : public ClonableOp<GatedDepthwiseConvPlugin> {
  public:
    const char* name() const override { return "GatedDepthwiseConv"; }
    std::vector<Attribute> attributes() override { return {attribute("channels", channels_)}; }
    int32_t inputs() const override { return 3; }
    std::vector<Shape> outputs() const override { return {of({{0, 0}, {0, 1, 1, 2}, {0, 2}, {0, 3}})}; }
    bool is_image(int32_t tensor) const override { return tensor == 0 || tensor == 3; }
    const char* refuse(const Sizes& sizes) const override {
        if (sizes.rank(0) != 4) return "x must be (B, 2·C, H, W)";
        if (channels_ % 2 != 0 || differ(sizes(0, 1), channels_))
            return "x must have `channels` channels, an even number";
        if (differ(sizes.product_from(1, 0), channels_ * 9)) return "weight must be (2·C, 1, 3, 3)";
        if (differ(sizes(2, 0), channels_)) return "bias must be (2·C)";
        return nullptr;
    }
    cudaError_t enqueue(const Sizes& sizes, const Call& call) const override {
        return launch_gated_depthwise_conv(call.type, call.in[0], call.in[1], call.in[2], call.out[0], sizes(0, 0),
                                           sizes(0, 2), sizes(0, 3), channels_ / 2, call.stream);
    }

  private:
    int32_t channels_ = 0;
};

const Registered<GatedDepthwiseConvPlugin> registered;

}  // namespace
}  // namespace trt_graft
