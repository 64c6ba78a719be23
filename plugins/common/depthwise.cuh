// Depthwise 3 × 3 convolution of channel-last images, with zeros around them: what depthwise_conv and
// gated_depthwise_conv have in common.
//
// Floor: x is read once and y written once.  But with 9 FP32 products for each element, instructions weigh as much as
// memory.  So a thread computes N channels of W neighbouring columns, down a strip of rows: of each row it loads W + 2
// pixels, converts them once, and adds them to the three rows of sums that they belong to.  One of these is done then;
// the other two go on to the next row, whose loads are on their way meanwhile.  What neighbours share, columns and rows
// around their own, they find in L1 and L2.
//
// Packs are of 8 bytes, or of 4 where two convolutions meet: the weights of more channels would leave too few registers
// for W = 4 columns, and these save more than wider loads do.  Images in shared memory would save the addresses, at the
// cost of filling it.
#pragma once

#include <type_traits>

#include "common/kernel.cuh"

namespace trt_graft {

constexpr int kDepthwiseColumns = 4;  // of a thread: W, unless the image is narrower
constexpr int kDepthwiseLanes = 16;   // packs of channels that a block takes, at most
constexpr int kDepthwiseGroups = 8;   // groups of W columns that it takes
constexpr int kDepthwiseThreads = kDepthwiseLanes * kDepthwiseGroups;
constexpr int kDepthwiseBlocks = 4;             // of so many threads on a multiprocessor: 128 registers
constexpr int kDepthwiseMultiprocessors = 132;  // of an H200
constexpr int kDepthwiseRows = 32;              // of a strip, at most

// Blocks of (packs, groups) threads in a grid of (slabs of packs and columns, strips, images).
struct DepthwiseGrid {
    dim3 blocks, threads;
    int slabs;  // they come first in blocks.x
    int rows;   // of a strip

    // `packs` make a pixel, `groups` a row.
    DepthwiseGrid(int64_t batch, int64_t packs, int64_t groups, int64_t height) {
        // the widest block of those that leave the fewest threads idle
        int64_t lanes = kDepthwiseLanes;
        for (int64_t n = lanes - 4; n > 0; n -= 4) {
            if (ceil_div(packs, n) * n < ceil_div(packs, lanes) * lanes) lanes = n;
        }
        slabs = ceil_div(packs, lanes);
        const int64_t across = slabs * ceil_div(groups, kDepthwiseGroups);
        // the shortest time: as many waves of blocks as it takes, each as long as its rows and about four more: two
        // around them, and the weights
        const int64_t wave = kDepthwiseMultiprocessors * kDepthwiseBlocks * kDepthwiseLanes / lanes;
        const auto time = [&](int64_t n) { return ceil_div(batch * across * ceil_div(height, n), wave) * (n + 4); };
        rows = kDepthwiseRows;
        for (int n = rows - 1; n > 1; --n) {
            if (time(n) < time(rows)) rows = n;
        }
        blocks = dim3(across, ceil_div(height, rows), batch);
        threads = dim3(lanes, kDepthwiseGroups);
    }
};

// N channels of W columns on their way down, in each of PARTS parts of `channels` channels.
template <typename T, int N, int W, int PARTS>
class DepthwiseStrip {
  public:
    // `x` is the pixel of `column` in row `row`, from where it goes to row `last`.  Channels from `channels` on are
    // padding: nothing of them is read, and they become zeros.
    __device__ DepthwiseStrip(const T* x, const T* weight, const T* bias, int channel, int channels, int row, int last,
                              int column, int width, int pitch)
        : next_(x + channel),
          stride_(int64_t{width} * pitch),
          pitch_(pitch),
          channels_(channels),
          row_(row),
          last_(channel < channels ? last : -1),
          left_(column > 0),
          right_(column + W < width) {
        const bool exist = channel < channels;
        for (int p = 0; p < PARTS; ++p) {
            const int64_t offset = channel + int64_t{channels} * p;
            for (int i = 0; i < 9; ++i) {
                const auto values = exist ? load_pack<N>(weight + offset * 9 + i * N) : Pack<T, N>{};
                for (int n = 0; n < N; ++n) {
                    weight_[p][(i * N + n) / 9][(i * N + n) % 9] = to_float(values.values[n]);
                }
            }
            const auto values = exist ? load_pack<N>(bias + offset) : Pack<T, N>{};
            for (int n = 0; n < N; ++n) bias_[p][n] = to_float(values.values[n]);
        }
        load();
    }

