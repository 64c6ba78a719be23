// Depthwise 3 × 3 convolution of two halves of the channels, GELU of the first, times the second.
//
// Floor: x is read once and y written once.  A thread computes N neighbouring columns of a strip of rows, for a channel
// of the first half and its partner in the second, so that neither half is stored.  It goes down the strip with three
// rows in registers; the columns to its left and right it finds in L1, where its neighbours' loads have put them.
// In FP16 arithmetic (18 products and an erf for 6 bytes) weighs as much as memory.
#include "common/kernel.cuh"
#include "gated_depthwise_conv/kernel.cuh"

namespace trt_graft {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocksPerSM = 5;  // what the registers allow without spilling
constexpr int kStripRows = 12;   // 14 are read

// One channel around N pixels of a row, moving down.
template <typename T, int N>
struct Window {
    float weight[9], bias;
    float rows[3][N + 2];  // the row above, the row itself, the row below; a column more on either side

    __device__ Window(const T* weights, const T* biases, int64_t channel) : bias(to_float(biases[channel])) {
        for (int n = 0; n < 9; ++n) weight[n] = to_float(weights[channel * 9 + n]);
    }

    // Loads row `row` of the channel as the last of the three.
    __device__ void advance(const T* __restrict__ plane, int64_t row, int64_t column, int64_t height, int64_t width) {
        for (int n = 0; n < N + 2; ++n) {
            rows[0][n] = rows[1][n];
            rows[1][n] = rows[2][n];
            rows[2][n] = 0;
        }
        if (row < 0 || row >= height) return;
        const T* source = plane + row * width + column;
        const auto values = load_pack<N>(source);
        for (int n = 0; n < N; ++n) rows[2][n + 1] = to_float(values.values[n]);
        if (column > 0) rows[2][0] = to_float(source[-1]);
        if (column + N < width) rows[2][N + 1] = to_float(source[N]);
    }

    __device__ float convolve(int n) const {
        float sum = bias;
        for (int i = 0; i < 3; ++i) {
            for (int j = 0; j < 3; ++j) sum += weight[i * 3 + j] * rows[i][n + j];
        }
        return sum;
    }
};

__device__ float gelu(float x) { return 0.5f * x * (1 + erff(x * 0.70710678f)); }

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    gated_depthwise_conv_kernel(const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias,
                                T* __restrict__ y, int64_t planes, int64_t channels, int64_t height, int64_t width) {
    // (plane of y, strip, columns), the columns of a strip being neighbours
    const int64_t index = blockIdx.x * int64_t{kThreads} + threadIdx.x;
    const int64_t column = index % (width / N) * N;
    const int64_t strip = index / (width / N) % ceil_div(height, kStripRows);
    const int64_t plane = index / (width / N) / ceil_div(height, kStripRows);
    if (plane >= planes) return;
    const int64_t channel = plane % channels;
    const int64_t area = height * width;
    const T* gate_plane = x + (plane / channels * 2 * channels + channel) * area;
    const T* value_plane = gate_plane + channels * area;

    Window<T, N> gate(weight, bias, channel), value(weight, bias, channels + channel);
    const auto advance = [&](int64_t row) {
        gate.advance(gate_plane, row, column, height, width);
        value.advance(value_plane, row, column, height, width);
    };
    const int64_t first = strip * kStripRows;
    const int64_t end = first + kStripRows < height ? first + kStripRows : height;
    advance(first - 1);
    advance(first);
#pragma unroll 3  // rows return to their registers after three steps: no moves
    for (int64_t row = first; row < end; ++row) {
        advance(row + 1);
        Pack<T, N> result;
        for (int n = 0; n < N; ++n) result.values[n] = from_float<T>(gelu(gate.convolve(n)) * value.convolve(n));
        store_pack(y + plane * area + row * width + column, result);
    }
}

}  // namespace

cudaError_t launch_gated_depthwise_conv(DataType type, const void* x, const void* weight, const void* bias, void* y,
                                        int64_t batch, int64_t channels, int64_t height, int64_t width,
                                        cudaStream_t stream) {
    if (batch * channels * height * width == 0) return cudaSuccess;
    return dispatch(type, [&](auto tag) {
        using T = decltype(tag);
        const auto launch = [&](auto kernel, int64_t packed) {
            const int64_t planes = batch * channels;
            const int64_t threads = planes * ceil_div(height, kStripRows) * (width / packed);
            kernel<<<ceil_div(threads, kThreads), kThreads, 0, stream>>>(
                static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<const T*>(bias),
                static_cast<T*>(y), planes, channels, height, width);
        };
        // Packs of four need rows that begin on their boundaries.
        if (width % 4 == 0) {
            launch(gated_depthwise_conv_kernel<T, 4>, 4);
        } else {
            launch(gated_depthwise_conv_kernel<T, 1>, 1);
        }
    });
}

}  // namespace trt_graft
