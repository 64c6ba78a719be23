#pragma once

#include "common/launch.h"

namespace trt_graft {

// Greedy decoding's choice: each row's token behind `position` is the one with the highest logit, the first of equal
// ones; NaN counts as higher than all else.
//
// logits        (rows, vocabulary), vocabulary ≥ 1
// sequences     (rows, capacity)
// position      one int32 on the device
// finished      (rows)
// allowed_from  (restricted): at a position before its number a token's logit counts as −∞; restricted = vocabulary, or
//               1 if one number is that of all tokens
// forced        (positions), positions ≥ 1: forced[position], where it is not negative, is chosen in place of the
//               token with the highest logit; behind the last position the last one holds
// ends          (end_count)
// workspace     greedy_choice_workspace_bytes(…) bytes, or more, on an 8-byte boundary
//
// next_sequences  sequences with the token at position + 1, if that lies within the capacity; finished rows get `pad`
// next_position   position + 1
// next_finished   finished, or 1 where it is 0 and the token is one of `ends`
//
// Each of these three may be the input that it continues; otherwise nothing overlaps.
//
// allowed_from is a constant: it may be read before kernels ahead in the stream have ended.
TRT_GRAFT_API cudaError_t launch_greedy_choice(DataType type, const void* logits, const int32_t* sequences,
                                               const int32_t* position, const int32_t* finished,
                                               const int32_t* allowed_from, const int32_t* forced, const int32_t* ends,
                                               int32_t* next_sequences, int32_t* next_position, int32_t* next_finished,
                                               void* workspace, int64_t rows, int64_t vocabulary, int64_t capacity,
                                               int64_t restricted, int64_t positions, int64_t end_count, int64_t pad,
                                               cudaStream_t stream);

TRT_GRAFT_API int64_t greedy_choice_workspace_bytes(int64_t rows, int64_t vocabulary);

}  // namespace trt_graft
