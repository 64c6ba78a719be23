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
//
// In FP16, where channels come in packs of 8, instructions take two channels at once, see depthwise_half_kernel.  Sums
// are FP16, too: z = (row 0 + row 1) + (row 2 + bias), where rows, of three products, are small and lose little.  The
// error of z, for x and bias of N(0, 1) and weights a third of that (root mean square, and largest of two million):
//
//   5.3e-4, 6.0e-3   so
//   7.8e-4, 9.5e-3   product by product
//   4.2e-4, 4.8e-3   rows added in FP32, then rounded: three conversions for each z, and twice the registers for sums
//   2.9e-4, 2.5e-3   all in FP32, then rounded
//
// Where a part of z is beyond 65504, z is infinite or NaN, even if its other parts would bring it back.
#pragma once

#include <algorithm>
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

// `from` + count · bytes.  The compiler would take an expression apart, to share what addresses have in common, and
// need more instructions, and registers that there are not.
template <typename T>
__device__ T* advanced(T* from, int count, int bytes) {
    T* to;
    asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(to) : "r"(bytes), "r"(count), "l"(from));
    return to;
}

// It no longer knows that this is global memory, either.
__device__ inline void store_word(__half* to, const uint2& word) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(word.x), "r"(word.y) : "memory");
}

__device__ inline void store_word(__half* to, const uint4& word) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(word.x), "r"(word.y), "r"(word.z),
                 "r"(word.w)
                 : "memory");
}

// Eight FP16 values: N channels of each of PARTS parts of a pixel.
template <int PARTS>
struct HalfPixel {
    static constexpr int N = 8 / PARTS, PAIRS = N / 2;
    using Word = std::conditional_t<PARTS == 1, uint4, uint2>;
    Word words[PARTS];

    __device__ __half2& operator()(int part, int pair) { return reinterpret_cast<__half2*>(&words[part])[pair]; }
    __device__ __half2 operator()(int part, int pair) const {
        return reinterpret_cast<const __half2*>(&words[part])[pair];
    }

    // From a pixel whose parts are `bytes` apart.
    __device__ void load(const __half* from, int bytes) {
        words[0] = __ldg(reinterpret_cast<const Word*>(from));
        if constexpr (PARTS == 2) words[1] = __ldg(reinterpret_cast<const Word*>(advanced(from, 1, bytes)));
    }
};

// op(pixels…), pair by pair.
template <int PARTS, typename Op, typename... Others>
__device__ HalfPixel<PARTS> map(Op op, const HalfPixel<PARTS>& first, const Others&... others) {
    HalfPixel<PARTS> result;
    for (int p = 0; p < PARTS; ++p) {
        for (int n = 0; n < result.PAIRS; ++n) result(p, n) = op(first(p, n), others(p, n)...);
    }
    return result;
}

template <int PARTS>
__device__ HalfPixel<PARTS> operator+(const HalfPixel<PARTS>& a, const HalfPixel<PARTS>& b) {
    return map([](__half2 a, __half2 b) { return __hadd2(a, b); }, a, b);
}

// Three products of neighbours in a row.
template <int PARTS>
__device__ HalfPixel<PARTS> dot(const HalfPixel<PARTS>* weights, const HalfPixel<PARTS>* x) {
    const auto fma = [](__half2 a, __half2 b, __half2 c) { return __hfma2(a, b, c); };
    const auto sum = map([](__half2 a, __half2 b) { return __hmul2(a, b); }, weights[0], x[0]);
    return map(fma, weights[2], x[2], map(fma, weights[1], x[1], sum));
}

