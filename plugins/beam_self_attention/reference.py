"""BeamSelfAttention: one decoding step of causal self-attention (Vaswani et al. 2017, section 3.2.3) of the beams of
each image, whose caches stay where they are when beams change places.

    cache[image, beam][:, position] = key, value;  past[p] = cache[image, ancestors[image, beam, p]][:, p], and for
    p = position the beam's own;  y = softmax(query · scale · pastᵀ[: position + 1]) · past[: position + 1]

All rows are at the same position.  The cache holds S slots; what lies behind `position` is kept, but not looked at.
In TensorRT the present cache may share the memory of the past one, and only one slot is written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plugins.cross_attention.reference import cross_attention

FUNCTION = """
<domain: "trt_graft", opset_import: ["" : 17]>
BeamSelfAttention <scale, plugin_version, plugin_namespace>
    (query, key, value, key_cache, value_cache, ancestors, position) => (y, present_key, present_value)
{
    first = Constant <value_int = 0> ()
    stride = Constant <value_int = 1> ()
    one = Constant <value_ints = [1]> ()
    rest = Constant <value_ints = [-1]> ()
    beams = Shape <start = 1, end = 2> (ancestors)
    capacity = Shape <start = 2, end = 3> (key_cache)
    head_dim = Shape <start = 3, end = 4> (key_cache)
    by_cache = Shape <start = 1, end = 2> (key_cache)
    slot_shape = Concat <axis = 0> (rest, by_cache, one, head_dim)
    key_heads = Reshape (key, slot_shape)
    value_heads = Reshape (value, slot_shape)

    end = Squeeze (capacity)
    slots = Range (first, end, stride)
    now = Cast <to = 7> (position)
    is_now = Equal (slots, now)
    here = Unsqueeze (is_now, one)
    present_key = Where (here, key_heads, key_cache)
    present_value = Where (here, value_heads, value_cache)

    beam_count = Squeeze (beams)
    each_beam = Range (first, beam_count, stride)
    own = Unsqueeze (each_beam, one)
    inherited = Cast <to = 7> (ancestors)
    owners = Where (is_now, own, inherited)
    around = Constant <value_ints = [2, 4]> ()
    owners_of_heads = Unsqueeze (owners, around)
    images = Shape <start = 0, end = 1> (key_cache)
    of_beams = Concat <axis = 0> (images, beams, rest, capacity, head_dim)
    keys_of_beams = Reshape (present_key, of_beams)
    values_of_beams = Reshape (present_value, of_beams)
    whole = Shape (keys_of_beams)
    places = Expand (owners_of_heads, whole)
    keys_now = GatherElements <axis = 1> (keys_of_beams, places)
    values_now = GatherElements <axis = 1> (values_of_beams, places)

    keys32 = Cast <to = 1> (keys_now)
    values32 = Cast <to = 1> (values_now)
    query32 = Cast <to = 1> (query)
    heads = Shape <start = 2, end = 3> (keys_of_beams)
    of_rows = Concat <axis = 0> (images, beams, heads, one, head_dim)
    query_heads = Reshape (query32, of_rows)
    factor = Constant <value_float: float = @scale> ()
    scaled = Mul (query_heads, factor)
    keys_transposed = Transpose <perm = [0, 1, 2, 4, 3]> (keys32)
    scores = MatMul (scaled, keys_transposed)
    future = Greater (slots, now)
    least = Constant <value_float = -3.4028234663852886e38> ()
    masked = Where (future, least, scores)
    attention = Softmax <axis = -1> (masked)
    mixed = MatMul (attention, values32)
    of_query = Shape (query)
    y32 = Reshape (mixed, of_query)
    y = CastLike (y32, query)
}
"""


def beam_self_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    ancestors: Tensor,
    position: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value (B·beams, 1, heads·head_dim), caches (B, beams·heads, S, head_dim), ancestors (B, beams, S) of
    0 … beams − 1, 0 ≤ position < S → y like query, computed in FP32, and both caches with slot `position` written."""
    images, beams, _ = ancestors.shape
    owners = ancestors.to(torch.int64, copy=True)
    owners[:, :, position] = torch.arange(beams, device=owners.device)
    present, pasts = [], []
    for cache, new in ((key_cache, key), (value_cache, value)):
        cache = cache.clone()
        cache[:, :, position] = new.reshape(images, cache.shape[1], -1)
        present.append(cache)
        of_beams = cache.unflatten(1, (beams, -1))  # (B, beams, heads, S, head_dim)
        past = of_beams.gather(1, owners[:, :, None, :, None].expand_as(of_beams)).flatten(0, 1)
        pasts.append(past[:, :, : position + 1])
    past_key, past_value = pasts
    present_key, present_value = present
    return cross_attention(query, past_key, past_value, scale), present_key, present_value
