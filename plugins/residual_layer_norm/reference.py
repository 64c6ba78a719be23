"""ResidualLayerNorm: a residual connection, then layer normalisation over the last axis (Ba et al. 2016).

sum = x + residual;  y = (sum − mean) / √(variance + epsilon) · weight + bias
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

FUNCTION = """
<domain: "trt_graft", opset_import: ["" : 17]>
ResidualLayerNorm <epsilon, plugin_version, plugin_namespace> (x, residual, weight, bias) => (sum, y) {
    x32 = Cast <to = 1> (x)
    residual32 = Cast <to = 1> (residual)
    weight32 = Cast <to = 1> (weight)
    bias32 = Cast <to = 1> (bias)
    sum32 = Add (x32, residual32)
    y32 = LayerNormalization <axis = -1, epsilon: float = @epsilon> (sum32, weight32, bias32)
    sum = CastLike (sum32, x)
    y = CastLike (y32, x)
}
"""


def residual_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """x and residual (…, dim), weight and bias (dim,) → sum and y (…, dim) in x's type, computed in FP32."""
    total = x.float() + residual.float()
    y = F.layer_norm(total, weight.shape, weight.float(), bias.float(), epsilon)
    return total.to(x.dtype), y.to(x.dtype)
