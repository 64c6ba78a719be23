"""A linear layer of one new token for each row, and the residual connection behind it:

    x (B, 1, K) ─ MatMul ─ (+ bias) ─ Add ─ y (B, 1, N)
    residual (B, 1, N) ────────────────┘

Only where the tokens of a row are one, as in a decoder's step: the kernel reads the weights once for up to 16 rows, and
what it does for each row is not made for many.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from plugins.matching import Bindings, Constant, Either, Match, Op, Value, find
from plugins.residual_layer_norm.pattern import adds_alike

OP = "LinearResidual"
FUSES = ("residual_layer_norm",)  # its sum
DEFAULT_IN = ("fp16",)  # TensorRT multiplies FP32 matrices faster


def is_one_token(tensor: gs.Tensor) -> bool:
    return tensor.shape is not None and len(tensor.shape) == 3 and tensor.shape[1] == 1


def is_linear(node: gs.Node) -> bool:
    """A MatMul of one token with (K, N)."""
    return is_one_token(node.inputs[0]) and len(node.inputs[1].shape) == 2


def adds_bias(node: gs.Node) -> bool:
    """An Add of (N,) to (…, N)."""
    return any(list(tensor.shape) == [node.outputs[0].shape[-1]] for tensor in node.inputs)


def linear(x: Value, weight: Value, bias: Value) -> Value:
    product = Op("MatMul", x, weight, where=is_linear)
    return Either(Op("Add", product, bias, where=adds_bias), product)


def weight_and_bias(bound: Bindings, weight: Value, bias: Value) -> list[gs.Tensor]:
    """A linear layer's weight (N, K) and bias (N,), which are zeros where there is none, as new constants."""
    factors, given = bound[weight], bound.get(bias)
    values = np.zeros(factors.shape[1], factors.dtype) if given is None else given.values
    return [gs.Constant(f"{factors.name}.weight", factors.values.T), gs.Constant(f"{factors.name}.bias", values)]


x, residual = Value(rank=3), Value(rank=3)
weight, bias = Constant(), Constant()
PATTERN = Op("Add", linear(x, weight, bias), residual, where=adds_alike)


def matches(graph: gs.Graph) -> list[Match]:
    return [
        Match([bound[x], *weight_and_bias(bound, weight, bias), bound[residual]], [bound[PATTERN]], {}, bound.nodes)
        for bound in find(graph, PATTERN)
    ]
