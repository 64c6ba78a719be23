"""A depthwise 3×3 convolution, such as that of Restormer's q, k and v:

    x (B, C, H, W) ─ depthwise Conv 3×3 ─ y (B, C, H, W)

Those that belong to a gate are left to GatedDepthwiseConv.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

import plugins
from plugins.matching import Bindings, Constant, Either, Match, Op, Value, find

OP = "DepthwiseConv"
DEFAULT_IN = ("fp16",)  # TensorRT's FP32 images have channels first: two transposes cost more than is gained


def depthwise_3x3(node: gs.Node) -> bool:
    kernel = node.inputs[1]
    return (
        isinstance(kernel, gs.Constant)
        and list(kernel.shape[1:]) == [1, 3, 3]
        and node.attrs.get("group") == kernel.shape[0]
        and node.attrs.get("pads") == [1, 1, 1, 1]
        and node.attrs.get("strides", [1, 1]) == [1, 1]
        and node.attrs.get("dilations", [1, 1]) == [1, 1]
    )


x = Value(rank=4)
weight, bias = Constant(), Constant()
PATTERN = Either(Op("Conv", x, weight, bias, where=depthwise_3x3), Op("Conv", x, weight, where=depthwise_3x3))


def operands(bound: Bindings) -> tuple[list[gs.Tensor], dict[str, Any]]:
    """Inputs and attributes of the plugin node; zeros where there is no bias: one signature with and without."""
    kernel = bound[weight]
    channels = kernel.shape[0]
    no_bias = gs.Constant(f"{kernel.name}.no_bias", np.zeros(channels, kernel.dtype))
    return [bound[x], kernel, bound.get(bias, no_bias)], {"channels": channels}


def matches(graph: gs.Graph) -> list[Match]:
    gates = plugins.find("gated_depthwise_conv").pattern.matches(graph)
    taken = {id(node) for gate in gates for node in gate.nodes}
    found = []
    for bound in find(graph, PATTERN):
        if not any(id(node) in taken for node in bound.nodes):
            inputs, attributes = operands(bound)
            found.append(Match(inputs, [bound[PATTERN]], attributes, bound.nodes))
    return found
