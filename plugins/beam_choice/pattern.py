"""What a step of beam search does with its logits (B, beams, V) and its state: sequences, scores, ancestors,
hypotheses, lengths, hypothesis_scores, position p and finished.

gains = LogSoftmax(logits) ─ (Where(p < allowed_from, −∞, ·)) ─ (Where(forced[p] < 0, ·, only forced[p]))
totals, places = TopK(gains + scores);  parents = Σ (places ≥ V, 2V, …);  tokens = places − V · parents
ended = any(tokens == ends) or p + 2 ≥ max_length
extended = Where(slots == p + 1, tokens, rows(sequences, parents))

next_scores, chosen = TopK(Where(ended, totals − 10⁹, totals))
next_sequences = rows(extended, chosen);  origins = rows(parents, chosen)
next_ancestors = Where(slots == p, origins, rows(ancestors, origins))

well = ended and among the first `beams`
ratings, ranking = TopK(Concat(hypothesis_scores, totals / penalties[p], − 10⁹ where not well))
next_hypothesis_scores, next_lengths, next_hypotheses = Where(finished == 0, ·, what it was) of
    ratings, rows(Concat(lengths, Where(well, p + 2, 0)), ranking), rows(Concat(hypotheses, extended), ranking)

full = min(next_lengths) > 0
over = next_scores[:, 0] / hopes[p] ≤ Where(full, min(next_hypothesis_scores), −10⁹)  (or full)
next_finished = Max(finished, over);  next_position = p + 1

with slots = 0, 1, … S − 1, and rows(table, indices) = GatherElements(table, Expand(indices))
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from plugins.matching import Bindings, Constant, Either, Match, Op, Reshaped, Value, find, scalar

OP = "BeamChoice"
IN_PLACE = {output: output + 1 for output in range(8)}  # the state continues where it is
FP32_INPUTS = (2, 6, 12, 13)  # scores, hypothesis_scores, penalties, hopes: sums of many, and up to 10⁹
NEEDS_FP32 = True


def over_second(node: gs.Node) -> bool:
    return node.attrs.get("axis", 0) == 1


def over_last(node: gs.Node) -> bool:
    return node.attrs.get("axis", -1) in (-1, len(node.inputs[0].shape) - 1)


def greatest_first(node: gs.Node) -> bool:
    return over_last(node) and node.attrs.get("largest", 1) == 1 and node.attrs.get("sorted", 1) == 1


def reduces(axis: int) -> dict:
    """What the node of a reduction must be."""

    def reduces_axis(node: gs.Node) -> bool:
        given = node.inputs[1].values.tolist() if len(node.inputs) > 1 else node.attrs.get("axes")
        return given in ([axis], [-1]) and not node.attrs.get("keepdims", 1)

    return {"where": reduces_axis}


def rows(table: Value, indices: Value) -> Value:
    """table (B, n, S), indices (B, k) → (B, k, S)."""
    return Op("GatherElements", table, Op("Expand", column(indices), Value(), rank=3), where=over_second)


def column(x: Value) -> Value:
    return Op("Unsqueeze", x, Constant())


def top(x: Value, count: Value) -> tuple[Value, Value]:
    """The greatest elements, and their indices."""
    return Op("TopK", x, count, where=greatest_first), Op("TopK", x, count, output=1, where=greatest_first)


logits, sequences, scores, ancestors = Value(rank=3), Value(rank=3), Value(rank=2), Value(rank=3)
hypotheses, lengths, hypothesis_scores = Value(rank=3), Value(rank=2), Value(rank=2)
position, finished = Value(rank=1), Value(rank=1)
allowed_from, forced, ends, penalties, hopes = Constant(), Constant(), Constant(), Constant(), Constant()
vocabulary, starts, all_tokens, max_length, first_ones = Constant(), Constant(), Constant(), Constant(), Constant()
kept, beams = Constant(), Constant()
out = Constant(-1e9)

index = Either(Op("Cast", Reshaped(position)), Op("Cast", position), position)
next_position = Op("Add", position, Constant(1))
next_length = Op("Add", next_position, Constant(1))
slots = Op("Range", Constant(0), Value(), Constant(1))

log_softmax = Op("LogSoftmax", logits, where=over_last)
allowed = Either(Op("Where", Op("Less", position, allowed_from), Constant(-np.inf), log_softmax), log_softmax)
forced_now = Op("Gather", forced, index)
only_forced = Op("Where", Op("Equal", all_tokens, forced_now), Constant(0), Constant(-np.inf))
gains = Either(Op("Where", Op("Less", forced_now, Constant(0)), allowed, only_forced), allowed)
totals, places = top(Reshaped(Op("Add", gains, column(scores)), rank=2), kept)
begun = Op("Cast", Op("GreaterOrEqual", column(places), starts))
parents = Op("ReduceSum", begun, Constant(), **reduces(2))
tokens = column(Op("Cast", Op("Sub", places, Op("Mul", parents, vocabulary))))
is_end = Op("Cast", Op("ReduceMax", Op("Cast", Op("Equal", tokens, ends)), **reduces(2)))
ended = Op("Or", is_end, Op("GreaterOrEqual", next_length, max_length))
extended = Op("Where", Op("Equal", slots, next_position), tokens, rows(sequences, parents))

next_scores, chosen = top(Op("Where", ended, Op("Add", totals, out), totals), beams)
next_sequences = rows(extended, chosen)
origins = Op("GatherElements", parents, chosen, where=over_second)
here = Op("Equal", slots, position)
next_ancestors = Op("Where", here, column(Op("Cast", origins)), rows(ancestors, origins))

ends_well = Op("And", ended, first_ones)
rated = Op("Div", totals, Op("Gather", penalties, index))
rivals = Op("Where", ends_well, rated, Op("Add", rated, out))
ratings, ranking = top(Op("Concat", hypothesis_scores, rivals, where=over_second), beams)
rival_lengths = Op("Where", ends_well, next_length, Constant(0))
best_lengths = Op("GatherElements", Op("Concat", lengths, rival_lengths, where=over_second), ranking, where=over_second)
is_open = Op("Equal", column(finished), Constant(0))
next_hypothesis_scores = Op("Where", is_open, ratings, hypothesis_scores)
next_lengths = Op("Where", is_open, best_lengths, lengths)
best_hypotheses = rows(Op("Concat", hypotheses, extended, where=over_second), ranking)
next_hypotheses = Op("Where", column(is_open), best_hypotheses, hypotheses)

full = Op("Greater", Op("ReduceMin", next_lengths, **reduces(1)), Constant(0))
hoped_for = Op("Div", Op("Gather", next_scores, Constant(0), where=over_second), Op("Gather", hopes, index))
bar = Op("Where", full, Op("ReduceMin", next_hypothesis_scores, **reduces(1)), out)
hopeless = Op("LessOrEqual", hoped_for, bar)
stopped = Op("Or", hopeless, full)
PATTERN = Op("Max", finished, Op("Cast", Either(stopped, hopeless)))


def matches(graph: gs.Graph) -> list[Match]:
    found = []
    tensors = [tensor for node in graph.nodes for tensor in node.outputs]
    others = (next_sequences, next_ancestors, next_hypotheses)
    for bound in find(graph, PATTERN):
        for other in others:
            bound = next((both for tensor in tensors for both in other.match(tensor, bound)), bound)
        if any(bound.get(value) is None for value in others) or not is_consistent(bound):
            continue
        name = bound[PATTERN].name
        state = (sequences, scores, ancestors, hypotheses, lengths, hypothesis_scores, position, finished)
        constants = [
            bound.get(allowed_from) or gs.Constant(f"{name}.allowed_from", np.zeros(1, np.int32)),
            bound.get(forced) or gs.Constant(f"{name}.forced", np.full(1, -1, np.int32)),
            *(bound[value] for value in (ends, penalties, hopes)),
        ]
        outputs = [next_sequences, next_scores, next_ancestors, next_hypotheses]
        outputs += [next_lengths, next_hypothesis_scores, next_position, PATTERN]
        attributes = {
            "max_length": int(scalar(bound[max_length])),
            "stop_when_full": int(bound.get(stopped) is not None),
        }
        inputs = [bound[logits], *(bound[value] for value in state), *constants]
        found.append(Match(inputs, [bound[value] for value in outputs], attributes, bound.nodes))
    return found


def is_consistent(bound: Bindings) -> bool:
    """Whether the constants are those of one number of beams, candidates and tokens."""
    _, beam_count, token_count = bound[logits].shape
    candidates = (1 + bound[ends].values.size) * beam_count
    expected = {
        beams: beam_count,
        kept: candidates,
        vocabulary: token_count,
        starts: np.arange(1, beam_count) * token_count,
        first_ones: np.arange(candidates) < beam_count,
        all_tokens: np.arange(token_count),
    }
    return all(
        np.array_equal(bound[value].values.ravel(), np.ravel(numbers))
        for value, numbers in expected.items()
        if bound.get(value) is not None
    )
