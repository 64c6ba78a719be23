"""A linear layer of many tokens, and its activation:

    x (B, T, K) ─ MatMul ─ (+ bias) ─ (GELU or ReLU) ─ y (B, T, N)

Only where the tokens of a row are more than one, as in the encoder and in what a decoder computes once for each image.
Those of a decoder's step: see layer_norm_linear and linear_residual.
"""

from __future__ import annotations

import math

import onnx_graphsurgeon as gs

from plugins.layer_norm_linear.reference import ACTIVATIONS
from plugins.linear_residual.pattern import adds_bias, is_one_token, weight_and_bias
from plugins.matching import Bindings, Constant, Either, Match, Op, Value, find

OP = "Linear"
DEFAULT_IN = ("fp16",)  # TensorRT multiplies FP32 matrices faster


def is_linear(node: gs.Node) -> bool:
    """A MatMul of several tokens with (K, N)."""
    return not is_one_token(node.inputs[0]) and len(node.inputs[1].shape) == 2


x = Value(rank=3)
weight, bias = Constant(), Constant()
product = Op("MatMul", x, weight, where=is_linear)
projected = Either(Op("Add", product, bias, where=adds_bias), product)
distribution = Op("Add", Op("Erf", Op("Div", projected, Constant(math.sqrt(2)))), Constant(1.0))
gelu = Op("Mul", projected, Op("Mul", Constant(0.5), distribution))
relu = Op("Relu", projected)
PATTERN = Either(gelu, relu, projected)


def activation(bound: Bindings) -> int:
    return ACTIVATIONS["gelu" if bound.get(gelu) else "relu" if bound.get(relu) else "none"]


def matches(graph: gs.Graph) -> list[Match]:
    return [
        Match(
            [bound[x], *weight_and_bias(bound, weight, bias)],
            [bound[PATTERN]],
            {"activation": activation(bound)},
            bound.nodes,
        )
        for bound in find(graph, PATTERN)
    ]
