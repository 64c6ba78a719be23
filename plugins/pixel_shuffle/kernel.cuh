#pragma once

#include "common/launch.h"

namespace trt_graft {

// y[b, c, h·factor + i, w·factor + j] = x[b, (c·factor + i)·factor + j, h, w].
//
// x  (batch, channels·factor², height, width)
// y  (batch, channels, height·factor, width·factor)
TRT_GRAFT_API cudaError_t launch_pixel_shuffle(DataType type, const void* x, void* y, int64_t batch, int64_t channels,
                                               int64_t height, int64_t width, int64_t factor, cudaStream_t stream);

}  // namespace trt_graft
