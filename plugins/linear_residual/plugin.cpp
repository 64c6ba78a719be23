// LinearResidual (x (B, 1, K), weight (N, K), bias (N), residual (B, 1, N)) → y (B, 1, N).
#include "common/op.h"
#include "linear_residual/kernel.cuh"

namespace trt_graft {
namespace {

class LinearResidualPlugin final : public ClonableOp<LinearResidualPlugin> {
  public:
    const char* name() const override { return "LinearResidual"; }
    std::vector<Attribute> attributes() override { return {}; }
    int32_t inputs() const override { return 4; }
    std::vector<Shape> outputs() const override { return {like(3)}; }
    const char* refuse(const Sizes& sizes) const override {
        if (sizes.rank(0) != 3 || differ(sizes(0, 1), 1)) return "x must be (B, 1, K)";
        if (sizes.rank(1) != 2 || differ(sizes(0, 2), sizes(1, 1))) return "weight must be (N, K)";
        if (differ(sizes(1, 0), sizes(2, 0))) return "bias must be (N)";
        if (sizes.rank(3) != 3 || differ(sizes(0, 0), sizes(3, 0)) || differ(sizes(3, 1), 1) ||
            differ(sizes(1, 0), sizes(3, 2))) {
            return "residual must be (B, 1, N)";
        }
        return nullptr;
    }
    cudaError_t enqueue(const Sizes& sizes, const Call& call) const override {
        return launch_linear_residual(call.type, call.in[0], call.in[1], call.in[2], call.in[3], call.out[0],
                                      sizes(0, 0), sizes(0, 2), sizes(1, 0), call.stream);
    }
};

const Registered<LinearResidualPlugin> registered;

}  // namespace
}  // namespace trt_graft
