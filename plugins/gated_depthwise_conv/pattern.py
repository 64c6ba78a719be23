"""The gate of Restormer's feed-forward network, from `project_in`'s result to the input of `project_out`:

    x (B, 2·C, H, W) ─ depthwise Conv 3×3 ─ Split ┬─ GELU ─┐
                                                  └────── Mul ─ y (B, C, H, W)

GELU is x · ½ · (1 + erf(x / √2)); exporters differ in what they multiply first.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from plugins.matching import Constant, Either, Match, Op, Value, find

OP = "GatedDepthwiseConv"


def depthwise_3x3(node: gs.Node) -> bool:
    kernel = node.inputs[1]
    return (
        isinstance(kernel, gs.Constant)
        and kernel.shape[1:] == [1, 3, 3]
        and node.attrs.get("group") == kernel.shape[0]
        and node.attrs.get("pads") == [1, 1, 1, 1]
        and node.attrs.get("strides", [1, 1]) == [1, 1]
        and node.attrs.get("dilations", [1, 1]) == [1, 1]
    )


def halves_channels(node: gs.Node) -> bool:
    return node.attrs["axis"] == 1 and len(node.outputs) == 2


x = Value(rank=4)
weight, bias = Constant(), Constant()
conv = Either(Op("Conv", x, weight, bias, where=depthwise_3x3), Op("Conv", x, weight, where=depthwise_3x3))
gate, value = (Op("Split", conv, output=index, where=halves_channels) for index in range(2))
half = Constant(0.5)
erf_term = Op(
    "Add", Op("Erf", Either(Op("Div", gate, Constant(2**0.5)), Op("Mul", gate, Constant(0.5**0.5)))), Constant(1)
)
gelu = Either(
    Op("Mul", gate, Op("Mul", half, erf_term)),
    Op("Mul", half, Op("Mul", gate, erf_term)),
    Op("Mul", Op("Mul", half, gate), erf_term),
)
PATTERN = Op("Mul", gelu, value)


def matches(graph: gs.Graph) -> list[Match]:
    found = []
    for bound in find(graph, PATTERN):
        kernel = bound[weight]
        channels = kernel.shape[0]
        # zeros where there is no bias: one signature with and without
        no_bias = gs.Constant(f"{kernel.name}.no_bias", np.zeros(channels, kernel.values.dtype))
        offset = bound.get(bias, no_bias)
        found.append(Match([bound[x], kernel, offset], [bound[PATTERN]], {"channels": channels}, bound.nodes))
    return found
