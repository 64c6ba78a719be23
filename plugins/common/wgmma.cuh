// The matrix products of a warpgroup, four warps whose first one has a number that is divisible by 4: wgmma, which only
// sm_90a has.
//
// The first factor, 64 rows × 16, is in registers: warp w has rows 16·w … 16·w + 15, as fragments a of tensor_core.cuh.
// The second one is in shared memory, in packs or in boxes, and so is read once for all four warps.  The product's
// tiles of 8 columns are fragments c.  wgmma works on while the warps go on; until wait_for_product, they must not
// touch its registers.
#pragma once

#include <cstdint>

namespace trt_graft {

// A value that all lanes of a warp have alike.  So the compiler knows it, too, and keeps what follows from it, as
// descriptors do, in uniform registers, where wgmma wants them.
__device__ inline int alike(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// Finds the second factor: columns of packs of 16 bytes, 8 values that follow each other along the sum.  Eight columns'
// packs are neighbours, 128 bytes; `next_pack` bytes on are those of the next 8 values, and `next_columns` bytes on
// those of the next 8 columns.  (Matrix descriptor without swizzling, K-major: PTX ISA, 9.7.15.5.1.)
class Packs {
  public:
    __device__ Packs(uint32_t address, uint32_t next_pack, uint32_t next_columns)
        : low_(address / 16 + (next_pack / 16 << 16)), high_(next_columns / 16) {}
    __device__ Packs moved(uint32_t bytes) const {
        Packs packs = *this;
        packs.low_ += bytes / 16;
        return packs;
    }
    __device__ uint64_t descriptor() const { return uint64_t{high_} << 32 | low_; }

  private:
    uint32_t low_, high_;
};

// Before the first of several products: registers that they use have been written or read.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// c = a · b, or c += a · b, 64 × 40.
template <bool ADD>
__device__ inline void start_product(float (&c)[5][4], const uint32_t (&a)[4], const Packs& b) {
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %25, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n40k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19}, "
        "{%20, %21, %22, %23}, %24, add, 1, 1, 0;\n"
        "}\n"
        : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]),
          "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]),
          "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor()), "n"(ADD));
}

__device__ inline void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all products that have been ended but the last `LATER` ones; `c` is one of them.
template <int LATER = 0, int TILES>
__device__ void wait_for_product(float (&c)[TILES][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LATER) : "memory");
    for (auto& tile : c) {  // read behind that
        asm volatile("" : "+f"(tile[0]), "+f"(tile[1]), "+f"(tile[2]), "+f"(tile[3])::"memory");
    }
}

// ---- Boxes, as copies bring them: see tensor_map.cuh ----------------------------------------------------------------

// Where a box begins, and that eight of its rows are 1024 bytes.
__device__ inline uint64_t describe_box(const void* box) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(box));
    return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 16 | (address & 0x3ffff) >> 4;
}

// c (64 × 64) = a (64 × 16) · bᵀ, or more of it if `add`: b is 64 rows of a box, and 16 of its columns from `column`
// on.
__device__ inline void multiply_by_rows(float (&c)[8][4], const uint32_t (&a)[4], const void* box, int column,
                                        bool add) {
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, add, 1, 1, 0;\n"
        "}\n"
        : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]),
          "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]),
          "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]),
          "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]),
          "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(describe_box(box) + column * 2 / 16), "r"(int{add}));
}

// c (64 × 16), likewise: b is 16 rows.
__device__ inline void multiply_by_rows(float (&c)[2][4], const uint32_t (&a)[4], const void* box, int column,
                                        bool add) {
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %13, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, "
        "{%8, %9, %10, %11}, %12, add, 1, 1, 0;\n"
        "}\n"
        : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]),
          "+f"(c[1][3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(describe_box(box) + column * 2 / 16), "r"(int{add}));
}

// c (64 × 64) += a (64 × 16) · b: b is 16 rows of a box, with all of its columns.
__device__ inline void multiply_by_columns(float (&c)[8][4], const uint32_t (&a)[4], const void* rows) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
        : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]),
          "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]),
          "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]),
          "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]),
          "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(describe_box(rows)));
}

// c (64 × 48) = a · bᵀ, or more of it if `add`: a is 64 rows of a box, b 48 rows of another one, of both 16 columns
// from `column` on.
__device__ inline void multiply_boxes(float (&c)[6][4], const void* a, const void* b, int column, bool add) {
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %26, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n48k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "
        "%13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23}, "
        "%24, %25, add, 1, 1, 0, 0;\n"
        "}\n"
        : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]),
          "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]),
          "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]),
          "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3])
        : "l"(describe_box(a) + column * 2 / 16), "l"(describe_box(b) + column * 2 / 16), "r"(int{add}));
}

// c (64 × 96), likewise: b is 96 rows.
__device__ inline void multiply_boxes(float (&c)[12][4], const void* a, const void* b, int column, bool add) {
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %50, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n96k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "
        "%13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, "
        "%35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, "
        "%48, %49, add, 1, 1, 0, 0;\n"
        "}\n"
        : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]),
          "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]),
          "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]),
          "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]),
          "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3]), "+f"(c[8][0]), "+f"(c[8][1]), "+f"(c[8][2]),
          "+f"(c[8][3]), "+f"(c[9][0]), "+f"(c[9][1]), "+f"(c[9][2]), "+f"(c[9][3]), "+f"(c[10][0]), "+f"(c[10][1]),
          "+f"(c[10][2]), "+f"(c[10][3]), "+f"(c[11][0]), "+f"(c[11][1]), "+f"(c[11][2]), "+f"(c[11][3])
        : "l"(describe_box(a) + column * 2 / 16), "l"(describe_box(b) + column * 2 / 16), "r"(int{add}));
}

}  // namespace trt_graft
