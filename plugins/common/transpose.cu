// Transposes matrices.
//
// Floor: x is read once and y written once.  A block takes a square through shared memory, so that a warp reads along
// the rows of x and writes along those of y.
#include "common/kernel.cuh"
#include "common/transpose.cuh"

namespace trt_graft {
namespace {

constexpr int kSide = 32;
constexpr int kRows = 8;  // of threads
constexpr int64_t kMaxGrid = 65535;

__global__ void transpose_kernel(const float* x, float* y, int64_t matrices, int64_t rows, int64_t columns) {
    __shared__ float square[kSide][kSide + 1];  // columns lie in different banks
    const int64_t column = blockIdx.x * int64_t{kSide} + threadIdx.x;
    for (int64_t matrix = blockIdx.z; matrix < matrices; matrix += gridDim.z) {
        for (int64_t top = blockIdx.y * int64_t{kSide}; top < rows; top += gridDim.y * int64_t{kSide}) {
            for (int i = threadIdx.y; i < kSide; i += kRows) {
                if (top + i < rows && column < columns) {
                    square[i][threadIdx.x] = x[(matrix * rows + top + i) * columns + column];
                }
            }
            __syncthreads();
            for (int i = threadIdx.y; i < kSide; i += kRows) {
                const int64_t target = blockIdx.x * int64_t{kSide} + i;
                if (target < columns && top + threadIdx.x < rows) {
                    y[(matrix * columns + target) * rows + top + threadIdx.x] = square[threadIdx.x][i];
                }
            }
            __syncthreads();  // read before the next square overwrites it
        }
    }
}

}  // namespace

cudaError_t launch_transpose(const float* x, float* y, int64_t batch, int64_t rows, int64_t columns,
                             cudaStream_t stream) {
    if (batch * rows * columns == 0) return cudaSuccess;
    const int64_t across = ceil_div(columns, kSide), down = ceil_div(rows, kSide);
    const dim3 grid(across, down < kMaxGrid ? down : kMaxGrid, batch < kMaxGrid ? batch : kMaxGrid);
    transpose_kernel<<<grid, dim3(kSide, kRows), 0, stream>>>(x, y, batch, rows, columns);
    return cudaGetLastError();
}

}  // namespace trt_graft
