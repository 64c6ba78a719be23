// What launchers share with their callers; no device code, no TensorRT.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#define TRT_GRAFT_API extern "C" __attribute__((visibility("default")))

namespace trt_graft {

// Element types of tensors.  Sums are FP32 for both, but for the FP16 depthwise convolutions: see common/depthwise.cuh.
enum class DataType : int32_t { kFloat = 0, kHalf = 1 };

// What linear layers do last; operators have it as an attribute.
enum class Activation : int32_t { kNone = 0, kGelu = 1, kRelu = 2 };

// Images are channel-last, (batch, height, width, pitch).  In FP16 that is TensorRT's kHWC8, whose pixels are padded to
// packs of 16 bytes; kernels never read the padding, and fill it with zeros.
constexpr int64_t pitch(DataType type, int64_t channels) {
    return type == DataType::kHalf ? (channels + 7) / 8 * 8 : channels;
}

// Whether memory begins at a multiple of 16 bytes, as packs, and what the GPU's copy engine brings, must.
inline bool on_boundary(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace trt_graft
