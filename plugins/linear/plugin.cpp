// Linear (x (B, T, K), weight (N, K), bias (N)) → y (B, T, N); attribute activation.
#include "common/op.h"
#include "linear/kernel.cuh"

namespace trt_graft {
namespace {

class LinearPlugin final : public ClonableOp<LinearPlugin> {
  public:
    const char* name() const override { return "Linear"; }
    std::vector<Attribute> attributes() override { return {attribute("activation", activation_)}; }
    int32_t inputs() const override { return 3; }
    std::vector<Shape> outputs() const override { return {of({{0, 0}, {0, 1}, {1, 0}})}; }
    const char* refuse(const Sizes& sizes) const override {
        if (sizes.rank(0) != 3) return "x must be (B, T, K)";
        if (sizes.rank(1) != 2 || differ(sizes(0, 2), sizes(1, 1))) return "weight must be (N, K)";
        if (sizes.rank(2) != 1 || differ(sizes(1, 0), sizes(2, 0))) return "bias must be (N)";
        return nullptr;
    }
    cudaError_t enqueue(const Sizes& sizes, const Call& call) const override {
        return launch_linear(call.type, call.in[0], call.in[1], call.in[2], call.out[0], sizes.product(0, 0, 2),
                             sizes(0, 2), sizes(1, 0), activation_, call.stream);
    }

  private:
    int32_t activation_ = 0;
};

const Registered<LinearPlugin> registered;

}  // namespace
}  // namespace trt_graft
