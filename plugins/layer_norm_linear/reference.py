"""LayerNormLinear: layer normalisation over the last axis (Ba et al. 2016) and the linear layer behind it, such as the
first of a feed-forward network in a post-norm transformer.

h = (x − mean) / √(variance + epsilon) · gamma + beta;  y = activation(h · weightᵀ + bias)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"none": 0, "gelu": 1, "relu": 2}  # values of the attribute `activation`

FUNCTION = """
<domain: "trt_graft", opset_import: ["" : 17]>
LayerNormLinear <epsilon, activation, plugin_version, plugin_namespace> (x, gamma, beta, weight, bias) => (h, y) {
    x32 = Cast <to = 1> (x)
    gamma32 = Cast <to = 1> (gamma)
    beta32 = Cast <to = 1> (beta)
    weight32 = Cast <to = 1> (weight)
    bias32 = Cast <to = 1> (bias)
    h32 = LayerNormalization <axis = -1, epsilon: float = @epsilon> (x32, gamma32, beta32)
    h = CastLike (h32, x)
    factors = Transpose <perm = [1, 0]> (weight32)
    product = MatMul (h32, factors)
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


def layer_norm_linear(
    x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor, epsilon: float, activation: int
) -> tuple[Tensor, Tensor]:
    """x (…, inputs), gamma and beta (inputs,), weight (outputs, inputs), bias (outputs,) → h (…, inputs) and
    y (…, outputs) in x's type, computed in FP32."""
    h = F.layer_norm(x.float(), gamma.shape, gamma.float(), beta.float(), epsilon)
    linear = F.linear(h, weight.float(), bias.float())
    y = (linear, F.gelu(linear), torch.relu(linear))[activation]
    return h.to(x.dtype), y.to(x.dtype)
