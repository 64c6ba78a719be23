// The embeddings of one token of each sequence and of its position.
//
// Floor: latency, of three loads that wait for each other: the position, the token there, the token's row.  The
// position's row is on its way beside the token.  So each thread has one pack of a row, and looks up token and position
// by itself.
#include "common/dependent_launch.cuh"
#include "token_embedding/kernel.cuh"

namespace trt_graft {
namespace {

constexpr int kThreads = 128;

// An index into a table of `size` rows, or the nearest one: what stands in a sequence must not make a kernel read
// elsewhere.
__device__ int64_t inside(int64_t index, int64_t size) { return max(int64_t{0}, min(index, size - 1)); }

// packs   of a row, each of N elements
// blocks  of a row
//
// The step before has written sequences and position, and may still write them until wait_for_previous.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    token_embedding_kernel(const T* tokens, const T* positions, const int32_t* sequences, const int32_t* position, T* y,
                           int64_t length, int64_t vocabulary, int64_t places, int packs, int blocks, float scale) {
    allow_dependents();
    const int64_t row = blockIdx.x / blocks;
    const int pack = static_cast<int>(blockIdx.x % blocks) * kThreads + static_cast<int>(threadIdx.x);
    wait_for_previous();
    if (pack >= packs) return;

    const int64_t now = *position;
    const int64_t token = inside(sequences[row * length + inside(now, length)], vocabulary);
    const Pack<T, N> place = load_pack<N>(positions + (inside(now, places) * packs + pack) * N);
    Pack<T, N> sum = load_pack<N>(tokens + (token * packs + pack) * N);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        // rounded as the function's Mul and Add are
        sum.values[i] = from_float<T>(__fadd_rn(__fmul_rn(to_float(sum.values[i]), scale), to_float(place.values[i])));
    }
    store_pack(y + (row * packs + pack) * N, sum);
}

}  // namespace

cudaError_t launch_token_embedding(DataType type, const void* tokens, const void* positions, const int32_t* sequences,
                                   const int32_t* position, void* y, int64_t rows, int64_t length, int64_t vocabulary,
                                   int64_t places, int64_t dim, float scale, cudaStream_t stream) {
    if (rows == 0 || dim == 0) return cudaSuccess;
    if (length < 1 || vocabulary < 1 || places < 1 || dim > INT32_MAX - kThreads) return cudaErrorInvalidValue;
    cudaError_t error = cudaSuccess;
    const cudaError_t launched = dispatch(type, [&](auto tag) {
        using T = decltype(tag);
        const auto begin_on = [&](size_t bytes) {
            const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
            return (address(tokens) | address(positions) | address(y) | dim * sizeof(T)) % bytes == 0;
        };
        const auto launch = [&](auto kernel, int64_t packs) {
            const int64_t blocks = ceil_div(packs, kThreads);
            if (rows > INT32_MAX / blocks) {
                error = cudaErrorInvalidValue;
                return;
            }
            error = launch_dependent(kernel, static_cast<unsigned>(rows * blocks), kThreads, 0, stream,
                                     static_cast<const T*>(tokens), static_cast<const T*>(positions), sequences,
                                     position, static_cast<T*>(y), length, vocabulary, places, static_cast<int>(packs),
                                     static_cast<int>(blocks), scale);
        };
        constexpr int kHalfPack = 8 / sizeof(T), kWord = 4 / sizeof(T);
        if (begin_on(16)) {
            launch(token_embedding_kernel<T, 2 * kHalfPack>, dim / (2 * kHalfPack));
        } else if (begin_on(8)) {
            launch(token_embedding_kernel<T, kHalfPack>, dim / kHalfPack);
        } else if (begin_on(4)) {
            launch(token_embedding_kernel<T, kWord>, dim / kWord);
        } else {
            launch(token_embedding_kernel<T, 1>, dim);
        }
    });
    return error ? error : launched;
}

}  // namespace trt_graft
