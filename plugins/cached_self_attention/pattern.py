"""One decoding step's self-attention with a K/V cache of fixed capacity S:

query (B, 1, D) ─ (·scale) ─ Reshape ───────────────────┐
key (B, 1, D) ─ Reshape ─ Where(here, ·, key_cache) ─┬─ present_key
                                                     └─ Transpose ─ MatMul ─ Where(future, −max, ·) ─ Softmax ─┐
value (B, 1, D) ─ Reshape ─ Where(here, ·, value_cache) ─┬─ present_value                                      │
                                                         └────────────────────────────────────────────────── MatMul
                                                                                        y (B, 1, D) ─ Reshape ─┘
with slots = 0, 1, … S − 1,  here = (slots == position),  future = (slots > position)
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from plugins.cross_attention.pattern import on_last, swaps_last_two
from plugins.matching import Constant, Either, Match, Op, Reshaped, Value, find, scalar

OP = "CachedSelfAttention"
IN_PLACE = {1: 3, 2: 4}  # the present caches may be the caches

query, key, value = Value(rank=3), Value(rank=3), Value(rank=3)
key_cache, value_cache = Value(rank=4), Value(rank=4)
position, slots = Value(rank=1), Op("Range", Value(), Value(), Value())
scale = Constant()
here = Op("Unsqueeze", Op("Equal", slots, position), Constant())
future = Op("Greater", slots, position)
present_key = Op("Where", here, Reshaped(key, rank=4), key_cache)
present_value = Op("Where", here, Reshaped(value, rank=4), value_cache)
query_heads = Either(Reshaped(Op("Mul", query, scale), rank=4), Reshaped(query, rank=4))
scores = Op("MatMul", query_heads, Op("Transpose", present_key, where=swaps_last_two))
attention = Op("Softmax", Op("Where", future, Constant(), scores), where=on_last)
PATTERN = Reshaped(Op("MatMul", attention, present_value), rank=3)


def matches(graph: gs.Graph) -> list[Match]:
    found = []
    for bound in find(graph, PATTERN):
        inputs = [bound[name] for name in (query, key, value, key_cache, value_cache, position)]
        outputs = [bound[name] for name in (PATTERN, present_key, present_value)]
        factor = bound.get(scale)
        found.append(Match(inputs, outputs, {"scale": 1.0 if factor is None else scalar(factor)}, bound.nodes))
    return found
