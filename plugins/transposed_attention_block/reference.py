"""TransposedAttentionBlock: Restormer's multi-Dconv head transposed attention with the norm before it and the residual
connection around it (Restormer, section 3.1 and figure 2: the first half of a transformer block).

    n = (x − s·mean) / √(variance + epsilon) · norm_weight + norm_bias          over the channels of each pixel
    qkv = depthwise3×3(qkv_weight · n + qkv_bias, depthwise_weight) + depthwise_bias
    y = x + weight · transposed_attention(qkv, temperature) + bias

with s = subtract_mean: 1, or 0 for the authors' BiasFree variant.  The depthwise convolution sees zeros around the
image.
"""

from __future__ import annotations

from torch import Tensor

from plugins.depthwise_conv.reference import depthwise_conv
from plugins.norm_pointwise_conv.reference import norm_pointwise_conv
from plugins.transposed_attention_residual.reference import transposed_attention_residual

FUNCTION = """
<domain: "trt_graft", opset_import: ["" : 17]>
TransposedAttentionBlock <channels, epsilon, subtract_mean, plugin_version, plugin_namespace>
    (x, norm_weight, norm_bias, qkv_weight, qkv_bias, depthwise_weight, depthwise_bias, temperature, weight, bias)
    => (y) {
    x32 = Cast <to = 1> (x)
    norm_weight32 = Cast <to = 1> (norm_weight)
    norm_bias32 = Cast <to = 1> (norm_bias)
    qkv_weight32 = Cast <to = 1> (qkv_weight)
    qkv_bias32 = Cast <to = 1> (qkv_bias)
    depthwise_weight32 = Cast <to = 1> (depthwise_weight)
    depthwise_bias32 = Cast <to = 1> (depthwise_bias)
    temperature32 = Cast <to = 1> (temperature)
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
    weighted = Mul (divided, norm_weight3)
    normalised = Add (weighted, norm_bias3)
    convolved = Conv <kernel_shape = [1, 1]> (normalised, qkv_weight32, qkv_bias32)
    qkv = Conv <group: int = @channels, kernel_shape = [3, 3], pads = [1, 1, 1, 1]>
        (convolved, depthwise_weight32, depthwise_bias32)
    flat = Constant <value_ints = [0, 0, -1]> ()
    pixels = Reshape (qkv, flat)
    q3, k3, v3 = Split <axis = 1> (pixels)
    batch = Shape <start = 0, end = 1> (pixels)
    heads = Shape <start = 0, end = 1> (temperature)
    rest = Constant <value_ints = [-1]> ()
    area = Shape <start = 2> (pixels)
    per_head = Concat <axis = 0> (batch, heads, rest, area)
    q = Reshape (q3, per_head)
    k = Reshape (k3, per_head)
    v = Reshape (v3, per_head)
    smallest = Constant <value_float = 1e-12> ()
    q_norm = ReduceL2 <axes = [-1], keepdims = 1> (q)
    k_norm = ReduceL2 <axes = [-1], keepdims = 1> (k)
    q_divisor = Max (q_norm, smallest)
    k_divisor = Max (k_norm, smallest)
    q_unit = Div (q, q_divisor)
    k_unit = Div (k, k_divisor)
    k_transposed = Transpose <perm = [0, 1, 3, 2]> (k_unit)
    scores = MatMul (q_unit, k_transposed)
    scaled = Mul (scores, temperature32)
    attention = Softmax <axis = -1> (scaled)
    mixed = MatMul (attention, v)
    sides = Shape <start = 2> (x)
    image = Concat <axis = 0> (batch, rest, sides)
    attended = Reshape (mixed, image)
    projected = Conv <kernel_shape = [1, 1]> (attended, weight32, bias32)
    y32 = Add (x32, projected)
    y = CastLike (y32, x)
}
"""


def transposed_attention_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    temperature: Tensor,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    subtract_mean: bool,
) -> Tensor:
    """x (B, C, H, W), norm_weight and norm_bias (C,), qkv_weight (3·C, C, 1, 1), qkv_bias (3·C,), depthwise_weight
    (3·C, 1, 3, 3), depthwise_bias (3·C,), temperature (heads, 1, 1), weight (C, C, 1, 1), bias (C,) → (B, C, H, W) in
    x's type, computed in FP32."""
    z = norm_pointwise_conv(x.float(), norm_weight, norm_bias, qkv_weight, qkv_bias, epsilon, subtract_mean)
    qkv = depthwise_conv(z, depthwise_weight, depthwise_bias)
    return transposed_attention_residual(qkv, temperature, weight, bias, x.float()).to(x.dtype)
