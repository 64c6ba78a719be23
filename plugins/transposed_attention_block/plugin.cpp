// TransposedAttentionBlock (x (B, C, H, W), norm_weight, norm_bias (C), qkv_weight (3·C, C, 1, 1), qkv_bias (3·C),
// depthwise_weight (3·C, 1, 3, 3), depthwise_bias (3·C), temperature (heads, 1, 1), weight (C, C, 1, 1), bias (C)) →
// y (B, C, H, W); attributes channels = 3·C, epsilon, subtract_mean.
#include "common/op.h"
#include "transposed_attention_block/kernel.cuh"

namespace trt_graft {
namespace {

class TransposedAttentionBlockPlugin final : public ClonableOp<TransposedAttentionBlockPlugin> {
  public:
    const char* name() const override { return "TransposedAttentionBlock"; }
    std::vector<Attribute> attributes() override {
        return {attribute("channels", channels_), attribute("epsilon", epsilon_),
                attribute("subtract_mean", subtract_mean_)};
    }
    int32_t inputs() const override { return 10; }
    std::vector<Shape> outputs() const override { return {like(0)}; }
    bool is_image(int32_t tensor) const override { return tensor == 0 || tensor == 10; }
    const char* refuse(const Sizes& sizes) const override {
        if (sizes.rank(0) != 4) return "x must be (B, C, H, W)";
        const int64_t channels = sizes(0, 1), all = channels >= 0 ? 3 * channels : -1;
        if (differ(channels * 3, channels_)) return "`channels` must be 3·C";
        if (channels >= 0 && sizes(7, 0) > 0 && channels % sizes(7, 0) != 0) return "C must divide by the heads";
        if (differ(channels, sizes(1, 0)) || differ(channels, sizes(2, 0))) {
            return "norm_weight and norm_bias must be (C)";
        }
        if (!is_pointwise(sizes, 3, all, channels)) return "qkv_weight must be (3·C, C, 1, 1)";
        if (differ(sizes.product_from(5, 0), all * 9)) return "depthwise_weight must be (3·C, 1, 3, 3)";
        if (differ(all, sizes(4, 0)) || differ(all, sizes(6, 0))) return "qkv_bias and depthwise_bias must be (3·C)";
        if (!is_pointwise(sizes, 8, channels, channels)) return "weight must be (C, C, 1, 1)";
        if (differ(channels, sizes(9, 0))) return "bias must be (C)";
        return nullptr;
    }
    int64_t workspace_bytes(const Sizes& sizes, DataType type) const override {
        return transposed_attention_block_workspace_bytes(type, sizes(0, 0), sizes(7, 0), head_channels(sizes),
                                                          sizes(0, 2), sizes(0, 3));
    }
    cudaError_t enqueue(const Sizes& sizes, const Call& call) const override {
        const auto in = [&](int32_t index) { return call.in[index]; };
        return launch_transposed_attention_block(call.type, in(0), in(1), in(2), in(3), in(4), in(5), in(6), in(7),
                                                 in(8), in(9), call.out[0], call.workspace, sizes(0, 0), sizes(7, 0),
                                                 head_channels(sizes), sizes(0, 2), sizes(0, 3), epsilon_,
                                                 subtract_mean_, call.stream);
    }

  private:
    static int64_t head_channels(const Sizes& sizes) { return sizes(0, 1) / sizes(7, 0); }
    static bool is_pointwise(const Sizes& sizes, int32_t input, int64_t outputs, int64_t channels) {
        return sizes.rank(input) == 4 && !differ(sizes(input, 0), outputs) && !differ(sizes(input, 1), channels) &&
               !differ(sizes(input, 2), 1) && !differ(sizes(input, 3), 1);
    }

    int32_t channels_ = 0, subtract_mean_ = 0;
    float epsilon_ = 0;
};

const Registered<TransposedAttentionBlockPlugin> registered;

}  // namespace
}  // namespace trt_graft
