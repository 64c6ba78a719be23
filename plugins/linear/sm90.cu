// The linear layer as CUTLASS's collectives compute it on Hopper: one warp fetches tiles of x and weight with TMA, two
// groups of four warps multiply them with wgmma.  The groups divide large tiles of y between them (cooperative), or
// work at different small ones (ping-pong): while one adds the bias, activates and stores, the other one multiplies.
//
// Compiled for sm_90a alone, in an object of its own, which CMake adds where it finds CUTLASS's headers.  With NDEBUG:
// an assert in a kernel is a call, and ptxas then lets no two products run side by side.
#ifdef TRT_GRAFT_EARLY_LAUNCH
#define CUTLASS_ENABLE_GDC_FOR_SM90 1  // its kernels keep to the rule of dependent_launch.cuh
#endif
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/util/packed_stride.hpp>

#include "common/dependent_launch.cuh"
#include "common/gelu.cuh"
#include "linear/sm90.cuh"

#ifndef NDEBUG
#error "CUTLASS's kernels need NDEBUG"
#endif

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
    constexpr int kAlignment = 8;             // elements in 16 bytes
    constexpr bool kCooperative = ROWS > 64;  // each group has 64 rows at least
    using Schedule = std::conditional_t<kCooperative, cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                                        cutlass::gemm::KernelTmaWarpSpecializedPingpong>;
    using EpilogueSchedule = std::conditional_t<kCooperative, cutlass::epilogue::TmaWarpSpecializedCooperative,
                                                cutlass::epilogue::TmaWarpSpecialized>;

    using Fusion =
        cutlass::epilogue::fusion::LinCombPerColBiasEltAct<Activate, Half, float, Half, Half, float, kAlignment>;
    using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        Arch, Unit, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, RowMajor,
        kAlignment, Half, RowMajor, kAlignment, EpilogueSchedule, Fusion>::CollectiveOp;
    using Stages =
        cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>;
    using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<Arch, Unit, Half, RowMajor, kAlignment, Half,
                                                                           ColumnMajor, kAlignment, float, Tile,
                                                                           Cluster, Stages, Schedule>::CollectiveOp;
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
    bool early = false;
#ifdef TRT_GRAFT_EARLY_LAUNCH
    if (const auto error = find_whether_early(reinterpret_cast<const void*>(cutlass::device_kernel<Kernel>), early)) {
        return error;
    }
#endif
    return gemm.run(stream, nullptr, early) == cutlass::Status::kSuccess ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace

// Many tiles: ping-pong, whose stores hide behind products.  Fewer: what counts is how many tiles a multiprocessor gets
// at most, and how large they are; of equals the largest ones read x and weight from L2 least often.  So few that these
// would leave most multiprocessors without one: small tiles, which are done sooner.
cudaError_t launch_linear_sm90(const void* x, const void* weight, const void* bias, void* y, int rows, int inputs,
                               int outputs, Activation activation, int multiprocessors, cudaStream_t stream) {
    const auto tiles = [&](int tile_rows, int tile_outputs) {
        return ceil_div(rows, tile_rows) * ceil_div(outputs, tile_outputs);
    };
    auto launch_tiles = launch<64, 64, 128, 1>;
    if (tiles(64, 256) > 4 * multiprocessors) {
        launch_tiles = launch<64, 256, 64, 2>;
    } else if (tiles(64, 64) > 2 * multiprocessors) {
        int64_t least = INT64_MAX;
        const auto consider = [&](auto tile_rows, auto tile_outputs, auto cluster) {
            const int64_t area = ceil_div(tiles(tile_rows, tile_outputs), multiprocessors) * tile_rows * tile_outputs;
            if (area < least) {
                least = area;
                launch_tiles = launch<tile_rows, tile_outputs, 64, cluster>;
            }
        };
        consider(Int<256>{}, Int<192>{}, Int<2>{});
        consider(Int<128>{}, Int<256>{}, Int<1>{});
        consider(Int<128>{}, Int<192>{}, Int<1>{});
    }
    return launch_tiles(x, weight, bias, y, rows, inputs, outputs, activation, multiprocessors, stream);
}

}  // namespace trt_graft
