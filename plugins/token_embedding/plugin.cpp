// TokenEmbedding (tokens (V, D), positions (P, D), sequences (B, S) or (B, beams, S) int32, position (1) int32)
// → y (B, 1, D) or (B·beams, 1, D); attribute scale.
#include "common/op.h"
#include "token_embedding/kernel.cuh"

namespace trt_graft {
namespace {

class TokenEmbeddingPlugin final : public ClonableOp<TokenEmbeddingPlugin> {
  public:
    const char* name() const override { return "TokenEmbedding"; }
    std::vector<Attribute> attributes() override { return {attribute("scale", scale_)}; }
    int32_t inputs() const override { return 4; }
    std::vector<Shape> outputs() const override { return {of({rows(2), constant(1), {0, 1}})}; }
    bool is_int32(int32_t tensor) const override { return tensor == 2 || tensor == 3; }
    const char* refuse(const Sizes& sizes) const override {
        if (sizes.rank(0) != 2 || sizes.rank(1) != 2 || differ(sizes(0, 1), sizes(1, 1))) {
            return "tokens must be (V, D), positions (P, D)";
        }
        if (sizes.rank(2) != 2 && sizes.rank(2) != 3) return "sequences must be (B, S) or (B, beams, S)";
        if (differ(sizes.product_from(3, 0), 1)) return "position must be (1)";
        return nullptr;
    }
    cudaError_t enqueue(const Sizes& sizes, const Call& call) const override {
        const auto integers = [&](int32_t input) { return static_cast<const int32_t*>(call.in[input]); };
        const int32_t last = sizes.rank(2) - 1;
        return launch_token_embedding(call.type, call.in[0], call.in[1], integers(2), integers(3), call.out[0],
                                      sizes.product(2, 0, last), sizes(2, last), sizes(0, 0), sizes(1, 0), sizes(0, 1),
                                      scale_, call.stream);
    }

  private:
    float scale_ = 1;
};

const Registered<TokenEmbeddingPlugin> registered;

}  // namespace
}  // namespace trt_graft