    // Takes the next row; what is done is the row above it.
    __device__ void advance(float (&done)[W][N][PARTS]) {
        float x[PARTS][W + 2][N];
        for (int p = 0; p < PARTS; ++p) {
            for (int j = 0; j < W + 2; ++j) {
                const auto pack = reinterpret_cast<const Pack<T, N>&>(ahead_[p][j]);
                for (int n = 0; n < N; ++n) x[p][j][n] = to_float(pack.values[n]);
            }
        }
        load();
        for (int p = 0; p < PARTS; ++p) {
            for (int j = 0; j < W; ++j) {
                for (int n = 0; n < N; ++n) {
                    float sums[3] = {sums_[p][0][j][n], sums_[p][1][j][n], bias_[p][n]};
                    for (int i = 0; i < 3; ++i) {
                        for (int k = 0; k < 3; ++k) sums[i] += weight_[p][n][(2 - i) * 3 + k] * x[p][j + k][n];
                    }
                    done[j][n][p] = sums[0];
                    sums_[p][0][j][n] = sums[1];
                    sums_[p][1][j][n] = sums[2];
                }
            }
        }
    }

  private:
    // A pack as one word, which the compiler does not take apart where it chooses between it and zeros.
    using Word =
        std::conditional_t<sizeof(T) * N == 8, uint2, std::conditional_t<sizeof(T) * N == 4, uint32_t, uint16_t>>;
    static_assert(sizeof(Word) == sizeof(T) * N);

    __device__ void load() {
        const bool inside = row_ >= 0 && row_ <= last_;
        for (int j = 0; j < W + 2; ++j) {
            const bool exists = inside && (j > 0 || left_) && (j < W + 1 || right_);
            for (int p = 0; p < PARTS; ++p) {
                const T* pixel = next_ + int64_t{pitch_} * (j - 1) + channels_ * p;
                ahead_[p][j] = exists ? *reinterpret_cast<const Word*>(pixel) : Word{};
            }
        }
        next_ += stride_;
        ++row_;
    }

    float weight_[PARTS][N][9], bias_[PARTS][N];
    float sums_[PARTS][2][W][N] = {};  // of the row above the next one, and of the next one, so far
    Word ahead_[PARTS][W + 2];         // the next row
    const T* next_;                    // the row after it, number row_
    int64_t stride_;
    int pitch_, channels_, row_, last_;
    bool left_, right_;
};

// y (batch, height, width, channels) = combine(z), where z are the PARTS parts of x, convolved.
template <typename T, int N, int W, int PARTS, typename Combine>
__global__ void __launch_bounds__(kDepthwiseThreads, kDepthwiseBlocks)
    depthwise_kernel(const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias,
                     T* __restrict__ y, int channels, int height, int width, int pitch_x, int pitch_y, int slabs,
                     int rows, Combine combine) {
    const int channel = (blockIdx.x % slabs * blockDim.x + threadIdx.x) * N;
    int column = (blockIdx.x / slabs * kDepthwiseGroups + threadIdx.y) * W;
    if (channel >= pitch_y || column >= width) return;
    column = min(column, width - W);  // the last ones compute columns of their neighbours, too
    const int first = blockIdx.y * rows, end = min(first + rows, height);
    const int64_t pixel = (int64_t{blockIdx.z} * height + first) * width + column;

    DepthwiseStrip<T, N, W, PARTS> strip(x + (pixel - width) * pitch_x, weight, bias, channel, channels, first - 1,
                                         min(end, height - 1), column, width, pitch_x);
    float z[W][N][PARTS];
    strip.advance(z);
    strip.advance(z);
    T* target = y + pixel * pitch_y + channel;
#pragma unroll 1
    for (int row = first; row < end; ++row) {
        strip.advance(z);
        for (int j = 0; j < W; ++j) {
            Pack<T, N> result;
            for (int n = 0; n < N; ++n) result.values[n] = from_float<T>(combine(z[j][n]));
            store_pack(target + int64_t{pitch_y} * j, result);
        }
        target += int64_t{width} * pitch_y;
    }
}

// `combine` makes one float of PARTS.
template <int PARTS, typename Combine>
cudaError_t launch_depthwise(DataType type, const void* x, const void* weight, const void* bias, void* y, int64_t batch,
                             int64_t height, int64_t width, int64_t channels, Combine combine, cudaStream_t stream) {
    if (batch * height * width * channels == 0) return cudaSuccess;
    return dispatch(type, [&](auto tag) {
        using T = decltype(tag);
        constexpr int N = 8 / sizeof(T) / PARTS, W = kDepthwiseColumns;
        const int64_t pitch_x = pitch(type, channels * PARTS), pitch_y = pitch(type, channels);
        const auto launch = [&](auto kernel, int64_t packed, int64_t columns) {
            const DepthwiseGrid grid(batch, pitch_y / packed, ceil_div(width, columns), height);
            kernel<<<grid.blocks, grid.threads, 0, stream>>>(
                static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<const T*>(bias),
                static_cast<T*>(y), channels, height, width, pitch_x, pitch_y, grid.slabs, grid.rows, combine);
        };
        if (width < W) {
            launch(depthwise_kernel<T, 1, 1, PARTS, Combine>, 1, 1);
        } else if (channels % N == 0) {
            launch(depthwise_kernel<T, N, W, PARTS, Combine>, N, W);
        } else {  // packs would not begin on their boundaries
            launch(depthwise_kernel<T, 1, W, PARTS, Combine>, 1, W);
        }
    });
}

}  // namespace trt_graft
