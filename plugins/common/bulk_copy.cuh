// Copies that the GPU makes beside its threads, and barriers in shared memory that open when they have arrived (compute
// capability 9.0).
#pragma once

#include "common/kernel.cuh"

namespace trt_graft {

__device__ inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// A barrier that is used over and over: each time it has another phase, 0 and 1 in turns, which `count` arrivals end,
// and the bytes that begin_phase has named with one of them.  One thread prepares barriers, then calls
// publish_barriers; others may use them once they know of that.
__device__ inline void prepare_barrier(uint64_t* barrier, int count) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(count) : "memory");
#endif
}

__device__ inline void publish_barriers() {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "fence.mbarrier_init.release.cluster;\n"
        "fence.proxy.async.shared::cta;\n" ::
            : "memory");
#endif
}

__device__ inline void begin_phase(uint64_t* barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
#endif
}

__device__ inline void arrive(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier)) : "memory");
#endif
}

__device__ inline void wait_for_phase(uint64_t* barrier, int phase) {
#if __CUDA_ARCH__ >= 900
    uint32_t done;
    do {
        asm volatile(
            "{\n"
            ".reg .pred done;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
            "selp.b32 %0, 1, 0, done;\n"
            "}\n"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(phase)
            : "memory");
    } while (!done);
#endif
}

// A barrier that `bytes` copied bytes open, once.  One thread prepares it; others may wait once they know of it.
__device__ inline void expect_copies(uint64_t* barrier, int bytes) {
    prepare_barrier(barrier, 1);
    publish_barriers();
    begin_phase(barrier, bytes);
}

__device__ inline void wait_for_copies(uint64_t* barrier) { wait_for_phase(barrier, 0); }

// Between what this thread does in shared memory and copies that begin behind the next barrier: what it has stored is
// visible to copies out of it and to wgmma, and what it loads is not overwritten by copies into it.  A barrier alone
// does neither: loads may still be on their way, and copies do not queue behind them.
__device__ inline void fence_proxy_async() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Starts to copy a multiple of 16 bytes between multiples of 16.
__device__ inline void copy_bulk(void* target, const void* source, int bytes, uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(target)),
                 "l"(source), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
#endif
}

}  // namespace trt_graft
