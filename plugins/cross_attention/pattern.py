"""One token's attention over keys and values that the prefill has computed, for each row of its own (n = 1), or for the
n beams of each image:

query (B·n, 1, D) ─ (·scale) ─ Reshape ─ (Transpose) ─┐
key (B, heads, T, head_dim) ─ Transpose ───────────── MatMul ─ Softmax ─┐
value (B, heads, T, head_dim) ──────────────────────────────────────── MatMul ─ (Transpose) ─ Reshape ─ y (B·n, 1, D)
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from plugins.matching import Constant, Either, Match, Op, Reshaped, Value, find, scalar

OP = "CrossAttention"


def swaps_last_two(node: gs.Node) -> bool:
    return node.attrs["perm"] == [0, 1, 3, 2]


def on_last(node: gs.Node) -> bool:
    return node.attrs["axis"] in (-1, 3)


def swaps_heads_and_rows(node: gs.Node) -> bool:
    return node.attrs["perm"] == [0, 2, 1, 3]


def mixed(query_heads: Value) -> Value:
    scores = Op("MatMul", query_heads, Op("Transpose", key, where=swaps_last_two))
    return Op("MatMul", Op("Softmax", scores, where=on_last), value)


query, key, value = Value(rank=3), Value(rank=4), Value(rank=4)
scale = Constant()
split = Either(Reshaped(Op("Mul", query, scale), rank=4), Reshaped(query, rank=4))
of_images = mixed(Op("Transpose", split, where=swaps_heads_and_rows))
PATTERN = Either(
    Reshaped(mixed(split), rank=3), Reshaped(Op("Transpose", of_images, where=swaps_heads_and_rows), rank=3)
)


def matches(graph: gs.Graph) -> list[Match]:
    found = []
    for bound in find(graph, PATTERN):
        factor = bound.get(scale)
        attributes = {"scale": 1.0 if factor is None else scalar(factor)}
        found.append(Match([bound[query], bound[key], bound[value]], [bound[PATTERN]], attributes, bound.nodes))
    return found
