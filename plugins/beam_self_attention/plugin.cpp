// BeamSelfAttention (query, key, value (B·beams, 1, heads·head_dim), key_cache, value_cache (B, beams·heads, S,
// head_dim), ancestors (B, beams, S) int32, position (1) int32) → y like query, present_key, present_value like the
// caches; attribute scale.
//
// When TensorRT's caller binds one address to a cache and its present, only the new slots are written.
#include "beam_self_attention/kernel.cuh"
#include "common/op.h"

namespace trt_graft {
namespace {

class BeamSelfAttentionPlugin final : public ClonableOp<BeamSelfAttentionPlugin> {
  public:
    const char* name() const override { return "BeamSelfAttention"; }
    std::vector<Attribute> attributes() override { return {attribute("scale", scale_)}; }
    int32_t inputs() const override { return 7; }
    std::vector<Shape> outputs() const override { return {like(0), like(3), like(4)}; }
    bool is_int32(int32_t tensor) const override { return tensor == 5 || tensor == 6; }
    const char* refuse(const Sizes& sizes) const override {
        for (int32_t input = 0; input < 3; ++input) {
            if (sizes.rank(input) != 3 || differ(sizes(input, 1), 1)) return "query, key and value must be (R, 1, D)";
            if (differ(sizes(input, 0), sizes(0, 0))) return "query, key and value must be of one shape";
        }
        if (sizes.rank(3) != 4 || sizes.rank(4) != 4) return "the caches must be (B, beams·heads, S, head_dim)";
        for (int32_t axis = 0; axis < 4; ++axis) {
            if (differ(sizes(3, axis), sizes(4, axis))) return "the caches must be of one shape";
        }
        if (sizes.rank(5) != 3 || differ(sizes(5, 0), sizes(3, 0)) || differ(sizes(5, 2), sizes(3, 2))) {
            return "ancestors must be (B, beams, S)";
        }
        const bool known = sizes(0, 0) >= 0 && sizes(3, 0) >= 0 && sizes(5, 1) >= 0;
        if (known && sizes(0, 0) != sizes(3, 0) * sizes(5, 1)) return "R must be B · beams";
        if (sizes(0, 2) >= 0 && sizes(5, 1) >= 0 && sizes(0, 2) * sizes(5, 1) != sizes(3, 1) * sizes(3, 3)) {
            return "D must be heads · head_dim";
        }
        if (differ(sizes.product_from(6, 0), 1)) return "position must be (1)";
        return nullptr;
    }
    cudaError_t enqueue(const Sizes& sizes, const Call& call) const override {
        const auto integers = [&](int32_t input) { return static_cast<const int32_t*>(call.in[input]); };
        return launch_beam_self_attention(call.type, call.in[0], call.in[1], call.in[2], call.in[3], call.in[4],
                                          integers(5), integers(6), call.out[0], call.out[1], call.out[2], sizes(3, 0),
                                          sizes(5, 1), sizes(3, 1) / sizes(5, 1), sizes(3, 2), sizes(3, 3), scale_,
                                          call.stream);
    }

  private:
    float scale_ = 1;
};

const Registered<BeamSelfAttentionPlugin> registered;

}  // namespace
}  // namespace trt_graft
