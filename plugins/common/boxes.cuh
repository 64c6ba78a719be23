// Boxes of matrices on their way into shared memory and out of it (compute capability 9.0): see tensor_map.cuh.
#pragma once

#include <cuda.h>

#include "common/bulk_copy.cuh"

namespace trt_graft {

// Starts to copy the box at column, row.
__device__ inline void copy_box(void* target, const CUtensorMap& matrix, int column, int row, uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(target)),
        "l"(&matrix), "r"(column), "r"(row), "r"(shared_address(barrier))
        : "memory");
}

// The same of matrix `image` of several.
__device__ inline void copy_box(void* target, const CUtensorMap& matrices, int column, int row, int image,
                                uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
            "r"(shared_address(target)),
        "l"(&matrices), "r"(column), "r"(row), "r"(image), "r"(shared_address(barrier))
        : "memory");
}

// Starts to copy the box at column, row out of shared memory, where everyone has called fence_proxy_async since; what
// lies beyond the matrix is left out.
__device__ inline void store_box(const CUtensorMap& matrix, int column, int row, const void* source) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n"
        "cp.async.bulk.commit_group;" ::"l"(&matrix),
        "r"(column), "r"(row), "r"(shared_address(source))
        : "memory");
}

// The same of matrix `image` of several.
__device__ inline void store_box(const CUtensorMap& matrices, int column, int row, int image, const void* source) {
    asm volatile(
        "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];\n"
        "cp.async.bulk.commit_group;" ::"l"(&matrices),
        "r"(column), "r"(row), "r"(image), "r"(shared_address(source))
        : "memory");
}

// Waits until the boxes that this thread has stored have left shared memory, all but the last `LATER` ones.  Before,
// nothing may be written where such a box lies, not even by a warp that stores nothing there.
template <int LATER = 0>
__device__ void wait_for_stores() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(LATER) : "memory");
}

// Where part `part` of 16 bytes of row `row` is, in bytes.
__device__ inline int place_in_box(int row, int part) { return row * 128 + (part ^ row % 8) * 16; }

}  // namespace trt_graft
