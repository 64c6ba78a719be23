"""Self-attention of a vision transformer, between its projections:

q (B, T, D) ─ Reshape ─ Transpose ─┐
k (B, T, D) ─ Reshape ─ Transpose ─┴ MatMul ─ ·scale ─ Softmax ─┐
v (B, T, D) ─ Reshape ─ Transpose ──────────────────────────── MatMul ─ Transpose ─ Reshape ─ y (B, T, D)
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_graphsurgeon as gs

from plugins.matching import Constant, Either, Match, Op, Reshaped, Value, find, scalar

OP = "EncoderAttention"


def permutes(*perm: int) -> Callable[[gs.Node], bool]:
    return lambda node: node.attrs["perm"] == list(perm)


def on_last(node: gs.Node) -> bool:
    return node.attrs["axis"] in (-1, 3)


def heads_first(x: Value) -> Value:
    return Op("Transpose", x, where=permutes(0, 2, 1, 3))  # (B, T, heads, head_dim) → (B, heads, T, head_dim)


q, k, v = Value(rank=3), Value(rank=3), Value(rank=3)
scale = Constant()
split_q, split_k, split_v = Reshaped(q, rank=4), Reshaped(k, rank=4), Reshaped(v, rank=4)  # (B, T, heads, head_dim)
transposed_k = Either(
    Op("Transpose", split_k, where=permutes(0, 2, 3, 1)),
    Op("Transpose", heads_first(split_k), where=permutes(0, 1, 3, 2)),
)
scores = Op("Mul", Op("MatMul", heads_first(split_q), transposed_k), scale)
mixed = Op("MatMul", Op("Softmax", scores, where=on_last), heads_first(split_v))
PATTERN = Reshaped(heads_first(mixed), rank=3)


def matches(graph: gs.Graph) -> list[Match]:
    found = []
    for bound in find(graph, PATTERN):
        attributes = {"heads": bound[split_q].shape[2], "scale": scalar(bound[scale])}
        found.append(Match([bound[q], bound[k], bound[v]], [bound[PATTERN]], attributes, bound.nodes))
    return found
