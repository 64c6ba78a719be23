// One token's attention to keys and values that the prefill has computed.
//
// Floor: key and value are read once, for all beams of an image; see common/decode_attention.cuh.
#include "common/decode_attention.cuh"
#include "cross_attention/kernel.cuh"

namespace trt_graft {
namespace {

constexpr int kMostQueries = 4;  // of a block: more do not fit into registers

// How many blocks a multiprocessor has registers for.
constexpr int blocks_at_once(int queries) { return queries == 1 ? 4 : 2; }

// Where the queries of a block are, for `rows` rows of each image: in groups of QUERIES, which follow each other so
// that the second one finds keys and values in L2.
template <int QUERIES>
struct Queries {
    int rows, heads;

    __host__ __device__ int groups() const { return static_cast<int>(ceil_div(rows, QUERIES)); }
    // A group's head among those of all images.
    __device__ int64_t head(int64_t unit) const { return QUERIES == 1 ? unit : unit / groups(); }
    // Its head among those of all rows.
    __device__ int64_t head_of_rows(int64_t unit) const {
        if (QUERIES == 1) return unit;
        return (head(unit) / heads * rows + unit % groups() * QUERIES) * heads + head(unit) % heads;
    }
    __device__ int count(int64_t unit) const {
        return QUERIES == 1 ? 1 : min(QUERIES, rows - static_cast<int>(unit % groups()) * QUERIES);
    }
};

template <int BLOCKS, int QUERIES, typename T, int N, int PACKS>
__global__ void __launch_bounds__(kDecodeThreads, blocks_at_once(QUERIES))
    cross_attention_kernel(Team<T, N, PACKS> team, const T* query, const T* key, const T* value, T* y,
                           Queries<QUERIES> queries, int tokens, float scale) {
    if (BLOCKS > 1 && !clusters_exist()) return;  // never launched
    allow_dependents();
    if (BLOCKS > 1) cluster_begin();
    const int64_t unit = blockIdx.x / BLOCKS;
    const int64_t head = queries.head(unit) * team.head_dim;           // in key and value, for one token
    const int64_t first = queries.head_of_rows(unit) * team.head_dim;  // in query and y
    const TokenShare<BLOCKS> share(tokens);
    key += head * tokens + share.begin * int64_t{team.head_dim};
    value += head * tokens + share.begin * int64_t{team.head_dim};
    team.prefetch(key, share.first_batch(team));
    team.prefetch(value, share.first_batch(team));
    wait_for_previous();
    const auto place = [](int token) { return token; };
    const auto rows = [&team](const T* start) {
        return [=](int token, int) { return start + token * int64_t{team.head_dim}; };
    };
    const auto take = [](int, const auto&, const auto&) {};
    decode_attention<BLOCKS, QUERIES>(team, query + first, queries.heads * team.head_dim, queries.count(unit), place,
                                      rows(key), rows(value), take, y + first, share.count, scale);
}

template <int QUERIES, typename T, typename Rows>
cudaError_t launch(const Rows& team, const T* query, const T* key, const T* value, T* y, int64_t rows, int64_t images,
                   int64_t heads, int64_t tokens, float scale, cudaStream_t stream) {
    const Queries<QUERIES> queries{static_cast<int>(rows / images), static_cast<int>(heads)};
    const auto kernel = [](auto blocks) {
        return cross_attention_kernel<blocks, QUERIES, T, Rows::kWidth, Rows::kPacks>;
    };
    const auto one = reinterpret_cast<const void*>(kernel(std::integral_constant<int, 1>{}));
    const int64_t units = images * queries.groups() * heads;
    return dispatch_blocks(one, team, units, tokens, blocks_at_once(QUERIES), [&](auto blocks) {
        return launch_decode_attention<blocks>(kernel(blocks), units, stream, team, query, key, value, y, queries,
                                               static_cast<int>(tokens), scale);
    });
}

}  // namespace

cudaError_t launch_cross_attention(DataType type, const void* query, const void* key, const void* value, void* y,
                                   int64_t rows, int64_t images, int64_t heads, int64_t tokens, int64_t head_dim,
                                   float scale, cudaStream_t stream) {
    if (rows * heads * head_dim == 0) return cudaSuccess;
    if (tokens < 1 || head_dim > kDecodeMaxHeadDim || images < 1 || rows % images != 0 ||
        std::max(rows * heads * kMaxClusterBlocks, tokens) > INT32_MAX)
        return cudaErrorInvalidValue;
    cudaError_t error = cudaSuccess;
    const cudaError_t launched = dispatch(type, [&](auto tag) {
        using T = decltype(tag);
        dispatch_team<T>(head_dim, [&](auto team) {
            const auto run = [&](auto queries) {
                return launch<queries>(team, static_cast<const T*>(query), static_cast<const T*>(key),
                                       static_cast<const T*>(value), static_cast<T*>(y), rows, images, heads, tokens,
                                       scale, stream);
            };
            error = rows == images ? run(std::integral_constant<int, 1>{})
                                   : run(std::integral_constant<int, kMostQueries>{});
        });
    });
    return error ? error : launched;
}

}  // namespace trt_graft
