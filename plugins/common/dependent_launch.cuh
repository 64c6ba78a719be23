// Programmatic dependent launch: a kernel starts while the one before it in the stream still runs, and fetches
// constants meanwhile.
//
//   allow_dependents    the next kernel may start as soon as every block of this one has come here, or has ended
//   wait_for_previous   waits until the kernel before this one has ended and all that it wrote can be read
//
// Every thread of a kernel launched by launch_dependent calls wait_for_previous: before it reads what another kernel
// writes, and before it writes.  Then a kernel ends only after the one before it has, and so after all that came
// before. A kernel may have started several ahead of the oldest one running, but behind its own wait nothing older runs
// any more: neither one that still writes what it reads, nor one that still reads memory that TensorRT lets it reuse.
//
// A kernel calls allow_dependents when it begins.  That takes nothing from it: the next kernel's first block starts
// after this kernel's last one, where that has left room.  It may then keep shared memory and registers busy, but only
// its own other blocks want them.  Where it needs a multiprocessor for itself, it starts when this kernel's block there
// has ended, and gains the time until all have.
//
// All this only where the library is built with TRT_GRAFT_EARLY_LAUNCH.  Without it, below compute capability 9.0, and
// behind a kernel that never calls allow_dependents, kernels simply follow each other.  So do those that are launched
// by <<<…>>>: each starts when all before it have ended.
#pragma once

#include <utility>

#include "common/kernel.cuh"

namespace trt_graft {

__device__ inline void allow_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Whether a kernel can start early.  Code for an older architecture runs on a newer one, but does not wait; and before
// CUDA 12.3, graphs know no such kernels.
inline cudaError_t find_whether_early(const void* kernel, bool& early) {
    int driver = 0;
    cudaFuncAttributes attributes;
    cudaError_t error = cudaDriverGetVersion(&driver);
    if (!error) error = cudaFuncGetAttributes(&attributes, kernel);
    early = !error && attributes.ptxVersion >= 90 && driver >= 12030 && CUDART_VERSION >= 12030;
    return error;
}

// Launches a kernel that keeps to the rule above.  Like kernel<<<…>>>, it can be captured in a CUDA graph.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_dependent(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes,
                             cudaStream_t stream, Arguments&&... arguments) {
    cudaError_t error = cudaSuccess;
    if (shared_bytes > 48 << 10) {  // more must be asked for, on each device
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    }
    bool early = false;
#ifdef TRT_GRAFT_EARLY_LAUNCH
    // One division of L1 and shared memory for all: a multiprocessor does not change it while a block runs, and the
    // next kernel's blocks could not join this one's.  Kernels that live on L1, as the depthwise ones do, are better
    // launched by <<<…>>>.
    if (!error) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                     cudaSharedmemCarveoutMaxShared);
    }
    if (!error) error = find_whether_early(reinterpret_cast<const void*>(kernel), early);
#endif
    if (error) return error;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = threads;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = early ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace trt_graft
