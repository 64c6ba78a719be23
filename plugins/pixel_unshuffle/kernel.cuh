#pragma once

#include "common/launch.h"

namespace trt_graft {

// y[b, (c·factor + i)·factor + j, h, w] = x[b, c, h·factor + i, w·factor + j].
//
// x  (batch, channels, height, width), height and width multiples of factor
// y  (batch, channels·factor², height/factor, width/factor)
TRT_GRAFT_API cudaError_t launch_pixel_unshuffle(DataType type, const void* x, void* y, int64_t batch, int64_t channels,
                                                 int64_t height, int64_t width, int64_t factor, cudaStream_t stream);

}  // namespace trt_graft
