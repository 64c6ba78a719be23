"""BeamChoice: one step of beam search behind the logits, as transformers does it, all of it on the device.

    gain         of a token: its log probability; −∞ where position < allowed_from; if forced[position] ≥ 0, 0 for that
                 token, −∞ for all others
    candidates   the (1 + number of ends) · beams best continuations of an image's beams, by score + gain: as many as
                 leave `beams` to go on if each beam ends in every way
    beams        the best candidates, those that have ended 10⁹ worse
    hypotheses   the best of those so far and of the candidates, by score / penalties[position]; 10⁹ worse those that
                 have not ended, or not among the first `beams`.  Those of finished images stay as they are
    finished     where the best beam's score / hopes[position] is no better than the worst of `beams` hypotheses, or
                 with stop_when_full where there are so many

A candidate has ended if its token is one of `ends`, or if it has max_length tokens, the start included.  The first of
equal ones wins: the one of an earlier beam, of a smaller token, or found earlier.  Logits that are NaN make no sense.
"""

from __future__ import annotations

import torch
from torch import Tensor

OUT = -1e9  # out of the running

FUNCTION = """
<domain: "trt_graft", opset_import: ["" : 17]>
BeamChoice <max_length, stop_when_full, plugin_version, plugin_namespace>
    (logits, sequences, scores, ancestors, hypotheses, lengths, hypothesis_scores, position, finished,
     allowed_from, forced, ends, penalties, hopes)
    => (next_sequences, next_scores, next_ancestors, next_hypotheses, next_lengths, next_hypothesis_scores,
        next_position, next_finished)
{
    none = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    none32 = Cast <to = 6> (none)
    one32 = Cast <to = 6> (one)
    second = Constant <value_ints = [1]> ()
    third = Constant <value_ints = [2]> ()
    zero = Constant <value_float = 0.0> ()
    least = Log (zero)
    out = Constant <value_float = -1.0e9> ()
    beams = Shape <start = 1, end = 2> (logits)
    vocabulary = Shape <start = 2, end = 3> (logits)

    next_position = Add (position, one32)
    now = Cast <to = 7> (position)
    after = Add (now, one)
    length = Add (after, one)
    forced_count = Size (forced)
    last_forced = Sub (forced_count, one)
    forced_index = Min (now, last_forced)
    penalty_count = Size (penalties)
    last_penalty = Sub (penalty_count, one)
    penalty_index = Min (now, last_penalty)
    hope_count = Size (hopes)
    last_hope = Sub (hope_count, one)
    hope_index = Min (now, last_hope)

    logits32 = Cast <to = 1> (logits)
    log_probabilities = LogSoftmax <axis = -1> (logits32)
    early = Less (position, allowed_from)
    allowed = Where (early, least, log_probabilities)
    forced_now = Gather (forced, forced_index)
    is_free = Less (forced_now, none32)
    vocabulary_size = Squeeze (vocabulary)
    tokens = Range (none, vocabulary_size, one)
    forced_token = Cast <to = 7> (forced_now)
    is_forced = Equal (tokens, forced_token)
    only_forced = Where (is_forced, zero, least)
    gains = Where (is_free, allowed, only_forced)
    score_column = Unsqueeze (scores, third)
    sums = Add (gains, score_column)
    of_images = Constant <value_ints = [0, -1]> ()
    continuations = Reshape (sums, of_images)
    end_count = Size (ends)
    ways = Add (end_count, one)
    kept = Mul (beams, ways)
    totals, places = TopK <axis = -1> (continuations, kept)
    parents = Div (places, vocabulary)
    begins = Mul (parents, vocabulary)
    tokens64 = Sub (places, begins)
    chosen_tokens = Cast <to = 6> (tokens64)
    token_column = Unsqueeze (chosen_tokens, third)
    is_end = Equal (token_column, ends)
    is_end32 = Cast <to = 6> (is_end)
    ends_found = ReduceMax <axes = [2], keepdims = 0> (is_end32)
    has_end = Greater (ends_found, none32)
    longest = Constant <value_int: int = @max_length> ()
    is_longest = GreaterOrEqual (length, longest)
    ended = Or (has_end, is_longest)

    capacity = Shape <start = 2, end = 3> (sequences)
    slot_count = Squeeze (capacity)
    slots = Range (none, slot_count, one)
    is_now = Equal (slots, now)
    is_after = Equal (slots, after)
    all_alike = Constant <value_ints = [1, 1]> ()
    row = Concat <axis = 0> (all_alike, capacity)
    parent_column = Unsqueeze (parents, third)
    parent_rows = Expand (parent_column, row)
    pasts = GatherElements <axis = 1> (sequences, parent_rows)
    extended = Where (is_after, token_column, pasts)

    ended_totals = Add (totals, out)
    going_on = Where (ended, ended_totals, totals)
    next_scores, chosen = TopK <axis = -1> (going_on, beams)
    chosen_column = Unsqueeze (chosen, third)
    chosen_rows = Expand (chosen_column, row)
    next_sequences = GatherElements <axis = 1> (extended, chosen_rows)
    origins = GatherElements <axis = 1> (parents, chosen)
    origin_column = Unsqueeze (origins, third)
    origin_rows = Expand (origin_column, row)
    inherited = GatherElements <axis = 1> (ancestors, origin_rows)
    origins32 = Cast <to = 6> (origin_column)
    next_ancestors = Where (is_now, origins32, inherited)

    kept_count = Squeeze (kept)
    ranks = Range (none, kept_count, one)
    is_first = Less (ranks, beams)
    ends_well = And (ended, is_first)
    penalty = Gather (penalties, penalty_index)
    rated = Div (totals, penalty)
    not_rated = Add (rated, out)
    rivals = Where (ends_well, rated, not_rated)
    all_ratings = Concat <axis = 1> (hypothesis_scores, rivals)
    ratings, ranking = TopK <axis = -1> (all_ratings, beams)
    length32 = Cast <to = 6> (length)
    rival_lengths = Where (ends_well, length32, none32)
    all_lengths = Concat <axis = 1> (lengths, rival_lengths)
    best_lengths = GatherElements <axis = 1> (all_lengths, ranking)
    all_hypotheses = Concat <axis = 1> (hypotheses, extended)
    ranking_column = Unsqueeze (ranking, third)
    ranking_rows = Expand (ranking_column, row)
    best_hypotheses = GatherElements <axis = 1> (all_hypotheses, ranking_rows)
    finished_column = Unsqueeze (finished, second)
    is_open = Equal (finished_column, none32)
    next_hypothesis_scores = Where (is_open, ratings, hypothesis_scores)
    next_lengths = Where (is_open, best_lengths, lengths)
    is_open_row = Unsqueeze (is_open, third)
    next_hypotheses = Where (is_open_row, best_hypotheses, hypotheses)

    shortest = ReduceMin <axes = [1], keepdims = 0> (next_lengths)
    is_full = Greater (shortest, none32)
    worst = ReduceMin <axes = [1], keepdims = 0> (next_hypothesis_scores)
    bar = Where (is_full, worst, out)
    best_score = Gather <axis = 1> (next_scores, none)
    hope = Gather (hopes, hope_index)
    hoped_for = Div (best_score, hope)
    is_hopeless = LessOrEqual (hoped_for, bar)
    stop = Constant <value_int: int = @stop_when_full> ()
    stops = Greater (stop, none)
    is_stopped = And (is_full, stops)
    is_over = Or (is_hopeless, is_stopped)
    is_over32 = Cast <to = 6> (is_over)
    next_finished = Max (finished, is_over32)
}
"""


