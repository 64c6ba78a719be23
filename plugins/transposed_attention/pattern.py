"""Restormer's transposed attention, from the depthwise convolution's result to the input of `project_out`:

                       ┌ q ─ Reshape ─ L2-normalise ─────────────┐
    qkv (B, 3·C, H, W) ┼ k ─ Reshape ─ L2-normalise ─ Transpose ─┴ MatMul ─ ·temperature ─ Softmax ─┐
     Split             └ v ─ Reshape ──────────────────────────────────────────────────────────── MatMul ─ Reshape ─ y

L2-normalise is ReduceL2 ─ Clip ─ (Expand) ─ Div.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from plugins.matching import Constant, Either, Match, Op, Reshaped, Value, find

OP = "TransposedAttention"
NEEDS_FP32 = True  # norms leave FP16's range, and 1e-12 its resolution


def third_of_channels(node: gs.Node) -> bool:
    return node.attrs["axis"] == 1 and len(node.outputs) == 3


def over_last(node: gs.Node) -> bool:
    return node.attrs["axes"] in ([-1], [3])


def swaps_last_two(node: gs.Node) -> bool:
    return node.attrs["perm"] == [0, 1, 3, 2]


def on_last(node: gs.Node) -> bool:
    return node.attrs["axis"] in (-1, 3)


def normalised(x: Value) -> Value:
    norm = Op("Clip", Op("ReduceL2", x, where=over_last), Constant(1e-12))
    return Either(Op("Div", x, Op("Expand", norm, Value())), Op("Div", x, norm))


qkv = Value(rank=4)
temperature = Constant()
q, k, v = (Reshaped(Op("Split", qkv, output=index, where=third_of_channels), rank=4) for index in range(3))
scores = Op("MatMul", normalised(q), Op("Transpose", normalised(k), where=swaps_last_two))
attention = Op("Softmax", Op("Mul", scores, temperature), where=on_last)
PATTERN = Reshaped(Op("MatMul", attention, v), rank=4)


def matches(graph: gs.Graph) -> list[Match]:
    return [
        Match([bound[qkv], bound[temperature]], [bound[PATTERN]], {}, bound.nodes) for bound in find(graph, PATTERN)
    ]
