// DepthwiseConv (x (B, C, H, W), weight (C, 1, 3, 3), bias (C)) → y (B, C, H, W); attribute channels = C.
#include "common/op.h"
#include "depthwise_conv/kernel.cuh"

namespace trt_graft {
namespace {

class DepthwiseConvPlugin final : public ClonableOp<DepthwiseConvPlugin> {
  public:
    const char* name() const override { return "DepthwiseConv"; }
    std::vector<Attribute> attributes() override { return {attribute("channels", channels_)}; }
    int32_t inputs() const override { return 3; }
    std::vector<Shape> outputs() const override { return {like(0)}; }
    bool is_image(int32_t tensor) const override { return tensor == 0 || tensor == 3; }
    const char* refuse(const Sizes& sizes) const override {
        if (sizes.rank(0) != 4) return "x must be (B, C, H, W)";
        if (differ(sizes(0, 1), channels_)) return "x must have `channels` channels";
        if (differ(sizes.product_from(1, 0), channels_ * 9)) return "weight must be (C, 1, 3, 3)";
        if (differ(sizes(2, 0), channels_)) return "bias must be (C)";
        return nullptr;
    }
    cudaError_t enqueue(const Sizes& sizes, const Call& call) const override {
        return launch_depthwise_conv(call.type, call.in[0], call.in[1], call.in[2], call.out[0], sizes(0, 0),
                                     sizes(0, 2), sizes(0, 3), channels_, call.stream);
    }

  private:
    int32_t channels_ = 0;
};

const Registered<DepthwiseConvPlugin> registered;

}  // namespace
}  // namespace trt_graft
