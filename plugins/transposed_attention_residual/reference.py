"""TransposedAttentionResidual: channels attend to channels, then a 1×1 convolution and the residual connection behind
it (Restormer, section 3.1 and figure 2: the first half of a transformer block, from behind the depthwise convolution).

    y[b, :, h, w] = residual[b, :, h, w] + weight · transposed_attention(qkv, temperature)[b, :, h, w] + bias
"""

from __future__ import annotations

from torch import Tensor

from plugins.pointwise_conv_residual.reference import pointwise_conv_residual
from plugins.transposed_attention.reference import transposed_attention

FUNCTION = """
<domain: "trt_graft", opset_import: ["" : 17]>
TransposedAttentionResidual <plugin_version, plugin_namespace> (qkv, temperature, weight, bias, residual) => (y) {
    qkv32 = Cast <to = 1> (qkv)
    temperature32 = Cast <to = 1> (temperature)
    weight32 = Cast <to = 1> (weight)
    bias32 = Cast <to = 1> (bias)
    residual32 = Cast <to = 1> (residual)
    flat = Constant <value_ints = [0, 0, -1]> ()
    pixels = Reshape (qkv32, flat)
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
    sides = Shape <start = 2> (qkv)
    image = Concat <axis = 0> (batch, rest, sides)
    attended = Reshape (mixed, image)
    z = Conv <kernel_shape = [1, 1]> (attended, weight32, bias32)
    y32 = Add (residual32, z)
    y = CastLike (y32, qkv)
}
"""


def transposed_attention_residual(
    qkv: Tensor, temperature: Tensor, weight: Tensor, bias: Tensor, residual: Tensor
) -> Tensor:
    """qkv (B, 3·C, H, W), temperature (heads, 1, 1), weight (C, C, 1, 1), bias (C,), residual (B, C, H, W) →
    (B, C, H, W) in qkv's type, computed in FP32."""
    attended = transposed_attention(qkv.float(), temperature)
    return pointwise_conv_residual(attended, weight, bias, residual).to(qkv.dtype)
