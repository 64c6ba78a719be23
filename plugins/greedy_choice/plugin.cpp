// GreedyChoice (logits (B, V), sequences (B, S) int32, position (1) int32, finished (B) int32, allowed_from (V) or (1)
// int32, forced (P) int32, ends (E) int32) → next_sequences, next_position, next_finished like the inputs that they
// continue; attribute pad.
//
// When TensorRT's caller binds one address to an input and its continuation, only what changes is written.
#include "common/op.h"
#include "greedy_choice/kernel.cuh"

namespace trt_graft {
namespace {

class GreedyChoicePlugin final : public ClonableOp<GreedyChoicePlugin> {
  public:
    const char* name() const override { return "GreedyChoice"; }
    std::vector<Attribute> attributes() override { return {attribute("pad", pad_)}; }
    int32_t inputs() const override { return 7; }
    std::vector<Shape> outputs() const override { return {like(1), like(2), like(3)}; }
    bool is_int32(int32_t tensor) const override { return tensor != 0; }
    const char* refuse(const Sizes& sizes) const override {
        if (sizes.rank(0) != 2 || sizes.rank(1) != 2) return "logits must be (B, V), sequences (B, S)";
        if (differ(sizes.product_from(2, 0), 1)) return "position must be (1)";
        if (differ(sizes(0, 0), sizes(1, 0)) || sizes.rank(3) != 1 || differ(sizes(0, 0), sizes(3, 0))) {
            return "logits, sequences and finished must have one batch size";
        }
        if (sizes.rank(4) != 1 || (differ(sizes(4, 0), 1) && differ(sizes(4, 0), sizes(0, 1)))) {
            return "allowed_from must be (V) or (1)";
        }
        if (sizes.rank(5) != 1 || sizes.rank(6) != 1) return "forced must be (P), ends (E)";
        return nullptr;
    }
    int64_t workspace_bytes(const Sizes& sizes, DataType) const override {
        return greedy_choice_workspace_bytes(sizes(0, 0), sizes(0, 1));
    }
    cudaError_t enqueue(const Sizes& sizes, const Call& call) const override {
        const auto in = [&](int32_t input) { return static_cast<const int32_t*>(call.in[input]); };
        const auto out = [&](int32_t output) { return static_cast<int32_t*>(call.out[output]); };
        return launch_greedy_choice(call.type, call.in[0], in(1), in(2), in(3), in(4), in(5), in(6), out(0), out(1),
                                    out(2), call.workspace, sizes(0, 0), sizes(0, 1), sizes(1, 1), sizes(4, 0),
                                    sizes(5, 0), sizes(6, 0), pad_, call.stream);
    }

  private:
    int32_t pad_ = 0;
};

const Registered<GreedyChoicePlugin> registered;

}  // namespace
}  // namespace trt_graft
