"""The gate of Restormer's feed-forward network, from `project_in`'s result to the input of `project_out`:

    x (B, 2·C, H, W) ─ depthwise Conv 3×3 ─ Split ┬─ GELU ─┐
                                                  └────── Mul ─ y (B, C, H, W)

GELU is x · ½ · (1 + erf(x / √2)); exporters differ in what they multiply first.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from plugins.depthwise_conv import pattern as depthwise_conv
from plugins.matching import Constant, Either, Match, Op, find

OP = "GatedDepthwiseConv"
DEFAULT_IN = ("fp16",)  # TensorRT's FP32 images have channels first, see depthwise_conv


def halves_channels(node: gs.Node) -> bool:
    return node.attrs["axis"] == 1 and len(node.outputs) == 2


gate, value = (Op("Split", depthwise_conv.PATTERN, output=index, where=halves_channels) for index in range(2))
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
        inputs, attributes = depthwise_conv.operands(bound)
        found.append(Match(inputs, [bound[PATTERN]], attributes, bound.nodes))
    return found
