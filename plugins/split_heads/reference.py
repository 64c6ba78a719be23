"""SplitHeads: brings the heads of each token to the front, as attention takes keys and values."""

from __future__ import annotations

from torch import Tensor

FUNCTION = """
<domain: "trt_graft", opset_import: ["" : 17]>
SplitHeads <heads, plugin_version, plugin_namespace> (x) => (y) {
    head_count = Constant <value_int: int = @heads> ()
    one_axis = Constant <value_ints = [1]> ()
    head_axis = Reshape (head_count, one_axis)
    same = Constant <value_ints = [0, 0]> ()
    rest = Constant <value_ints = [-1]> ()
    per_head = Concat <axis = 0> (same, head_axis, rest)
    split = Reshape (x, per_head)
    y = Transpose <perm = [0, 2, 1, 3]> (split)
}
"""


def split_heads(x: Tensor, heads: int) -> Tensor:
    """x (B, T, heads·head_dim) → (B, heads, T, head_dim)."""
    return x.unflatten(2, (heads, x.shape[2] // heads)).transpose(1, 2).contiguous()
