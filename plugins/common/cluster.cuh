// Clusters of thread blocks (compute capability 9.0): blocks that run at the same time and can write to each other's
// shared memory.
#pragma once

#include <utility>

#include "common/dependent_launch.cuh"

namespace trt_graft {

constexpr int kMaxClusterBlocks = 8;  // that every GPU with clusters has room for

// Whether this is code for a GPU with clusters.
__device__ constexpr bool clusters_exist() {
#if __CUDA_ARCH__ >= 900
    return true;
#else
    return false;
#endif
}

// A barrier in two parts, for all threads of a cluster: what they wrote before they arrived can be read after the wait.
// Those that have written nothing yet arrive by cluster_begin, which has nothing to wait for.
__device__ inline void cluster_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}

__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// target = x in the cluster's first block, where `target` is a variable in shared memory.  That block must have begun,
// and must not have ended.
__device__ inline void store_in_first_block(float& target, float x) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n"
        ".reg .b32 address;\n"
        "mapa.shared::cluster.u32 address, %0, 0;\n"
        "st.shared::cluster.f32 [address], %1;\n"
        "}\n" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(&target))),
        "f"(x)
        : "memory");
#endif
}

// Whether a kernel can run in clusters: code for an older architecture cannot, not on a newer one either.
inline cudaError_t find_whether_clusters(const void* kernel, bool& clusters) {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    clusters = !error && attributes.ptxVersion >= 90;
    return error;
}

// launch_dependent for clusters of `blocks` blocks, which a kernel with `clusters` takes, without dynamic shared
// memory.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_dependent_clusters(void (*kernel)(Parameters...), int blocks, dim3 grid, int threads,
                                      cudaStream_t stream, Arguments&&... arguments) {
    bool early = false;
#ifdef TRT_GRAFT_EARLY_LAUNCH  // see launch_dependent
    auto error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (!error) error = find_whether_early(reinterpret_cast<const void*>(kernel), early);
    if (error) return error;
#endif
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = blocks;
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = threads;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = early ? 2 : 1;
    return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace trt_graft
