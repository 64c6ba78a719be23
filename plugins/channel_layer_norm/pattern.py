"""The channel LayerNorm of Restormer, as the exporter writes it:

    x (B, C, H, W) ─ Reshape ─ Transpose ─┬─ ReduceMean ─ Sub ─┬─ Pow 2 ─ ReduceMean ─ +ε ─ Sqrt ─┐
                                          └────────────────────┴─────────────────────────────── Div ─ ·weight
                                                       (+ bias) ─ Transpose ─ Reshape ─ y (B, C, H, W)

The BiasFree variant divides the tokens themselves, not their deviations, and adds no bias.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from plugins.matching import Constant, Either, Match, Op, Reshaped, Value, find, scalar

OP = "ChannelLayerNorm"
NEEDS_FP32 = True  # squares leave FP16's range, and epsilon its resolution


def swaps_last_two(node: gs.Node) -> bool:
    return node.attrs["perm"] == [0, 2, 1]


def over_last(node: gs.Node) -> bool:
    return node.attrs["axes"] in ([-1], [2])


x = Value(rank=4)
weight, bias, epsilon = Constant(), Constant(), Constant()
tokens = Op("Transpose", Reshaped(x), where=swaps_last_two)  # (B, H·W, C)
deviation = Op("Sub", tokens, Op("ReduceMean", tokens, where=over_last))
square = Either(Op("Pow", deviation, Constant(2)), Op("Mul", deviation, deviation))
root = Op("Sqrt", Op("Add", Op("ReduceMean", square, where=over_last), epsilon))


def back_to_image(normalised: Value) -> Value:
    return Reshaped(Op("Transpose", normalised, where=swaps_last_two), rank=4)


WITH_BIAS = back_to_image(Op("Add", Op("Mul", Op("Div", deviation, root), weight), bias))
BIAS_FREE = back_to_image(Op("Mul", Op("Div", tokens, root), weight))


def matches(graph: gs.Graph) -> list[Match]:
    found = []
    for pattern in (WITH_BIAS, BIAS_FREE):
        for bound in find(graph, pattern):
            gamma = bound[weight]
            # zeros where there is no bias: one signature for both variants
            no_bias = gs.Constant(f"{gamma.name}.no_bias", np.zeros_like(gamma.values))
            beta = bound.get(bias, no_bias)
            attributes = {"epsilon": scalar(bound[epsilon]), "subtract_mean": int(pattern is WITH_BIAS)}
            found.append(Match([bound[x], gamma, beta], [bound[pattern]], attributes, bound.nodes))
    return found
