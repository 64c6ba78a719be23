"""What a step of greedy decoding does with its logits (B, V), sequences (B, S), position p (1) and finished (B):

logits ─ (Where(p < allowed_from, −∞, ·)) ─ ArgMax ─ Cast ─ (Where(forced[p] ≥ 0, forced[p], ·))
       ─ Where(finished > 0, pad, ·) ─ Unsqueeze ─┬─ Where(slots == p + 1, ·, sequences)                next_sequences
                                                  └─ (· == ends) ─ Cast ─ ReduceMax ─ Max(finished, ·)  next_finished
p ─ Add 1                                                                                               next_position
with slots = 0, 1, … S − 1
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from plugins.matching import Constant, Either, Match, Op, Reshaped, Value, find, scalar

OP = "GreedyChoice"
IN_PLACE = {0: 1, 1: 2, 2: 3}  # sequences, position and finished continue where they are


def first_of_each_row(node: gs.Node) -> bool:
    attribute = node.attrs.get
    return attribute("axis", 0) in (-1, 1) and not attribute("keepdims", 1) and not attribute("select_last_index", 0)


def of_each_row(node: gs.Node) -> bool:
    return node.attrs.get("axes") in ([1], [-1]) and not node.attrs.get("keepdims", 1)


logits, sequences, position, finished = Value(rank=2), Value(rank=2), Value(rank=1), Value(rank=1)
allowed_from, forced, ends, pad = Constant(), Constant(), Constant(), Constant()
early = Op("Less", position, allowed_from)
scores = Either(Op("Where", early, Constant(-np.inf), logits), logits)
best = Op("Cast", Op("ArgMax", scores, where=first_of_each_row))
index = Either(Op("Cast", Reshaped(position)), Op("Cast", position), position)
forced_now = Op("Gather", forced, index)
allowed = Either(Op("Where", Op("GreaterOrEqual", forced_now, Constant(0)), forced_now, best), best)
token = Op("Unsqueeze", Op("Where", Op("Greater", finished, Constant(0)), pad, allowed), Constant())
slots = Op("Range", Constant(0), Value(), Constant(1))
next_position = Op("Add", position, Constant(1))
PATTERN = Op("Where", Op("Equal", slots, next_position), token, sequences)
is_end = Op("Cast", Op("Equal", token, ends))
next_finished = Op("Max", finished, Op("ReduceMax", is_end, where=of_each_row))


def matches(graph: gs.Graph) -> list[Match]:
    found = []
    for chosen in find(graph, PATTERN):
        tensors = (tensor for node in graph.nodes for tensor in node.outputs)
        bound = next((both for tensor in tensors for both in next_finished.match(tensor, chosen)), None)
        if bound is None or bound[token].shape[1] != 1:
            continue
        name = bound[PATTERN].name
        constants = [
            bound.get(allowed_from) or gs.Constant(f"{name}.allowed_from", np.zeros(1, np.int32)),
            bound.get(forced) or gs.Constant(f"{name}.forced", np.full(1, -1, np.int32)),
            bound[ends],
        ]
        inputs = [*(bound[value] for value in (logits, sequences, position, finished)), *constants]
        outputs = [bound[value] for value in (PATTERN, next_position, next_finished)]
        found.append(Match(inputs, outputs, {"pad": int(scalar(bound[pad]))}, bound.nodes))
    return found
