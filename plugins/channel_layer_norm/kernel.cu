// Layer normalisation of each pixel over its channels, which are neighbours in memory.
//
// Floor: x is read once and y written once.  A team of lanes takes a pixel and keeps it in registers: mean and variance
// cost neither memory nor barriers.  Teams grow with the pixel, three packs of 16 bytes to a lane: Restormer's widths,
// 48·2ⁿ channels, leave no lane idle, and most of a sum stays within a lane.
#include <type_traits>

#include "channel_layer_norm/kernel.cuh"
#include "common/kernel.cuh"

namespace trt_graft {
namespace {

constexpr int kThreads = 128;
constexpr int kPacks = 3;           // packs of a lane, unless 32 lanes cannot hold the pixel so
constexpr int kMaxChannels = 2048;  // 64 for each of 32 lanes
constexpr int kMaxBlocks = INT32_MAX;

template <int N>
using Int = std::integral_constant<int, N>;

// Sum over the lanes of a team; each of them gets it.
template <int LANES>
__device__ float team_sum(float x) {
    for (int offset = LANES / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// The first `count` elements, and zeros.
template <int N, typename T>
__device__ Pack<T, N> load_first(const T* pointer, int count) {
    if (count >= N) return load_pack<N>(pointer);
    Pack<T, N> pack = {};
    for (int n = 0; n < N; ++n) {
        if (n < count) pack.values[n] = pointer[n];
    }
    return pack;
}

// Lane i of a team holds the packs i, i + LANES, …, PACKS of N elements.  Pixels are `pitch` apart.  FULL: they have
// LANES·PACKS·N channels, no padding, and nothing needs to be masked.
template <typename T, int N, int LANES, int PACKS, bool FULL>
__global__ void channel_layer_norm_kernel(const T* x, const T* __restrict__ weight, const T* __restrict__ bias, T* y,
                                          int64_t pixels, int channels, int pitch, float epsilon, bool subtract_mean) {
    if (FULL) channels = pitch = LANES * PACKS * N;
    const int64_t pixel = blockIdx.x * int64_t{kThreads / LANES} + threadIdx.x / LANES;
    const bool inside = pixel < pixels;  // all lanes take part in the shuffles
    const auto column = [](int p) { return (p * LANES + static_cast<int>(threadIdx.x % LANES)) * N; };
    const auto exists = [&](int p, int n) { return FULL || column(p) + n < channels; };

    // All loads are on their way before the first sum needs one; those without a condition do not wait for each other.
    const T* source = x + (inside ? pixel : 0) * pitch;
    Pack<T, N> packs[PACKS];
    for (int p = 0; p < PACKS; ++p) packs[p] = load_pack<N>(source + (exists(p, 0) ? column(p) : 0));
    float values[PACKS][N];
    float mean = 0;
    for (int p = 0; p < PACKS; ++p) {
        float sum = 0;  // of the pack: short chains of additions
        for (int n = 0; n < N; ++n) {
            values[p][n] = exists(p, n) ? to_float(packs[p].values[n]) : 0;
            sum += values[p][n];
        }
        mean += sum;
    }
    mean = team_sum<LANES>(mean) / channels;

    float variance = 0;
    for (int p = 0; p < PACKS; ++p) {
        float sum = 0;
        for (int n = 0; n < N; ++n) {
            const float deviation = exists(p, n) ? values[p][n] - mean : 0;
            sum += deviation * deviation;
        }
        variance += sum;
    }
    const float scale = rsqrtf(team_sum<LANES>(variance) / channels + epsilon);
    if (!inside) return;

    const float offset = subtract_mean ? mean : 0;
    for (int p = 0; p < PACKS; ++p) {
        if (!exists(p, 0)) break;
        // Both are zeros in the padding of y, and so it becomes.
        const auto gamma = load_first<N>(weight + column(p), channels - column(p));
        const auto beta = load_first<N>(bias + column(p), channels - column(p));
        Pack<T, N> result;
        for (int n = 0; n < N; ++n) {
            const float normalised = (values[p][n] - offset) * scale;
            result.values[n] = from_float<T>(normalised * to_float(gamma.values[n]) + to_float(beta.values[n]));
        }
        store_pack(y + pixel * pitch + column(p), result);
    }
}

}  // namespace

cudaError_t launch_channel_layer_norm(DataType type, const void* x, const void* weight, const void* bias, void* y,
                                      int64_t pixels, int64_t channels, float epsilon, int32_t subtract_mean,
                                      cudaStream_t stream) {
    if (pixels * channels == 0) return cudaSuccess;
    if (channels > kMaxChannels || ceil_div(pixels, kThreads / 32) > kMaxBlocks) return cudaErrorInvalidValue;
    return dispatch(type, [&](auto tag) {
        using T = decltype(tag);
        const auto launch = [&](auto kernel, int lanes) {
            kernel<<<ceil_div(pixels, kThreads / lanes), kThreads, 0, stream>>>(
                static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<const T*>(bias),
                static_cast<T*>(y), pixels, static_cast<int>(channels), static_cast<int>(pitch(type, channels)),
                epsilon, subtract_mean != 0);
        };
        const auto launch_packed = [&](auto pack) {
            constexpr int N = sizeof(pack.values) / sizeof(T);
            const auto launch_team = [&](auto lanes, auto packs) {
                constexpr int LANES = lanes, PACKS = packs;
                if (N > 1 && channels == LANES * PACKS * N) {
                    launch(channel_layer_norm_kernel<T, N, LANES, PACKS, (N > 1)>, LANES);
                } else {
                    launch(channel_layer_norm_kernel<T, N, LANES, PACKS, false>, LANES);
                }
            };
            const int64_t lanes = ceil_div(channels, N * kPacks);  // that a pixel needs
            if (lanes <= 2) {
                launch_team(Int<2>{}, Int<kPacks>{});
            } else if (lanes <= 4) {
                launch_team(Int<4>{}, Int<kPacks>{});
            } else if (lanes <= 8) {
                launch_team(Int<8>{}, Int<kPacks>{});
            } else if (lanes <= 16) {
                launch_team(Int<16>{}, Int<kPacks>{});
            } else if (lanes <= 32) {
                launch_team(Int<32>{}, Int<kPacks>{});
            } else {
                launch_team(Int<32>{}, Int<kMaxChannels / 32 / N>{});
            }
        };
        // Packs of 16 bytes need pixels that begin on their boundaries; those of FP16 are padded to do so.
        constexpr int kWide = 16 / sizeof(T);
        if (std::is_same_v<T, __half> || channels % kWide == 0) {
            launch_packed(Pack<T, kWide>{});
        } else if constexpr (std::is_same_v<T, float>) {
            launch_packed(Pack<T, 1>{});
        }
    });
}

}  // namespace trt_graft
