"""NormPointwiseConv: layer normalisation of each pixel over its channels, then a 1×1 convolution (Restormer, figure 2:
what stands before the depthwise convolutions).

    n[b, :, h, w] = (x[b, :, h, w] − s·mean) / √(variance + epsilon) · norm_weight + norm_bias
    y[b, :, h, w] = weight · n[b, :, h, w] + bias

with s = subtract_mean: 1, or 0 for the authors' BiasFree variant.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from plugins.channel_layer_norm.reference import channel_layer_norm

FUNCTION = """
<domain: "trt_graft", opset_import: ["" : 17]>
NormPointwiseConv <epsilon, subtract_mean, plugin_version, plugin_namespace>
    (x, norm_weight, norm_bias, weight, bias) => (y) {
    x32 = Cast <to = 1> (x)
    norm_weight32 = Cast <to = 1> (norm_weight)
    norm_bias32 = Cast <to = 1> (norm_bias)
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
    divided = Div (numerator, root)
    per_channel = Constant <value_ints = [-1, 1, 1]> ()
    norm_weight3 = Reshape (norm_weight32, per_channel)
    norm_bias3 = Reshape (norm_bias32, per_channel)
    scaled = Mul (divided, norm_weight3)
    normalised = Add (scaled, norm_bias3)
    y32 = Conv <kernel_shape = [1, 1]> (normalised, weight32, bias32)
    y = CastLike (y32, x)
}
"""


def norm_pointwise_conv(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    subtract_mean: bool,
) -> Tensor:
    """x (B, C, H, W), norm_weight and norm_bias (C,), weight (N, C, 1, 1), bias (N,) → (B, N, H, W) in x's type,
    computed in FP32."""
    normalised = channel_layer_norm(x.float(), norm_weight, norm_bias, epsilon, subtract_mean)
    return F.conv2d(normalised, weight.float(), bias.float()).to(x.dtype)
