"""GatedFeedForward: Restormer's feed-forward network (section 3.2, GDFN), the layer normalisation of each pixel before
it and the residual connection around it.

    n = (x − s·mean) / √(variance + epsilon) · norm_weight + norm_bias      over a pixel's channels
    z = depthwise ∗ (project_in · n + project_in_bias) + depthwise_bias     with zero padding
    y = x + project_out · (gelu(z[:, :hidden]) · z[:, hidden:]) + project_out_bias

with the exact, erf-based GELU and s = subtract_mean: 1, or 0 for the authors' BiasFree variant.
"""

from __future__ import annotations

from torch import Tensor

from plugins.gated_depthwise_conv.reference import gated_depthwise_conv
from plugins.norm_pointwise_conv.reference import norm_pointwise_conv
from plugins.pointwise_conv_residual.reference import pointwise_conv_residual

FUNCTION = """
<domain: "trt_graft", opset_import: ["" : 17]>
GatedFeedForward <epsilon, subtract_mean, channels, plugin_version, plugin_namespace>
    (x, norm_weight, norm_bias, project_in, project_in_bias, depthwise, depthwise_bias, project_out, project_out_bias)
    => (y) {
    x32 = Cast <to = 1> (x)
    norm_weight32 = Cast <to = 1> (norm_weight)
    norm_bias32 = Cast <to = 1> (norm_bias)
    project_in32 = Cast <to = 1> (project_in)
    project_in_bias32 = Cast <to = 1> (project_in_bias)
    depthwise32 = Cast <to = 1> (depthwise)
    depthwise_bias32 = Cast <to = 1> (depthwise_bias)
    project_out32 = Cast <to = 1> (project_out)
    project_out_bias32 = Cast <to = 1> (project_out_bias)
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
    projected = Conv <kernel_shape = [1, 1]> (normalised, project_in32, project_in_bias32)
    z = Conv <group: int = @channels, kernel_shape = [3, 3], pads = [1, 1, 1, 1]>
        (projected, depthwise32, depthwise_bias32)
    gate, value = Split <axis = 1> (z)
    half = Constant <value_float = 0.5> ()
    one = Constant <value_float = 1.0> ()
    root_of_two = Constant <value_float = 1.4142135623730951> ()
    gate_scaled = Div (gate, root_of_two)
    erf = Erf (gate_scaled)
    erf_shifted = Add (erf, one)
    share = Mul (half, erf_shifted)
    gelu = Mul (gate, share)
    gated = Mul (gelu, value)
    out = Conv <kernel_shape = [1, 1]> (gated, project_out32, project_out_bias32)
    y32 = Add (x32, out)
    y = CastLike (y32, x)
}
"""


def gated_feed_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    project_in: Tensor,
    project_in_bias: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    project_out: Tensor,
    project_out_bias: Tensor,
    epsilon: float,
    subtract_mean: bool,
) -> Tensor:
    """x (B, C, H, W), norm_weight and norm_bias (C,), project_in (2·hidden, C, 1, 1), depthwise (2·hidden, 1, 3, 3),
    project_out (C, hidden, 1, 1), a bias (outputs,) for each → (B, C, H, W) in x's type, computed in FP32."""
    z = norm_pointwise_conv(x.float(), norm_weight, norm_bias, project_in, project_in_bias, epsilon, subtract_mean)
    gated = gated_depthwise_conv(z, depthwise, depthwise_bias)
    return pointwise_conv_residual(gated, project_out, project_out_bias, x.float()).to(x.dtype)
