#pragma once

#include "common/launch.h"

namespace trt_graft {

// y[b, j, i] = x[b, i, j]: x (batch, rows, columns), y (batch, columns, rows).
TRT_GRAFT_API cudaError_t launch_transpose(const float* x, float* y, int64_t batch, int64_t rows, int64_t columns,
                                           cudaStream_t stream);

}  // namespace trt_graft
