// What launchers share with their callers; no device code, no TensorRT.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#define TRT_GRAFT_API extern "C" __attribute__((visibility("default")))

namespace trt_graft {

// Element types of tensors.  Sums are FP32 for both.
enum class DataType : int32_t { kFloat = 0, kHalf = 1 };

}  // namespace trt_graft
