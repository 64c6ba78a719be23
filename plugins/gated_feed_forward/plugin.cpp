// GatedFeedForward (x (B, C, H, W), norm_weight, norm_bias (C), project_in (2·hidden, C, 1, 1), project_in_bias
// (2·hidden), depthwise (2·hidden, 1, 3, 3), depthwise_bias (2·hidden), project_out (C, hidden, 1, 1),
// project_out_bias (C)) → y (B, C, H, W); attributes epsilon, subtract_mean, channels: 2·hidden.
#include "common/op.h"
#include "gated_feed_forward/kernel.cuh"

namespace trt_graft {
namespace {

class GatedFeedForwardPlugin final : public ClonableOp<GatedFeedForwardPlugin> {
  public:
    const char* name() const override { return "GatedFeedForward"; }
    std::vector<Attribute> attributes() override {
        return {attribute("epsilon", epsilon_), attribute("subtract_mean", subtract_mean_),
                attribute("channels", channels_)};
    }
    int32_t inputs() const override { return 9; }
    std::vector<Shape> outputs() const override { return {like(0)}; }
    bool is_image(int32_t tensor) const override { return tensor == 0 || tensor == 9; }
    const char* refuse(const Sizes& sizes) const override {
        if (sizes.rank(0) != 4) return "x must be (B, C, H, W)";
        const int64_t channels = sizes(0, 1);
        if (differ(channels, sizes(1, 0)) || differ(channels, sizes(2, 0))) {
            return "norm_weight and norm_bias must be (C)";
        }
        if (sizes.rank(3) != 4 || differ(channels_, sizes(3, 0)) || differ(channels, sizes(3, 1)) ||
            differ(sizes(3, 2), 1) || differ(sizes(3, 3), 1)) {
            return "project_in must be (2*hidden, C, 1, 1)";
        }
        if (channels_ % 2 != 0) return "channels must be even";
        if (differ(channels_, sizes(4, 0)) || differ(channels_, sizes(6, 0))) {
            return "project_in_bias and depthwise_bias must be (2*hidden)";
        }
        if (sizes.rank(5) != 4 || differ(channels_, sizes(5, 0)) || differ(sizes(5, 1), 1) || differ(sizes(5, 2), 3) ||
            differ(sizes(5, 3), 3)) {
            return "depthwise must be (2*hidden, 1, 3, 3)";
        }
        if (sizes.rank(7) != 4 || differ(channels, sizes(7, 0)) || differ(channels_ / 2, sizes(7, 1)) ||
            differ(sizes(7, 2), 1) || differ(sizes(7, 3), 1)) {
            return "project_out must be (C, hidden, 1, 1)";
        }
        if (differ(channels, sizes(8, 0))) return "project_out_bias must be (C)";
        return nullptr;
    }
    int64_t workspace_bytes(const Sizes& sizes, DataType) const override {
        return gated_feed_forward_workspace_bytes(sizes(0, 0), sizes(0, 2), sizes(0, 3), sizes(7, 1));
    }
    cudaError_t enqueue(const Sizes& sizes, const Call& call) const override {
        return launch_gated_feed_forward(call.type, call.in[0], call.in[1], call.in[2], call.in[3], call.in[4],
                                         call.in[5], call.in[6], call.in[7], call.in[8], call.out[0], call.workspace,
                                         sizes(0, 0), sizes(0, 2), sizes(0, 3), sizes(0, 1), sizes(7, 1), epsilon_,
                                         subtract_mean_, call.stream);
    }

  private:
    float epsilon_ = 0;
    int32_t subtract_mean_ = 0, channels_ = 0;
};

const Registered<GatedFeedForwardPlugin> registered;

}  // namespace
}  // namespace trt_graft
