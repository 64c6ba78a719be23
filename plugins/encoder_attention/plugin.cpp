// EncoderAttention (q, k, v (B, T, heads·head_dim)) → y (B, T, heads·head_dim); attributes heads, scale.
#include "common/op.h"
#include "encoder_attention/kernel.cuh"

namespace trt_graft {
namespace {

class EncoderAttentionPlugin final : public ClonableOp<EncoderAttentionPlugin> {
  public:
    const char* name() const override { return "EncoderAttention"; }
    std::vector<Attribute> attributes() override { return {attribute("heads", heads_), attribute("scale", scale_)}; }
    int32_t inputs() const override { return 3; }
    std::vector<Shape> outputs() const override { return {like(0)}; }
    const char* refuse(const Sizes& sizes) const override {
        for (int32_t input = 0; input < 3; ++input) {
            if (sizes.rank(input) != 3) return "q, k and v must be (B, T, D)";
            for (int32_t axis = 0; axis < 3; ++axis) {
                if (differ(sizes(input, axis), sizes(0, axis))) return "q, k and v must be of one shape";
            }
        }
        if (sizes(0, 2) > 0 && (heads_ < 1 || sizes(0, 2) % heads_ != 0)) return "D must divide by the heads";
        return nullptr;
    }
    cudaError_t enqueue(const Sizes& sizes, const Call& call) const override {
        return launch_encoder_attention(call.type, call.in[0], call.in[1], call.in[2], call.out[0], sizes(0, 0),
                                        sizes(0, 1), heads_, sizes(0, 2) / heads_, scale_, call.stream);
    }

  private:
    int32_t heads_ = 1;
    float scale_ = 1;
};

const Registered<EncoderAttentionPlugin> registered;

}  // namespace
}  // namespace trt_graft
