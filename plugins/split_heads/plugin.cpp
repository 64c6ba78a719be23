// SplitHeads (x (B, T, heads·head_dim)) → y (B, heads, T, head_dim); attribute heads.
#include "common/op.h"
#include "split_heads/kernel.cuh"

namespace trt_graft {
namespace {

class SplitHeadsPlugin final : public ClonableOp<SplitHeadsPlugin> {
  public:
    const char* name() const override { return "SplitHeads"; }
    std::vector<Attribute> attributes() override { return {attribute("heads", heads_)}; }
    int32_t inputs() const override { return 1; }
    std::vector<Shape> outputs() const override { return {of({{0, 0}, constant(heads_), {0, 1}, {0, 2, 1, heads_}})}; }
    const char* refuse(const Sizes& sizes) const override {
        if (sizes.rank(0) != 3) return "x must be (B, T, D)";
        if (heads_ < 1 || (sizes(0, 2) > 0 && sizes(0, 2) % heads_ != 0)) return "D must divide by the heads";
        return nullptr;
    }
    cudaError_t enqueue(const Sizes& sizes, const Call& call) const override {
        return launch_split_heads(call.type, call.in[0], call.out[0], sizes(0, 0), sizes(0, 1), heads_,
                                  sizes(0, 2) / heads_, call.stream);
    }

  private:
    int32_t heads_ = 1;
};

const Registered<SplitHeadsPlugin> registered;

}  // namespace
}  // namespace trt_graft
