"""TransposedAttention: channels attend to channels (Restormer, section 3.1, equation 1).

    y = softmax(q̂ · k̂ᵀ · temperature) · v      per head, with q̂ and k̂ normalised over the pixels

The number of heads is the length of `temperature`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

FUNCTION = """
<domain: "trt_graft", opset_import: ["" : 17]>
TransposedAttention <plugin_version, plugin_namespace> (qkv, temperature) => (y) {
    qkv32 = Cast <to = 1> (qkv)
    temperature32 = Cast <to = 1> (temperature)
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
    y32 = Reshape (mixed, image)
    y = CastLike (y32, qkv)
}
"""


def transposed_attention(qkv: Tensor, temperature: Tensor) -> Tensor:
    """qkv (B, 3·C, H, W), temperature (heads, 1, 1) → (B, C, H, W) in qkv's type, computed in FP32."""
    height, width = qkv.shape[2:]
    q, k, v = qkv.float().flatten(2).unflatten(1, (3, len(temperature), -1)).unbind(1)  # (B, heads, C/heads, H·W)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * temperature.float()
    y = (scores.softmax(-1) @ v).flatten(1, 2)
    return y.unflatten(2, (height, width)).to(qkv.dtype)
