"""Linear: y = activation(x · weightᵀ + bias), the layers of a transformer between its norms and its attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FUNCTION = """
<domain: "trt_graft", opset_import: ["" : 17]>
Linear <activation, plugin_version, plugin_namespace> (x, weight, bias) => (y) {
    x32 = Cast <to = 1> (x)
    weight32 = Cast <to = 1> (weight)
    bias32 = Cast <to = 1> (bias)
    factors = Transpose <perm = [1, 0]> (weight32)
    product = MatMul (x32, factors)
    linear = Add (product, bias32)

    root = Constant <value_float = 1.4142135623730951> ()
    one = Constant <value_float = 1.0> ()
    half = Constant <value_float = 0.5> ()
    scaled = Div (linear, root)
    error = Erf (scaled)
    above = Add (error, one)
    halved = Mul (half, above)
    gelu = Mul (linear, halved)
    relu = Relu (linear)
    kind = Constant <value_int: int = @activation> ()
    first = Constant <value_int = 1> ()
    second = Constant <value_int = 2> ()
    is_gelu = Equal (kind, first)
    is_relu = Equal (kind, second)
    otherwise = Where (is_relu, relu, linear)
    y32 = Where (is_gelu, gelu, otherwise)
    y = CastLike (y32, x)
}
"""


def linear(x: Tensor, weight: Tensor, bias: Tensor, activation: int) -> Tensor:
    """x (…, inputs), weight (outputs, inputs), bias (outputs,) → y (…, outputs) in x's type, computed in FP32.

    `activation` is one of layer_norm_linear.reference.ACTIVATIONS.
    """
    y = F.linear(x.float(), weight.float(), bias.float())
    return (y, F.gelu(y), torch.relu(y))[activation].to(x.dtype)
