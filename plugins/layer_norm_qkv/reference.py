"""LayerNormQkv: layer normalisation over the last axis (Ba et al. 2016) and the three linear layers behind it that make
queries, keys and values.

h = (x − mean) / √(variance + epsilon) · gamma + beta;  y0, y1, y2 = h · weightᵀ + bias, in three equal parts

The order of the parts is that of the weights.
"""

from __future__ import annotations

from torch import Tensor

from plugins.layer_norm_linear.reference import ACTIVATIONS, layer_norm_linear

FUNCTION = """
<domain: "trt_graft", opset_import: ["" : 17]>
LayerNormQkv <epsilon, plugin_version, plugin_namespace> (x, gamma, beta, weight, bias) => (h, y0, y1, y2) {
    x32 = Cast <to = 1> (x)
    gamma32 = Cast <to = 1> (gamma)
    beta32 = Cast <to = 1> (beta)
    weight32 = Cast <to = 1> (weight)
    bias32 = Cast <to = 1> (bias)
    h32 = LayerNormalization <axis = -1, epsilon: float = @epsilon> (x32, gamma32, beta32)
    h = CastLike (h32, x)
    factors = Transpose <perm = [1, 0]> (weight32)
    product = MatMul (h32, factors)
    y32 = Add (product, bias32)
    y = CastLike (y32, x)
    y0, y1, y2 = Split <axis = -1> (y)
}
"""


def layer_norm_qkv(
    x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor, epsilon: float
) -> tuple[Tensor, ...]:
    """x (…, inputs), gamma and beta (inputs,), weight (3·width, inputs), bias (3·width,) → h (…, inputs) and three
    times (…, width) in x's type, computed in FP32."""
    h, y = layer_norm_linear(x, gamma, beta, weight, bias, epsilon, ACTIVATIONS["none"])
    return h, *(part.contiguous() for part in y.chunk(3, dim=-1))
