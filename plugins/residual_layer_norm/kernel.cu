// A residual connection and the layer normalisation behind it.
//
// Floor: x and residual are read once, sum and y are written once.  A warp takes a row and keeps its FP32 sum in
// registers: mean and variance cost neither memory nor barriers.
#include "common/dependent_launch.cuh"
#include "residual_layer_norm/kernel.cuh"

namespace trt_graft {
namespace {

constexpr int kLanes = 32;     // threads along a row
constexpr int kRows = 4;       // rows of a block, a warp each
constexpr int kMaxDim = 2048;  // 64 elements for each lane
constexpr int kMaxBlocks = INT32_MAX;

// Lane i holds the packs i, i + 32, …, PACKS of N elements.
template <typename T, int N, int PACKS>
__global__ void residual_layer_norm_kernel(const T* x, const T* residual, const T* weight, const T* bias, T* sum, T* y,
                                           int64_t rows, int dim, float epsilon) {
    allow_dependents();
    wait_for_previous();
    const int64_t row = blockIdx.x * int64_t{kRows} + threadIdx.x / kLanes;
    if (row >= rows) return;  // no barrier follows
    const auto column = [](int p) { return (p * kLanes + static_cast<int>(threadIdx.x) % kLanes) * N; };

    // All loads are on their way before the first sum needs one.
    Pack<T, N> left[PACKS] = {}, right[PACKS] = {};
    for (int p = 0; p < PACKS; ++p) {
        if (column(p) < dim) {
            left[p] = load_pack<N>(x + row * dim + column(p));
            right[p] = load_pack<N>(residual + row * dim + column(p));
        }
    }
    float total[PACKS][N];
    float mean = 0;
    for (int p = 0; p < PACKS; ++p) {
        for (int n = 0; n < N; ++n) {
            total[p][n] = to_float(left[p].values[n]) + to_float(right[p].values[n]);
            mean += total[p][n];  // zeros behind the end
        }
    }
    mean = warp_sum(mean) / dim;

    float variance = 0;
    for (int p = 0; p < PACKS; ++p) {
        for (int n = 0; n < N; ++n) {
            const float deviation = column(p) < dim ? total[p][n] - mean : 0;
            variance += deviation * deviation;
        }
    }
    const float scale = rsqrtf(warp_sum(variance) / dim + epsilon);

    for (int p = 0; p < PACKS; ++p) {
        if (column(p) >= dim) break;
        const auto gamma = load_pack<N>(weight + column(p)), beta = load_pack<N>(bias + column(p));
        Pack<T, N> rounded, result;
        for (int n = 0; n < N; ++n) {
            rounded.values[n] = from_float<T>(total[p][n]);
            result.values[n] =
                from_float<T>((total[p][n] - mean) * scale * to_float(gamma.values[n]) + to_float(beta.values[n]));
        }
        store_pack(sum + row * dim + column(p), rounded);
        store_pack(y + row * dim + column(p), result);
    }
}

}  // namespace

cudaError_t launch_residual_layer_norm(DataType type, const void* x, const void* residual, const void* weight,
                                       const void* bias, void* sum, void* y, int64_t rows, int64_t dim, float epsilon,
                                       cudaStream_t stream) {
    if (rows * dim == 0) return cudaSuccess;
    const int64_t blocks = ceil_div(rows, kRows);
    if (dim > kMaxDim || blocks > kMaxBlocks) return cudaErrorInvalidValue;
    cudaError_t error = cudaSuccess;
    const cudaError_t launched = dispatch(type, [&](auto tag) {
        using T = decltype(tag);
        const auto launch = [&](auto kernel) {
            error = launch_dependent(kernel, static_cast<unsigned>(blocks), kLanes * kRows, 0, stream,
                                     static_cast<const T*>(x), static_cast<const T*>(residual),
                                     static_cast<const T*>(weight), static_cast<const T*>(bias), static_cast<T*>(sum),
                                     static_cast<T*>(y), rows, static_cast<int>(dim), epsilon);
        };
        // As few registers as the row needs, in packs of 16 bytes where rows begin on their boundaries.
        const auto launch_packed = [&](auto pack) {
            constexpr int N = sizeof(pack.values) / sizeof(T);
            if (dim <= 8 * kLanes) {
                launch(residual_layer_norm_kernel<T, N, 8 / N>);
            } else if (dim <= 16 * kLanes) {
                launch(residual_layer_norm_kernel<T, N, 16 / N>);
            } else if (dim <= 32 * kLanes) {
                launch(residual_layer_norm_kernel<T, N, 32 / N>);
            } else {
                launch(residual_layer_norm_kernel<T, N, 64 / N>);
            }
        };
        constexpr int kWide = 16 / sizeof(T);
        if (dim % kWide == 0) {
            launch_packed(Pack<T, kWide>{});
        } else {
            launch_packed(Pack<T, 1>{});
        }
    });
    return error ? error : launched;
}

}  // namespace trt_graft
