"""CrossAttention: one token for each row attends to the encoder's tokens (Vaswani et al. 2017, section 3.2.3).

y = softmax(query · scale · keyᵀ) · value      per head

Keys and values may be of fewer rows: each is then that of an image, for as many rows that follow each other, its beams.
"""

from __future__ import annotations

from torch import Tensor

FUNCTION = """
<domain: "trt_graft", opset_import: ["" : 17]>
CrossAttention <scale, plugin_version, plugin_namespace> (query, key, value) => (y) {
    query32 = Cast <to = 1> (query)
    key32 = Cast <to = 1> (key)
    value32 = Cast <to = 1> (value)
    rest = Constant <value_ints = [-1]> ()
    images = Shape <start = 0, end = 1> (key)
    heads = Shape <start = 1, end = 2> (key)
    head_dim = Shape <start = 3, end = 4> (key)
    per_head = Concat <axis = 0> (images, rest, heads, head_dim)
    split = Reshape (query32, per_head)
    query_heads = Transpose <perm = [0, 2, 1, 3]> (split)
    factor = Constant <value_float: float = @scale> ()
    scaled = Mul (query_heads, factor)
    key_transposed = Transpose <perm = [0, 1, 3, 2]> (key32)
    scores = MatMul (scaled, key_transposed)
    attention = Softmax <axis = -1> (scores)
    mixed = MatMul (attention, value32)
    merged = Transpose <perm = [0, 2, 1, 3]> (mixed)
    of_query = Shape (query)
    y32 = Reshape (merged, of_query)
    y = CastLike (y32, query)
}
"""


def cross_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """query (B·n, 1, heads·head_dim), key and value (B, heads, T, head_dim) → y like query, computed in FP32."""
    query_heads = query.float().reshape(len(key), -1, key.shape[1], key.shape[3]).transpose(1, 2)  # (B, heads, n, ·)
    attention = (query_heads * scale @ key.float().transpose(2, 3)).softmax(-1)
    return (attention @ value.float()).transpose(1, 2).reshape(query.shape).to(query.dtype)
