// TransposedAttentionResidual (qkv (B, 3·C, H, W), temperature (heads, 1, 1), weight (C, C, 1, 1), bias (C),
// residual (B, C, H, W)) → y (B, C, H, W).
#include "common/op.h"
#include "transposed_attention_residual/kernel.cuh"

namespace trt_graft {
namespace {

class TransposedAttentionResidualPlugin final : public ClonableOp<TransposedAttentionResidualPlugin> {
  public:
    const char* name() const override { return "TransposedAttentionResidual"; }
    std::vector<Attribute> attributes() override { return {}; }
    int32_t inputs() const override { return 5; }
    std::vector<Shape> outputs() const override { return {like(4)}; }
    bool is_image(int32_t tensor) const override { return tensor == 0 || tensor >= 4; }
    const char* refuse(const Sizes& sizes) const override {
        if (sizes.rank(0) != 4) return "qkv must be (B, 3·C, H, W)";
        if (sizes(0, 1) >= 0 && sizes(1, 0) > 0 && sizes(0, 1) % (3 * sizes(1, 0)) != 0) {
            return "the channels of qkv must divide by 3 and by the heads";
        }
        const int64_t channels = sizes(0, 1) >= 0 ? sizes(0, 1) / 3 : -1;
        if (sizes.rank(2) != 4 || differ(channels, sizes(2, 0)) || differ(channels, sizes(2, 1)) ||
            differ(sizes(2, 2), 1) || differ(sizes(2, 3), 1)) {
            return "weight must be (C, C, 1, 1)";
        }
        if (differ(channels, sizes(3, 0))) return "bias must be (C)";
        if (sizes.rank(4) != 4 || differ(sizes(0, 0), sizes(4, 0)) || differ(channels, sizes(4, 1)) ||
            differ(sizes(0, 2), sizes(4, 2)) || differ(sizes(0, 3), sizes(4, 3))) {
            return "residual must be (B, C, H, W)";
        }
        return nullptr;
    }
    int64_t workspace_bytes(const Sizes& sizes, DataType) const override {
        return transposed_attention_residual_workspace_bytes(sizes(0, 0), sizes(1, 0), head_channels(sizes),
                                                             sizes.product_from(0, 2));
    }
    cudaError_t enqueue(const Sizes& sizes, const Call& call) const override {
        return launch_transposed_attention_residual(call.type, call.in[0], call.in[1], call.in[2], call.in[3],
                                                    call.in[4], call.out[0], call.workspace, sizes(0, 0), sizes(1, 0),
                                                    head_channels(sizes), sizes.product_from(0, 2), call.stream);
    }

  private:
    static int64_t head_channels(const Sizes& sizes) { return sizes(0, 1) / 3 / sizes(1, 0); }
};

const Registered<TransposedAttentionResidualPlugin> registered;

}  // namespace
}  // namespace trt_graft
