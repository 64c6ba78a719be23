"""One decoding step's self-attention of the beams of each image, with a K/V cache of fixed capacity S:

query (B·beams, 1, D) ─ (·scale) ─ Reshape ──────────────────────┐
key (B·beams, 1, D) ─ Reshape ─ Where(here, ·, key_cache) ─┬─ present_key
                                                           └─ owned ─ Transpose ─ MatMul ─ Where(future, −max, ·) ─┐
value (B·beams, 1, D) ─ Reshape ─ Where(here, ·, value_cache) ─┬─ present_value                                 Softmax
                                                               └─ owned ──────────────────────────────────────── MatMul
                                                                                        y (B·beams, 1, D) ─ Reshape ─┘
with slots = 0, 1, … S − 1,  here = (slots == position),  future = (slots > position)
and of caches (B, beams·heads, S, head_dim):
owned(·) = Reshape ─ GatherElements(·, Expand(Where(here, 0 … beams − 1, ancestors))) ─ Reshape
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from plugins.cached_self_attention.pattern import (
    future,
    key,
    key_cache,
    position,
    present_key,
    present_value,
    query,
    query_heads,
    scale,
    slots,
    value,
    value_cache,
)
from plugins.cross_attention.pattern import on_last, swaps_last_two
from plugins.matching import Constant, Match, Op, Reshaped, Value, find, scalar

OP = "BeamSelfAttention"
IN_PLACE = {1: 3, 2: 4}  # the present caches may be the caches


def over_beams(node: gs.Node) -> bool:
    return node.attrs.get("axis", 0) == 1


def owned(cache: Value) -> Value:
    return Reshaped(Op("GatherElements", Reshaped(cache, rank=5), places, where=over_beams), rank=4)


beams, ancestors = Constant(), Value(rank=3)
owners = Op("Cast", Op("Where", Op("Equal", slots, position), beams, ancestors))
places = Op("Expand", Op("Unsqueeze", Op("Unsqueeze", owners, Constant()), Constant()), Value(), rank=5)
scores = Op("MatMul", query_heads, Op("Transpose", owned(present_key), where=swaps_last_two))
attention = Op("Softmax", Op("Where", future, Constant(), scores), where=on_last)
PATTERN = Reshaped(Op("MatMul", attention, owned(present_value)), rank=3)


def matches(graph: gs.Graph) -> list[Match]:
    found = []
    for bound in find(graph, PATTERN):
        counted = np.arange(bound[ancestors].shape[1])
        if not np.array_equal(bound[beams].values.ravel(), counted):
            continue
        inputs = [bound[name] for name in (query, key, value, key_cache, value_cache, ancestors, position)]
        outputs = [bound[name] for name in (PATTERN, present_key, present_value)]
        factor = bound.get(scale)
        found.append(Match(inputs, outputs, {"scale": 1.0 if factor is None else scalar(factor)}, bound.nodes))
    return found
