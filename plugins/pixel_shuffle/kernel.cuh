#pragma once

#include "common/launch.h"

namespace trt_graft {

// y[b, h·factor + i, w·factor + j, c] = x[b, h, w, (c·factor + i)·factor + j].
//
// x  image (batch, height, width) of channels·factor²
// y  image (batch, height·factor, width·factor) of `channels`
TRT_GRAFT_API cudaError_t launch_pixel_shuffle(DataType type, const void* x, void* y, int64_t batch, int64_t height,
                                               int64_t width, int64_t channels, int64_t factor, cudaStream_t stream);

}  // namespace trt_graft
