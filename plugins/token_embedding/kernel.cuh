#pragma once

#include "common/launch.h"

namespace trt_graft {

// y[r] = scale · tokens[sequences[r, position]] + positions[position].  An index outside its table is the nearest one
// inside.
//
// tokens     (vocabulary, dim), vocabulary ≥ 1
// positions  (places, dim), places ≥ 1
// sequences  (rows, length), length ≥ 1
// position   one int32 on the device
// y          (rows, dim)
TRT_GRAFT_API cudaError_t launch_token_embedding(DataType type, const void* tokens, const void* positions,
                                                 const int32_t* sequences, const int32_t* position, void* y,
                                                 int64_t rows, int64_t length, int64_t vocabulary, int64_t places,
                                                 int64_t dim, float scale, cudaStream_t stream);

}  // namespace trt_graft
