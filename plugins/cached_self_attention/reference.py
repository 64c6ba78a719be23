"""CachedSelfAttention: one decoding step of causal self-attention (Vaswani et al. 2017, section 3.2.3) with a cache.

    cache[:, :, position] = key, value;  y = softmax(query · scale · cacheᵀ[: position + 1]) · cache[: position + 1]

All rows are at the same position.  The cache holds S slots; what lies behind `position` is kept, but not looked at.
In TensorRT the present cache may share the memory of the past one, and only one slot is written.
"""

from __future__ import annotations

from torch import Tensor

from plugins.cross_attention.reference import cross_attention

FUNCTION = """
<domain: "trt_graft", opset_import: ["" : 17]>
CachedSelfAttention <scale, plugin_version, plugin_namespace>
    (query, key, value, key_cache, value_cache, position) => (y, present_key, present_value)
{
    same = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    rest = Constant <value_ints = [-1]> ()
    heads = Shape <start = 1, end = 2> (key_cache)
    head_dim = Shape <start = 3, end = 4> (key_cache)
    per_head = Concat <axis = 0> (same, heads, one, head_dim)
    key_heads = Reshape (key, per_head)
    value_heads = Reshape (value, per_head)

    capacity = Shape <start = 2, end = 3> (key_cache)
    end = Squeeze (capacity)
    first = Constant <value_int = 0> ()
    stride = Constant <value_int = 1> ()
    slots = Range (first, end, stride)
    now = Cast <to = 7> (position)
    is_now = Equal (slots, now)
    here = Unsqueeze (is_now, one)
    present_key = Where (here, key_heads, key_cache)
    present_value = Where (here, value_heads, value_cache)

    query32 = Cast <to = 1> (query)
    keys32 = Cast <to = 1> (present_key)
    values32 = Cast <to = 1> (present_value)
    query_heads = Reshape (query32, per_head)
    factor = Constant <value_float: float = @scale> ()
    scaled = Mul (query_heads, factor)
    keys_transposed = Transpose <perm = [0, 1, 3, 2]> (keys32)
    scores = MatMul (scaled, keys_transposed)
    future = Greater (slots, now)
    least = Constant <value_float = -3.4028234663852886e38> ()
    masked = Where (future, least, scores)
    attention = Softmax <axis = -1> (masked)
    mixed = MatMul (attention, values32)
    merged = Concat <axis = 0> (same, one, rest)
    y32 = Reshape (mixed, merged)
    y = CastLike (y32, query)
}
"""


def cached_self_attention(
    query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, position: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value (B, 1, heads·head_dim), caches (B, heads, S, head_dim), 0 ≤ position < S
    → y like query, computed in FP32, and both caches with slot `position` written."""
    present_key, present_value = key_cache.clone(), value_cache.clone()
    for cache, new in ((present_key, key), (present_value, value)):
        cache[:, :, position] = new[:, 0].unflatten(1, (cache.shape[1], -1))
    used = slice(0, position + 1)
    y = cross_attention(query, present_key[:, :, used], present_value[:, :, used], scale)
    return y, present_key, present_value
