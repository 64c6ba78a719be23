// ResidualLayerNorm (x, residual (…, dim), weight, bias (dim)) → sum, y (…, dim); attribute epsilon.
#include "common/op.h"
#include "residual_layer_norm/kernel.cuh"

namespace trt_graft {
namespace {

class ResidualLayerNormPlugin final : public ClonableOp<ResidualLayerNormPlugin> {
  public:
    const char* name() const override { return "ResidualLayerNorm"; }
    std::vector<Attribute> attributes() override { return {attribute("epsilon", epsilon_)}; }
    int32_t inputs() const override { return 4; }
    std::vector<Shape> outputs() const override { return {like(0), like(0)}; }
    const char* refuse(const Sizes& sizes) const override {
        if (sizes.rank(0) != sizes.rank(1)) return "x and residual must be of one shape";
        for (int32_t axis = 0; axis < sizes.rank(0); ++axis) {
            if (differ(sizes(0, axis), sizes(1, axis))) return "x and residual must be of one shape";
        }
        const int64_t dim = sizes(0, sizes.rank(0) - 1);
        if (differ(dim, sizes(2, 0)) || differ(dim, sizes(3, 0))) return "weight and bias must be (dim)";
        return nullptr;
    }
    cudaError_t enqueue(const Sizes& sizes, const Call& call) const override {
        const int32_t last = sizes.rank(0) - 1;
        return launch_residual_layer_norm(call.type, call.in[0], call.in[1], call.in[2], call.in[3], call.out[0],
                                          call.out[1], sizes.product(0, 0, last), sizes(0, last), epsilon_,
                                          call.stream);
    }

  private:
    float epsilon_ = 0;
};

const Registered<ResidualLayerNormPlugin> registered;

}  // namespace
}  // namespace trt_graft
