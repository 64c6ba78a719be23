"""A 1×1 convolution and the residual connection behind it, such as ends Restormer's attention and its feed-forward
network:

    x (B, K, H, W) ─ Conv 1×1 ─ Add ─ y (B, N, H, W)
    residual (B, N, H, W) ──────┘

Nobody else may use the convolution's result, and both operands of the Add have one shape.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from plugins.matching import Bindings, Constant, Either, Match, Op, Value, find

OP = "PointwiseConvResidual"
DEFAULT_IN = ()  # by itself often slower than TensorRT's convolution, see docs/restormer-tuning.md


def is_pointwise(node: gs.Node) -> bool:
    kernel = node.inputs[1]
    return (
        isinstance(kernel, gs.Constant)
        and list(kernel.shape[2:]) == [1, 1]
        and node.attrs.get("group", 1) == 1
        and not any(node.attrs.get("pads", []))
        and node.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
        and node.attrs.get("strides", [1, 1]) == [1, 1]
    )


def is_used_once(node: gs.Node) -> bool:
    return is_pointwise(node) and len(node.outputs[0].outputs) == 1


def adds_alike(node: gs.Node) -> bool:
    first, second = node.inputs
    return isinstance(first, gs.Variable) and isinstance(second, gs.Variable) and first.shape == second.shape


def convolved(x: Value, weight: Value, bias: Value) -> Value:
    return Either(Op("Conv", x, weight, bias, where=is_used_once), Op("Conv", x, weight, where=is_used_once))


x, residual = Value(rank=4), Value(rank=4)
weight, bias = Constant(), Constant()
conv = convolved(x, weight, bias)
PATTERN = Op("Add", conv, residual, where=adds_alike)


def weight_and_bias(bound: Bindings, weight: Value, bias: Value) -> list[gs.Tensor]:
    """The constants of a convolution; zeros where there is no bias: one signature with and without."""
    kernel = bound[weight]
    no_bias = gs.Constant(f"{kernel.name}.no_bias", np.zeros(kernel.shape[0], kernel.dtype))
    return [kernel, bound.get(bias, no_bias)]


def matches(graph: gs.Graph) -> list[Match]:
    outputs = {id(tensor) for tensor in graph.outputs}
    return [
        Match([bound[x], *weight_and_bias(bound, weight, bias), bound[residual]], [bound[PATTERN]], {}, bound.nodes)
        for bound in find(graph, PATTERN)
        if id(bound[conv]) not in outputs
    ]
