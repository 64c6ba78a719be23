// CrossAttention (query (R, 1, heads·head_dim), key, value (B, heads, T, head_dim)) → y like query; attribute scale.
//
// R / B rows that follow each other share the keys and values of an image.
#include "common/op.h"
#include "cross_attention/kernel.cuh"

namespace trt_graft {
namespace {

class CrossAttentionPlugin final : public ClonableOp<CrossAttentionPlugin> {
  public:
    const char* name() const override { return "CrossAttention"; }
    std::vector<Attribute> attributes() override { return {attribute("scale", scale_)}; }
    int32_t inputs() const override { return 3; }
    std::vector<Shape> outputs() const override { return {like(0)}; }
    const char* refuse(const Sizes& sizes) const override {
        if (sizes.rank(0) != 3 || differ(sizes(0, 1), 1)) return "query must be (R, 1, D)";
        if (sizes.rank(1) != 4 || sizes.rank(2) != 4) return "key and value must be (B, heads, T, head_dim)";
        for (int32_t axis = 0; axis < 4; ++axis) {
            if (differ(sizes(1, axis), sizes(2, axis))) return "key and value must be of one shape";
        }
        if (sizes(0, 0) > 0 && sizes(1, 0) > 0 && sizes(0, 0) % sizes(1, 0) != 0) return "R must be a multiple of B";
        if (differ(sizes(0, 2), sizes(1, 1) * sizes(1, 3))) return "D must be heads · head_dim";
        return nullptr;
    }
    cudaError_t enqueue(const Sizes& sizes, const Call& call) const override {
        return launch_cross_attention(call.type, call.in[0], call.in[1], call.in[2], call.out[0], sizes(0, 0),
                                      sizes(1, 0), sizes(1, 1), sizes(1, 2), sizes(1, 3), scale_, call.stream);
    }

  private:
    float scale_ = 1;
};

const Registered<CrossAttentionPlugin> registered;

}  // namespace
}  // namespace trt_graft
