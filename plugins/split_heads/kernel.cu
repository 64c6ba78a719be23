// Brings the heads of each token to the front.
//
// Floor: x is read once and y written once.  Elements of a head stay together: they are copied as words of 16 bytes, or
// of as many as heads and tensors are aligned to.  The threads beside each other read the words beside each other of a
// token, and write whole heads.
#include "common/dependent_launch.cuh"
#include "split_heads/kernel.cuh"

namespace trt_graft {
namespace {

constexpr int kThreads = 128;  // few: a single image has to reach all multiprocessors
constexpr int kRows = 4;       // of a thread, which are all on their way at once

// A thread copies a word of kRows rows that follow each other.
//
// rows     tokens of all images
// columns  words of a row: heads · width
// width    words of a head
template <typename Word>
__global__ void __launch_bounds__(kThreads)
    split_heads_kernel(const Word* x, Word* y, unsigned rows, unsigned tokens, unsigned heads, unsigned width) {
    allow_dependents();
    const unsigned columns = heads * width;
    const unsigned index = blockIdx.x * kThreads + threadIdx.x;
    const unsigned row = index / columns * kRows, column = index % columns;
    const Word* const from = x + uint64_t{row} * columns + column;
    wait_for_previous();
    Word words[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        if (row + i < rows) words[i] = from[uint64_t{columns} * i];
    }

    const unsigned image = row / tokens, head = column / width;
    unsigned token = row % tokens;
    Word* to = y + ((uint64_t{image} * heads + head) * tokens + token) * width + column % width;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        if (row + i >= rows) return;
        *to = words[i];
        to += width;
        if (++token == tokens) {  // the same head of the next image
            token = 0;
            to += uint64_t{heads - 1} * tokens * width;
        }
    }
}

template <typename Word>
cudaError_t launch(const void* x, void* y, int64_t rows, int64_t tokens, int64_t heads, int64_t head_bytes,
                   cudaStream_t stream) {
    const int64_t width = head_bytes / static_cast<int64_t>(sizeof(Word));
    const int64_t blocks = ceil_div(ceil_div(rows, kRows) * heads * width, kThreads);
    if (blocks > INT32_MAX / (kThreads * kRows)) return cudaErrorInvalidValue;  // words are counted in 32 bits
    return launch_dependent(split_heads_kernel<Word>, static_cast<unsigned>(blocks), kThreads, 0, stream,
                            static_cast<const Word*>(x), static_cast<Word*>(y), static_cast<unsigned>(rows),
                            static_cast<unsigned>(tokens), static_cast<unsigned>(heads), static_cast<unsigned>(width));
}

}  // namespace

cudaError_t launch_split_heads(DataType type, const void* x, void* y, int64_t batch, int64_t tokens, int64_t heads,
                               int64_t head_dim, cudaStream_t stream) {
    if (batch * tokens * heads * head_dim == 0) return cudaSuccess;
    cudaError_t error = cudaSuccess;
    const cudaError_t launched = dispatch(type, [&](auto tag) {
        const int64_t head_bytes = head_dim * static_cast<int64_t>(sizeof(tag));
        const auto begin_on = [&](size_t bytes) {
            return (reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(y) | head_bytes) % bytes == 0;
        };
        const auto launch_words = [&](auto word) {
            error = launch<decltype(word)>(x, y, batch * tokens, tokens, heads, head_bytes, stream);
        };
        if (begin_on(16)) {
            launch_words(uint4{});
        } else if (begin_on(8)) {
            launch_words(uint2{});
        } else if (begin_on(4)) {
            launch_words(uint32_t{});
        } else {
            launch_words(uint16_t{});
        }
    });
    return error ? error : launched;
}

}  // namespace trt_graft
