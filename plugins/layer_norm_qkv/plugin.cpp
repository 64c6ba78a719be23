// LayerNormQkv (x (B, 1, K), gamma, beta (K), weight (3·N, K), bias (3·N)) → h (B, 1, K), y0, y1, y2 (B, 1, N);
// attribute epsilon.
#include "common/op.h"
#include "layer_norm_qkv/kernel.cuh"

namespace trt_graft {
namespace {

class LayerNormQkvPlugin final : public ClonableOp<LayerNormQkvPlugin> {
  public:
    const char* name() const override { return "LayerNormQkv"; }
    std::vector<Attribute> attributes() override { return {attribute("epsilon", epsilon_)}; }
    int32_t inputs() const override { return 5; }
    std::vector<Shape> outputs() const override {
        const Shape part = of({{0, 0}, {0, 1}, {3, 0, 1, 3}});
        return {like(0), part, part, part};
    }
    const char* refuse(const Sizes& sizes) const override {
        if (sizes.rank(0) != 3 || differ(sizes(0, 1), 1)) return "x must be (B, 1, K)";
        const int64_t inputs = sizes(0, 2);
        if (differ(inputs, sizes(1, 0)) || differ(inputs, sizes(2, 0))) return "gamma and beta must be (K)";
        if (sizes.rank(3) != 2 || differ(inputs, sizes(3, 1)) || (sizes(3, 0) > 0 && sizes(3, 0) % 3)) {
            return "weight must be (3·N, K)";
        }
        if (differ(sizes(3, 0), sizes(4, 0))) return "bias must be (3·N)";
        return nullptr;
    }
    cudaError_t enqueue(const Sizes& sizes, const Call& call) const override {
        return launch_layer_norm_qkv(call.type, call.in[0], call.in[1], call.in[2], call.in[3], call.in[4], call.out[0],
                                     call.out[1], call.out[2], call.out[3], sizes(0, 0), sizes(0, 2), sizes(3, 0) / 3,
                                     epsilon_, call.stream);
    }

  private:
    float epsilon_ = 0;
};

const Registered<LayerNormQkvPlugin> registered;

}  // namespace
}  // namespace trt_graft
