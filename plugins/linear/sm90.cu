// The linear layer as CUTLASS's collectives compute it on Hopper: one warp fetches tiles of x and weight with TMA, two
// groups of four warps multiply them with wgmma.  The groups work at different tiles of y (ping-pong): while one adds
// the bias, activates and stores, the other one multiplies.
//
// Compiled for sm_90a alone, and a library of its own, which CMake adds where it finds CUTLASS's headers.
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/util/packed_stride.hpp>

#include "common/gelu.cuh"
#include "linear/sm90.cuh"

namespace trt_graft {
namespace {

using cute::Int;
using cute::Shape;
using Half = cutlass::half_t;

struct ActivationArguments {
    Activation kind = Activation::kNone;
};

// Chosen at run time: a kernel for each activation would take thrice as long to compile, and all threads take the same
// branch.
template <typename T>
struct Activate {
    using Arguments = ActivationArguments;
};

template <int N>
struct Activate<cutlass::Array<float, N>> {
    using Arguments = ActivationArguments;
    CUTLASS_DEVICE cutlass::Array<float, N> operator()(const cutlass::Array<float, N>& values,
                                                       const Arguments& activation) const {
        cutlass::Array<float, N> result = values;
        if (activation.kind == Activation::kGelu) {
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < N; ++i) result[i] = fast_gelu(values[i]);  // erff would take longer than the product
        } else if (activation.kind == Activation::kRelu) {
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < N; ++i) result[i] = values[i] < 0 ? 0 : values[i];  // NaN stays
        }
        return result;
    }
};

// Tiles of ROWS × OUTPUTS, DEPTH inputs at a time; clusters of CLUSTER blocks one below the other share their weights.
template <int ROWS, int OUTPUTS, int DEPTH, int CLUSTER>
cudaError_t launch(const void* x, const void* weight, const void* bias, void* y, int rows, int inputs, int outputs,
                   Activation activation, int multiprocessors, cudaStream_t stream) {
    using Tile = Shape<Int<ROWS>, Int<OUTPUTS>, Int<DEPTH>>;
    using Cluster = Shape<Int<CLUSTER>, Int<1>, Int<1>>;
    using Arch = cutlass::arch::Sm90;
    using Unit = cutlass::arch::OpClassTensorOp;
    using RowMajor = cutlass::layout::RowMajor;
    using ColumnMajor = cutlass::layout::ColumnMajor;
    constexpr int kAlignment = 8;  // elements in 16 bytes

    using Fusion =
        cutlass::epilogue::fusion::LinCombPerColBiasEltAct<Activate, Half, float, Half, Half, float, kAlignment>;
    using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        Arch, Unit, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor,
        kAlignment, Half, RowMajor, kAlignment, cutlass::epilogue::TmaWarpSpecialized, Fusion>::CollectiveOp;
    using Stages =
        cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>;
    using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
        Arch, Unit, Half, RowMajor, kAlignment, Half, ColumnMajor, kAlignment, float, Tile, Cluster, Stages,
        cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
    using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue,
                                                        cutlass::gemm::PersistentScheduler>;
    using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

    typename Gemm::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm, {rows, outputs, inputs, 1}, {}, {}};
    arguments.mainloop.ptr_A = static_cast<const Half*>(x);
    arguments.mainloop.dA = cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, {rows, inputs, 1});
    arguments.mainloop.ptr_B = static_cast<const Half*>(weight);
    arguments.mainloop.dB = cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, {outputs, inputs, 1});
    arguments.epilogue.ptr_D = static_cast<Half*>(y);
    arguments.epilogue.dD = cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, {rows, outputs, 1});
    arguments.epilogue.thread.alpha = 1;
    arguments.epilogue.thread.beta = 0;
    arguments.epilogue.thread.bias_ptr = static_cast<const Half*>(bias);
    arguments.epilogue.thread.activation = {activation};
    arguments.hw_info.sm_count = multiprocessors;

    // Without stream-K the kernel needs no workspace.
    Gemm gemm;
    if (Gemm::get_workspace_size(arguments) > 0) return cudaErrorInvalidConfiguration;
    if (gemm.can_implement(arguments) != cutlass::Status::kSuccess) return cudaErrorInvalidValue;
    if (gemm.initialize(arguments, nullptr, stream) != cutlass::Status::kSuccess) return cudaErrorInvalidConfiguration;
    if (gemm.run(stream) != cutlass::Status::kSuccess) return cudaErrorLaunchFailure;
    return cudaSuccess;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

// Large tiles read x and weight from L2 least often; but where half of the multiprocessors would have none, smaller
// ones are done sooner.  Clusters pay where each multiprocessor has more than two.
cudaError_t launch_linear_sm90(const void* x, const void* weight, const void* bias, void* y, int rows, int inputs,
                               int outputs, Activation activation, int multiprocessors, cudaStream_t stream) {
    const int64_t tiles = ceil_div(rows, 64) * ceil_div(outputs, 256);
    const auto launch_tiles = tiles > 2 * multiprocessors   ? launch<64, 256, 64, 2>
                              : 2 * tiles > multiprocessors ? launch<64, 256, 64, 1>
                              : inputs > 1024               ? launch<64, 64, 128, 1>
                                                            : launch<64, 64, 64, 1>;
    return launch_tiles(x, weight, bias, y, rows, inputs, outputs, activation, multiprocessors, stream);
}

}  // namespace trt_graft