def beam_choice(
    logits: Tensor,
    sequences: Tensor,
    scores: Tensor,
    ancestors: Tensor,
    hypotheses: Tensor,
    lengths: Tensor,
    hypothesis_scores: Tensor,
    position: int,
    finished: Tensor,
    allowed_from: Tensor,
    forced: Tensor,
    ends: Tensor,
    penalties: Tensor,
    hopes: Tensor,
    max_length: int,
    stop_when_full: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, Tensor]:
    """logits (B, beams, V); sequences, ancestors, hypotheses (B, beams, S); scores, lengths, hypothesis_scores
    (B, beams); finished (B,); allowed_from (V,) or (1,), forced (F,), ends (E,), penalties and hopes (P,) → next_…"""
    _, beams, vocabulary = logits.shape
    # in FP64: PyTorch's sum of tens of thousands of terms in FP32 is less precise than the kernel's
    gains = torch.where(position < allowed_from, -torch.inf, logits.double().log_softmax(2).float())
    forced_token = int(forced[min(position, len(forced) - 1)])
    if forced_token >= 0:
        gains = torch.full_like(gains, -torch.inf)
        gains[:, :, forced_token : forced_token + 1] = 0  # none, where that is no token
    candidates = (1 + len(ends)) * beams
    totals, places = best((gains + scores[:, :, None]).flatten(1), candidates)
    parents, tokens = places // vocabulary, (places % vocabulary).int()
    ended = torch.isin(tokens, ends) | (position + 2 >= max_length)
    extended = rows(sequences, parents)
    extended[:, :, position + 1 : position + 2] = tokens[:, :, None]

    next_scores, chosen = best(torch.where(ended, totals + OUT, totals), beams)
    origins = parents.gather(1, chosen)
    next_ancestors = rows(ancestors, origins)
    next_ancestors[:, :, position : position + 1] = origins[:, :, None].int()

    ended[:, beams:] = False
    rated = totals / penalties[min(position, len(penalties) - 1)]
    rated = torch.cat([hypothesis_scores, torch.where(ended, rated, rated + OUT)], 1)
    next_hypothesis_scores, ranking = best(rated, beams)
    next_lengths = torch.cat([lengths, (position + 2) * ended.int()], 1).gather(1, ranking)
    next_hypotheses = rows(torch.cat([hypotheses, extended], 1), ranking)
    stays = finished > 0
    next_hypothesis_scores[stays] = hypothesis_scores[stays]
    next_lengths[stays] = lengths[stays]
    next_hypotheses[stays] = hypotheses[stays]

    full = (next_lengths > 0).all(1)
    bar = torch.where(full, next_hypothesis_scores.amin(1), OUT)
    over = next_scores[:, 0] / hopes[min(position, len(hopes) - 1)] <= bar
    if stop_when_full:
        over |= full
    return (
        rows(extended, chosen),
        next_scores,
        next_ancestors,
        next_hypotheses,
        next_lengths,
        next_hypothesis_scores,
        position + 1,
        torch.maximum(finished, over.int()),
    )


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest scores of each row, the first of equal ones first, and their places."""
    ordered, places = scores.sort(dim=1, descending=True, stable=True)
    return ordered[:, :count].contiguous(), places[:, :count]


def rows(table: Tensor, indices: Tensor) -> Tensor:
    """table (B, n, S), indices (B, k) → (B, k, S)."""
    return table.gather(1, indices[:, :, None].expand(-1, -1, table.shape[2]))
