"""EncoderAttention: multi-head self-attention without a mask (Vaswani et al. 2017, section 3.2.2).

y = softmax(q · kᵀ · scale) · v      per head
"""

from __future__ import annotations

from torch import Tensor

FUNCTION = """
<domain: "trt_graft", opset_import: ["" : 17]>
EncoderAttention <heads, scale, plugin_version, plugin_namespace> (q, k, v) => (y) {
    q32 = Cast <to = 1> (q)
    k32 = Cast <to = 1> (k)
    v32 = Cast <to = 1> (v)
    head_count = Constant <value_int: int = @heads> ()
    one_axis = Constant <value_ints = [1]> ()
    head_axis = Reshape (head_count, one_axis)
    same = Constant <value_ints = [0, 0]> ()
    rest = Constant <value_ints = [-1]> ()
    per_head = Concat <axis = 0> (same, head_axis, rest)
    q_split = Reshape (q32, per_head)
    k_split = Reshape (k32, per_head)
    v_split = Reshape (v32, per_head)
    q_heads = Transpose <perm = [0, 2, 1, 3]> (q_split)
    k_heads = Transpose <perm = [0, 2, 3, 1]> (k_split)
    v_heads = Transpose <perm = [0, 2, 1, 3]> (v_split)
    scores = MatMul (q_heads, k_heads)
    factor = Constant <value_float: float = @scale> ()
    scaled = Mul (scores, factor)
    attention = Softmax <axis = -1> (scaled)
    mixed = MatMul (attention, v_heads)
    tokens = Transpose <perm = [0, 2, 1, 3]> (mixed)
    merged = Concat <axis = 0> (same, rest)
    y32 = Reshape (tokens, merged)
    y = CastLike (y32, q)
}
"""


def encoder_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> Tensor:
    """q, k, v (B, T, heads·head_dim) → (B, T, heads·head_dim) in q's type, computed in FP32."""
    q_heads, k_heads, v_heads = (x.float().unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    attention = (q_heads @ k_heads.transpose(2, 3) * scale).softmax(-1)
    return (attention @ v_heads).transpose(1, 2).flatten(2).to(q.dtype)
