// TransposedAttention (qkv (B, 3·C, H, W), temperature (heads, 1, 1)) → y (B, C, H, W).
#include "common/op.h"
#include "transposed_attention/kernel.cuh"

namespace trt_graft {
namespace {

class TransposedAttentionPlugin final : public ClonableOp<TransposedAttentionPlugin> {
  public:
    const char* name() const override { return "TransposedAttention"; }
    std::vector<Attribute> attributes() override { return {}; }
    int32_t inputs() const override { return 2; }
    std::vector<Shape> outputs() const override { return {of({{0, 0}, {0, 1, 1, 3}, {0, 2}, {0, 3}})}; }
    bool is_image(int32_t tensor) const override { return tensor != 1; }
    const char* refuse(const Sizes& sizes) const override {
        if (sizes.rank(0) != 4) return "qkv must be (B, 3·C, H, W)";
        if (sizes(0, 1) >= 0 && sizes(1, 0) > 0 && sizes(0, 1) % (3 * sizes(1, 0)) != 0) {
            return "the channels of qkv must divide by 3 and by the heads";
        }
        return nullptr;
    }
    int64_t workspace_bytes(const Sizes& sizes, DataType) const override {
        return transposed_attention_workspace_bytes(sizes(0, 0), sizes(1, 0), head_channels(sizes),
                                                    sizes.product_from(0, 2));
    }
    cudaError_t enqueue(const Sizes& sizes, const Call& call) const override {
        return launch_transposed_attention(call.type, call.in[0], call.in[1], call.out[0], call.workspace, sizes(0, 0),
                                           sizes(1, 0), head_channels(sizes), sizes.product_from(0, 2), call.stream);
    }

  private:
    static int64_t head_channels(const Sizes& sizes) { return sizes(0, 1) / 3 / sizes(1, 0); }
};

const Registered<TransposedAttentionPlugin> registered;

}  // namespace
}  // namespace trt_graft
