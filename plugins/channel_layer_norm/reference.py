"""ChannelLayerNorm: layer normalisation of each pixel over its channels (Restormer, section 3).

    y[b, :, h, w] = (x[b, :, h, w] − s·mean) / √(variance + epsilon) · weight + bias

with s = subtract_mean: 1, or 0 for the authors' BiasFree variant.
"""

from __future__ import annotations

import torch
from torch import Tensor

FUNCTION = """
<domain: "trt_graft", opset_import: ["" : 17]>
ChannelLayerNorm <epsilon, subtract_mean, plugin_version, plugin_namespace> (x, weight, bias) => (y) {
    x32 = Cast <to = 1> (x)
    weight32 = Cast <to = 1> (weight)
    bias32 = Cast <to = 1> (bias)
    mean = ReduceMean <axes = [1], keepdims = 1> (x32)
    deviation = Sub (x32, mean)
    square = Mul (deviation, deviation)
    variance = ReduceMean <axes = [1], keepdims = 1> (square)
    eps = Constant <value_float: float = @epsilon> ()
    shifted = Add (variance, eps)
    root = Sqrt (shifted)
    keep_mean = Constant <value_int: int = @subtract_mean> ()
    factor = Cast <to = 1> (keep_mean)
    offset = Mul (mean, factor)
    numerator = Sub (x32, offset)
    normalised = Div (numerator, root)
    per_channel = Constant <value_ints = [-1, 1, 1]> ()
    weight3 = Reshape (weight32, per_channel)
    bias3 = Reshape (bias32, per_channel)
    scaled = Mul (normalised, weight3)
    y32 = Add (scaled, bias3)
    y = CastLike (y32, x)
}
"""


def channel_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, subtract_mean: bool) -> Tensor:
    """x (B, C, H, W), weight and bias (C,) → (B, C, H, W) in x's type, computed in FP32."""
    x32 = x.float()
    variance, mean = torch.var_mean(x32, dim=1, unbiased=False, keepdim=True)
    numerator = x32 - mean if subtract_mean else x32
    y = numerator * torch.rsqrt(variance + epsilon) * weight.float()[:, None, None] + bias.float()[:, None, None]
    return y.to(x.dtype)
