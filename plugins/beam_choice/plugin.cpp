// BeamChoice (logits (B, K, V), sequences (B, K, S) int32, scores (B, K) FP32, ancestors and hypotheses (B, K, S)
// int32, lengths (B, K) int32, hypothesis_scores (B, K) FP32, position (1) int32, finished (B) int32, allowed_from (V)
// or (1) int32, forced (F) int32, ends (E) int32, penalties and hopes (P) FP32) → next_sequences … next_finished like
// the inputs that they continue; attributes max_length, stop_when_full.
//
// TensorRT's caller may bind one address to an input and its continuation.
#include "beam_choice/kernel.cuh"
#include "common/op.h"

namespace trt_graft {
namespace {

class BeamChoicePlugin final : public ClonableOp<BeamChoicePlugin> {
  public:
    const char* name() const override { return "BeamChoice"; }
    std::vector<Attribute> attributes() override {
        return {attribute("max_length", max_length_), attribute("stop_when_full", stop_when_full_)};
    }
    int32_t inputs() const override { return 14; }
    std::vector<Shape> outputs() const override {
        return {like(1), like(2), like(3), like(4), like(5), like(6), like(7), like(8)};
    }
    bool is_int32(int32_t tensor) const override { return tensor != 0 && !is_fp32(tensor); }
    bool is_fp32(int32_t tensor) const override {
        const int32_t input = tensor < inputs() ? tensor : tensor - inputs() + 1;
        return input == 2 || input == 6 || tensor == 12 || tensor == 13;
    }
    const char* refuse(const Sizes& sizes) const override {
        if (sizes.rank(0) != 3) return "logits must be (B, K, V)";
        for (const int32_t table : {1, 3, 4}) {
            if (sizes.rank(table) != 3 || differ(sizes(table, 0), sizes(0, 0)) ||
                differ(sizes(table, 1), sizes(0, 1)) || differ(sizes(table, 2), sizes(1, 2))) {
                return "sequences, ancestors and hypotheses must be (B, K, S)";
            }
        }
        for (const int32_t numbers : {2, 5, 6}) {
            if (sizes.rank(numbers) != 2 || differ(sizes(numbers, 0), sizes(0, 0)) ||
                differ(sizes(numbers, 1), sizes(0, 1))) {
                return "scores, lengths and hypothesis_scores must be (B, K)";
            }
        }
        if (differ(sizes.product_from(7, 0), 1)) return "position must be (1)";
        if (sizes.rank(8) != 1 || differ(sizes(8, 0), sizes(0, 0))) return "finished must be (B)";
        if (sizes.rank(9) != 1 || (differ(sizes(9, 0), 1) && differ(sizes(9, 0), sizes(0, 2)))) {
            return "allowed_from must be (V) or (1)";
        }
        if (sizes.rank(10) != 1 || sizes.rank(11) != 1) return "forced must be (F), ends (E)";
        if (sizes.rank(12) != 1 || sizes.rank(13) != 1 || differ(sizes(12, 0), sizes(13, 0))) {
            return "penalties and hopes must be (P)";
        }
        if (sizes(0, 1) > kMaxBeams) return "there may be no more than 32 beams";
        if (sizes(0, 1) > 0 && sizes(11, 0) > 0 && (1 + sizes(11, 0)) * sizes(0, 1) > kMaxCandidates) {
            return "(1 + E) · K may be no more than 128";
        }
        return nullptr;
    }
    int64_t workspace_bytes(const Sizes& sizes, DataType) const override {
        return beam_choice_workspace_bytes(sizes(0, 0) * sizes(0, 1), sizes(0, 2));
    }
    cudaError_t enqueue(const Sizes& sizes, const Call& call) const override {
        const auto in = [&](int32_t input) { return static_cast<const int32_t*>(call.in[input]); };
        const auto floats = [&](int32_t input) { return static_cast<const float*>(call.in[input]); };
        const auto out = [&](int32_t output) { return static_cast<int32_t*>(call.out[output]); };
        return launch_beam_choice(call.type, call.in[0], in(1), floats(2), in(3), in(4), in(5), floats(6), in(7), in(8),
                                  in(9), in(10), in(11), floats(12), floats(13), out(0),
                                  static_cast<float*>(call.out[1]), out(2), out(3), out(4),
                                  static_cast<float*>(call.out[5]), out(6), out(7), call.workspace, sizes(0, 0),
                                  sizes(0, 1), sizes(0, 2), sizes(1, 2), sizes(9, 0), sizes(10, 0), sizes(11, 0),
                                  sizes(12, 0), max_length_, stop_when_full_, call.stream);
    }

  private:
    int32_t max_length_ = 0;
    int32_t stop_when_full_ = 0;
};

const Registered<BeamChoicePlugin> registered;

}  // namespace
}  // namespace trt_graft