// depthwise_kernel for FP16, channels that are a multiple of 8, and at least W columns.
//
// A thread has one row of x in registers.  As soon as no column needs a pixel any more, it loads the same pixel of the
// next row into the same registers: what `combine` does meanwhile, and the other warps, hide the latency.
template <int PARTS, typename Combine>
__global__ void __launch_bounds__(kDepthwiseThreads, kDepthwiseBlocks)
    depthwise_half_kernel(const __half* __restrict__ x, const __half* __restrict__ weight,
                          const __half* __restrict__ bias, __half* __restrict__ y, int channels, int height, int width,
                          int slabs, int rows, Combine combine) {
    using Pixel = HalfPixel<PARTS>;
    constexpr int W = kDepthwiseColumns, N = Pixel::N;
    __shared__ alignas(16) __half shared[10][kDepthwiseThreads];  // nine weights and the bias of the block's channels

    const int lanes = blockDim.x, span = lanes * N;  // channels that a block takes of each part
    const int across = blockIdx.x / slabs, slab = (blockIdx.x - across * slabs) * span;
    const int channel = slab + threadIdx.x * N, group = across * blockDim.y + threadIdx.y;
    const int first = blockIdx.y * rows, end = min(first + rows, height);
    const int pitch = channels * PARTS, channel_bytes = 2 * channels, pitch_bytes = 2 * pitch;

    // Each thread fetches the weights of one of the block's 8 · lanes channels.  They arrive with its first rows of x.
    const int fetched = threadIdx.y * lanes + threadIdx.x;
    const int part = PARTS == 2 && fetched >= span, of_part = slab + fetched - part * span;
    const bool fetches = fetched < PARTS * span && of_part < channels;
    __half values[10];
    if (fetches) {
        const int number = part * channels + of_part;
        for (int k = 0; k < 9; ++k) values[k] = weight[int64_t{number} * 9 + k];
        values[9] = bias[number];
    }

    const bool active = channel < channels && group * W < width;
    const int column = min(group * W, width - W);  // the last ones compute columns of their neighbours, too
    const bool left = column > 0, right = column + W < width;
    const int64_t pixel = (int64_t{blockIdx.z} * height + first) * width + column;
    const __half* next = x + (pixel - width) * pitch + channel;
    const auto load = [&](Pixel& to, int j) { to.load(advanced(next, j - 1, pitch_bytes), channel_bytes); };
    const auto load_row = [&](Pixel(&to)[W + 2], bool exists) {
        if (exists) {
            to[0] = to[W + 1] = {};
            if (left) load(to[0], 0);
            for (int j = 1; j <= W; ++j) load(to[j], j);
            if (right) load(to[W + 1], W + 1);
        } else {
            for (int j = 0; j < W + 2; ++j) to[j] = {};
        }
        next = advanced(next, width, pitch_bytes);
    };
    Pixel above[W + 2], here[W + 2], below[W + 2];
    load_row(above, active && first > 0);
    load_row(here, active);
    load_row(below, active && first + 1 < height);
    if (fetches) {
        for (int k = 0; k < 10; ++k) shared[k][fetched] = values[k];
    }
    __syncthreads();
    if (!active) return;

    Pixel weights[10];
    for (int k = 0; k < 10; ++k) {
        for (int p = 0; p < PARTS; ++p) {
            const __half* const values = &shared[k][threadIdx.x * N + p * span];
            weights[k].words[p] = *reinterpret_cast<const typename Pixel::Word*>(values);
        }
    }
    Pixel sums[W], following[W];  // rows 0 and 1 of this row's z, row 0 of the next one's
    for (int j = 0; j < W; ++j) {
        sums[j] = dot(weights, above + j) + dot(weights + 3, here + j);
        following[j] = dot(weights, here + j);
    }
    __half* target = y + pixel * channels + channel;
    const int missing = end == height ? 1 : 0;  // rows below the strip that the image does not have
#pragma unroll 1
    for (int rest = end - first - 1; rest >= 0; --rest) {  // rows of the strip after this one
        if (rest < missing) {
            asm volatile("");  // a branch, rather than selects in every row
            for (int j = 0; j < W + 2; ++j) below[j] = {};
        }
        const bool more = rest > missing;
        for (int j = 0; j < W; ++j) {
            const Pixel done = sums[j] + (dot(weights + 6, below + j) + weights[9]);
            sums[j] = following[j] + dot(weights + 3, below + j);
            following[j] = dot(weights, below + j);
            // columns beyond the image keep their zeros
            if (more && (j > 0 || left)) load(below[j], j);
            if (j == W - 1) {
                if (more) load(below[W], W);
                if (more && right) load(below[W + 1], W + 1);
            }
            typename Pixel::Word result;
            for (int n = 0; n < Pixel::PAIRS; ++n) {
                __half2 z[PARTS];
                for (int p = 0; p < PARTS; ++p) z[p] = done(p, n);
                reinterpret_cast<__half2*>(&result)[n] = combine(z);
            }
            store_word(advanced(target, j, channel_bytes), result);
        }
        next = advanced(next, width, pitch_bytes);
        target = advanced(target, width, channel_bytes);
    }
}

// Blocks of (packs, groups) threads of depthwise_half_kernel, in a grid as above.
struct DepthwiseHalfGrid {
    dim3 blocks, threads;
    int slabs, rows;

    DepthwiseHalfGrid(int64_t batch, int64_t packs, int64_t groups, int64_t height) {
        // the block that covers a row with the fewest warps, the widest one of several
        int64_t lanes = 0, down = 0, fewest = INT64_MAX;
        for (int64_t n = kDepthwiseLanes; n > 0; --n) {
            for (int64_t m = kDepthwiseGroups; n * m <= kDepthwiseThreads; m *= 2) {
                const int64_t warps = ceil_div(packs, n) * ceil_div(groups, m) * ceil_div(n * m, 32);
                if (warps < fewest) fewest = warps, lanes = n, down = m;
            }
        }
        slabs = ceil_div(packs, lanes);
        const int64_t across = slabs * ceil_div(groups, down);
        // the shortest time of a multiprocessor: what its threads do, each its rows and about two more, around them;
        // with fewer than 12 warps it waits
        const auto time = [&](int64_t n) {
            const int64_t share = ceil_div(batch * across * ceil_div(height, n), kDepthwiseMultiprocessors);
            return std::max<int64_t>(share * lanes * down, 12 * 32) * (n + 2);
        };
        rows = kDepthwiseRows;
        for (int n = rows - 1; n > 0; --n) {
            if (time(n) < time(rows)) rows = n;
        }
        blocks = dim3(across, ceil_div(height, rows), batch);
        threads = dim3(lanes, down);
    }
};

// `combine` makes one float of PARTS, or two halves of PARTS pairs.
template <int PARTS, typename Combine>
cudaError_t launch_depthwise(DataType type, const void* x, const void* weight, const void* bias, void* y, int64_t batch,
                             int64_t height, int64_t width, int64_t channels, Combine combine, cudaStream_t stream) {
    if (batch * height * width * channels == 0) return cudaSuccess;
    if (type == DataType::kHalf && channels % 8 == 0 && width >= kDepthwiseColumns) {
        const DepthwiseHalfGrid grid(batch, channels / HalfPixel<PARTS>::N, ceil_div(width, kDepthwiseColumns), height);
        depthwise_half_kernel<PARTS, Combine><<<grid.blocks, grid.threads, 0, stream>>>(
            static_cast<const __half*>(x), static_cast<const __half*>(weight), static_cast<const __half*>(bias),
            static_cast<__half*>(y), channels, height, width, grid.slabs, grid.rows, combine);
        return cudaGetLastError();
    }
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
