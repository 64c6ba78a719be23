// PixelShuffle (x (B, C·r², H, W)) → y (B, C, H·r, W·r); attribute factor = r.
#include "common/op.h"
#include "pixel_shuffle/kernel.cuh"

namespace trt_graft {
namespace {

class PixelShufflePlugin final : public ClonableOp<PixelShufflePlugin> {
  public:
    const char* name() const override { return "PixelShuffle"; }
    std::vector<Attribute> attributes() override { return {attribute("factor", factor_)}; }
    int32_t inputs() const override { return 1; }
    std::vector<Shape> outputs() const override {
        return {of({{0, 0}, {0, 1, 1, int64_t{factor_} * factor_}, {0, 2, factor_}, {0, 3, factor_}})};
    }
    bool is_image(int32_t) const override { return true; }
    const char* refuse(const Sizes& sizes) const override {
        if (sizes.rank(0) != 4) return "x must be (B, C·r², H, W)";
        if (sizes(0, 1) > 0 && sizes(0, 1) % (int64_t{factor_} * factor_) != 0) {
            return "the channels must be a multiple of the factor's square";
        }
        return nullptr;
    }
    cudaError_t enqueue(const Sizes& sizes, const Call& call) const override {
        return launch_pixel_shuffle(call.type, call.in[0], call.out[0], sizes(0, 0), sizes(0, 2), sizes(0, 3),
                                    sizes(0, 1) / (int64_t{factor_} * factor_), factor_, call.stream);
    }

  private:
    int32_t factor_ = 1;
};

const Registered<PixelShufflePlugin> registered;

}  // namespace
}  // namespace trt_graft
