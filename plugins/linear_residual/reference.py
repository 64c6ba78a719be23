"""LinearResidual: a linear layer and the residual connection behind it, such as ends the attention and the feed-forward
network of a transformer's decoder.

y = x · weightᵀ + bias + residual
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

FUNCTION = """
<domain: "trt_graft", opset_import: ["" : 17]>
LinearResidual <plugin_version, plugin_namespace> (x, weight, bias, residual) => (y) {
    x32 = Cast <to = 1> (x)
    weight32 = Cast <to = 1> (weight)
    bias32 = Cast <to = 1> (bias)
    residual32 = Cast <to = 1> (residual)
    factors = Transpose <perm = [1, 0]> (weight32)
    product = MatMul (x32, factors)
    linear = Add (product, bias32)
    y32 = Add (residual32, linear)
    y = CastLike (y32, x)
}
"""


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """x (…, inputs), weight (outputs, inputs), bias (outputs,), residual (…, outputs) → (…, outputs) in x's type,
    computed in FP32."""
    return (residual.float() + F.linear(x.float(), weight.float(), bias.float())).to(x.dtype)
