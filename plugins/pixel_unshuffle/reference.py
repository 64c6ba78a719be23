"""PixelUnshuffle: moves each factor × factor block of pixels into channels, ordered (channel, row, column).

ONNX's SpaceToDepth orders them (row, column, channel), hence the transposition.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

FUNCTION = """
<domain: "trt_graft", opset_import: ["" : 17]>
PixelUnshuffle <factor, plugin_version, plugin_namespace> (x) => (y) {
    deep = SpaceToDepth <blocksize: int = @factor> (x)
    batch = Shape <start = 0, end = 1> (x)
    channels = Shape <start = 1, end = 2> (x)
    sides = Shape <start = 2> (deep)
    rest = Constant <value_ints = [-1]> ()
    split = Concat <axis = 0> (batch, rest, channels, sides)
    by_block = Reshape (deep, split)
    by_channel = Transpose <perm = [0, 2, 1, 3, 4]> (by_block)
    merged = Concat <axis = 0> (batch, rest, sides)
    y = Reshape (by_channel, merged)
}
"""


def pixel_unshuffle(x: Tensor, factor: int) -> Tensor:
    """x (B, C, H, W) → (B, C·factor², H/factor, W/factor)."""
    return F.pixel_unshuffle(x, factor)
