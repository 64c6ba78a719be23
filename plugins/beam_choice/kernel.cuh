#pragma once

#include "common/launch.h"

namespace trt_graft {

constexpr int kMaxBeams = 32;
constexpr int kMaxCandidates = 128;  // (1 + end_count) · beams

// One step of beam search behind the logits: see reference.py, which says what becomes of the state.  Without images
// nothing does.
//
// logits                             (images, beams, vocabulary), with beams · vocabulary ≥ (1 + end_count) · beams
// sequences, ancestors, hypotheses   (images, beams, capacity); lengths (images, beams)
// scores, hypothesis_scores          (images, beams) FP32
// position                           one int32 on the device
// finished                           (images)
// allowed_from, forced               as greedy_choice takes them, but a forced token beyond the vocabulary forbids all
// ends                               (end_count), end_count ≥ 1
// penalties, hopes                   (positions) FP32, positions ≥ 1; behind the last position the last one holds
// workspace                          beam_choice_workspace_bytes(…) bytes, or more, on an 8-byte boundary
//
// Each of the eight next_… may be the input that it continues; otherwise nothing overlaps.
//
// allowed_from and ends are constants: they may be read before kernels ahead in the stream have ended.
TRT_GRAFT_API cudaError_t launch_beam_choice(
    DataType type, const void* logits, const int32_t* sequences, const float* scores, const int32_t* ancestors,
    const int32_t* hypotheses, const int32_t* lengths, const float* hypothesis_scores, const int32_t* position,
    const int32_t* finished, const int32_t* allowed_from, const int32_t* forced, const int32_t* ends,
    const float* penalties, const float* hopes, int32_t* next_sequences, float* next_scores, int32_t* next_ancestors,
    int32_t* next_hypotheses, int32_t* next_lengths, float* next_hypothesis_scores, int32_t* next_position,
    int32_t* next_finished, void* workspace, int64_t images, int64_t beams, int64_t vocabulary, int64_t capacity,
    int64_t restricted, int64_t forced_count, int64_t end_count, int64_t positions, int64_t max_length,
    int64_t stop_when_full, cudaStream_t stream);

TRT_GRAFT_API int64_t beam_choice_workspace_bytes(int64_t rows, int64_t vocabulary);

}  // namespace trt_graft
