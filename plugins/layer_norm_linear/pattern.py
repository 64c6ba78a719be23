"""A LayerNorm of one new token for each row, and the linear layer behind it:

    x (B, 1, K) ─ LayerNormalization ─┬─ MatMul ─ (+ bias) ─ (GELU or ReLU) ─ y (B, 1, N)
                                      └─ h (B, 1, K)              what the residual connection takes

Only where the tokens of a row are one, see linear_residual/pattern.py.  Three linear layers: see layer_norm_qkv.
"""

from __future__ import annotations

import math

import onnx_graphsurgeon as gs

from plugins.layer_norm_linear.reference import ACTIVATIONS
from plugins.linear_residual.pattern import linear, weight_and_bias
from plugins.matching import Bindings, Constant, Either, Match, Op, Value, find
from plugins.residual_layer_norm.pattern import over_last

OP = "LayerNormLinear"
FUSES = ("residual_layer_norm",)  # its norm
DEFAULT_IN = ("fp16",)  # TensorRT multiplies FP32 matrices faster

x = Value(rank=3)
gamma, beta, weight, bias = Constant(), Constant(), Constant(), Constant()
norm = Op("LayerNormalization", x, gamma, beta, where=over_last)
projected = linear(norm, weight, bias)
distribution = Op("Add", Op("Erf", Op("Div", projected, Constant(math.sqrt(2)))), Constant(1.0))
gelu = Op("Mul", projected, Op("Mul", Constant(0.5), distribution))
relu = Op("Relu", projected)
PATTERN = Either(gelu, relu, projected)


def linear_layers(graph: gs.Graph) -> list[list[Bindings]]:
    """The linear layers behind each LayerNorm."""
    layers: dict[int, list[Bindings]] = {}
    for bound in find(graph, PATTERN):
        layers.setdefault(id(bound[norm]), []).append(bound)
    return list(layers.values())


def activation(bound: Bindings) -> int:
    return ACTIVATIONS["gelu" if bound.get(gelu) else "relu" if bound.get(relu) else "none"]


def epsilon(bound: Bindings) -> float:
    (node,) = bound[norm].inputs
    return node.attrs.get("epsilon", 1e-5)


def matches(graph: gs.Graph) -> list[Match]:
    found = []
    for bound, *others in linear_layers(graph):
        if others:
            continue
        inputs = [bound[x], bound[gamma], bound[beta], *weight_and_bias(bound, weight, bias)]
        attributes = {"epsilon": epsilon(bound), "activation": activation(bound)}
        found.append(Match(inputs, [bound[norm], bound[PATTERN]], attributes, bound.nodes))
    return found
