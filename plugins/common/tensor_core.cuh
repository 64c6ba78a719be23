// The warp-wide instructions of tensor cores.
//
// Lane l of a warp has the place (group, pair) = (l / 4, l % 4) in a fragment:
//   a  16×16  {rows group, group + 8} × columns {2·pair, 2·pair + 1}, then the same with columns + 8
//   b  16×8   rows {2·pair, 2·pair + 1} × column group, then the same with rows + 8
//   c  16×8   row group × columns {2·pair, 2·pair + 1}, then the same with row group + 8
// a and b hold two FP16 values in a word, c holds FP32 values.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "common/kernel.cuh"

namespace trt_graft {

// Starts to copy 16 bytes to shared memory, or to fill them with zeros.  Turing cannot, and copies here and now.
__device__ inline void copy_or_clear(__half* target, const __half* source, bool exists) {
#if __CUDA_ARCH__ >= 800
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(target));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(address), "l"(source), "r"(exists ? 16 : 0)
                 : "memory");
#else
    Pack<__half, 8> pack = {};
    if (exists) pack = load_pack<8>(source);
    store_pack(target, pack);
#endif
}

// Four 8×8 matrices from shared memory; lane l passes the address of row l % 8 of matrix l / 8.  A lane gets the values
// of row `group`, columns 2·pair and 2·pair + 1 of each.
__device__ inline void load_matrices(uint32_t (&words)[4], const __half* row) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
}

// Four matrices, transposed: column `group`, rows 2·pair and 2·pair + 1.
__device__ inline void load_matrices_transposed(uint32_t (&words)[4], const __half* row) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
}

// Stores four 8×8 matrices, from the lanes that load_matrices gives them to.  From compute capability 9.0 on.
__device__ inline void store_matrices(void* row, const uint32_t (&words)[4]) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 :
                 : "r"(address), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
}

// Stores four 8×8 matrices, transposed: lane l passes the address of what becomes row l % 8 of matrix l / 8, a column
// of what the lanes have.  From compute capability 9.0 on.
__device__ inline void store_matrices_transposed(void* row, const uint32_t (&words)[4]) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 :
                 : "r"(address), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
}

// One matrix, with the rows of lanes 0 … 7.
__device__ inline void store_matrix_transposed(void* row, uint32_t word) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" : : "r"(address), "r"(word) : "memory");
}

// c += a · b
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else  // Turing multiplies half as many columns of a at once
    const uint32_t b[] = {b0, b1};
    for (int i = 0; i < 2; ++i) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
    }
#endif
}

__device__ inline uint32_t as_word(__half2 pair) { return *reinterpret_cast<const uint32_t*>(&pair); }
__device__ inline __half2 as_pair(uint32_t word) { return *reinterpret_cast<const __half2*>(&word); }

}  // namespace trt_graft
