// Descriptions of matrices for copies of boxes (compute capability 9.0); on the host.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace trt_graft {

// The driver's cuTensorMapEncodeTiled: the library does not link the driver.
using EncodeTensorMap = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                     const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                     CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

inline cudaError_t find_encode(EncodeTensorMap& encode) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const auto error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
    const auto error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    if (error) return error;
    encode = reinterpret_cast<EncodeTensorMap>(function);
    return function ? cudaSuccess : cudaErrorNotSupported;
}

// Boxes of box_columns × box_rows of `count` FP16 matrices (rows, columns), one behind the other, of which a row begins
// `pitch` values behind the one before, or where that ends; zeros where a matrix ends.  Copies give column and row, of
// three dimensions the matrix as well.  A box begins in shared memory at a multiple of 128 bytes, row after row.  Of 64
// columns, at a multiple of 1024: a row is 128 bytes, whose 16-byte parts have another order in each of eight rows,
// part i of row r is at place i ^ (r % 8).
inline cudaError_t describe_boxes(EncodeTensorMap encode, CUtensorMap& map, const void* matrices, int dimensions,
                                  int64_t count, int64_t rows, int64_t columns, int box_rows, int box_columns = 64,
                                  int64_t pitch = 0) {
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                                static_cast<cuuint64_t>(count)};
    const cuuint64_t row_bytes = 2 * static_cast<cuuint64_t>(pitch > 0 ? pitch : columns);
    const cuuint64_t pitches[] = {row_bytes, row_bytes * sizes[1]};
    const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows), 1};
    const cuuint32_t steps[] = {1, 1, 1};
    const auto order = box_columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE;
    const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, dimensions, const_cast<void*>(matrices),
                                   sizes, pitches, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, order,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace trt_graft
