"""PointwiseConvResidual: a 1×1 convolution and the residual connection behind it (Restormer, figure 2: the ends of
attention and of the feed-forward network).

    y[b, :, h, w] = residual[b, :, h, w] + weight · x[b, :, h, w] + bias
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

FUNCTION = """
<domain: "trt_graft", opset_import: ["" : 17]>
PointwiseConvResidual <plugin_version, plugin_namespace> (x, weight, bias, residual) => (y) {
    x32 = Cast <to = 1> (x)
    weight32 = Cast <to = 1> (weight)
    bias32 = Cast <to = 1> (bias)
    residual32 = Cast <to = 1> (residual)
    z = Conv <kernel_shape = [1, 1]> (x32, weight32, bias32)
    y32 = Add (residual32, z)
    y = CastLike (y32, x)
}
"""


def pointwise_conv_residual(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """x (B, K, H, W), weight (N, K, 1, 1), bias (N,), residual (B, N, H, W) → (B, N, H, W) in x's type, computed in
    FP32."""
    return (residual.float() + F.conv2d(x.float(), weight.float(), bias.float())).to(x.dtype)
