"""PixelShuffle: spreads channels, ordered (channel, row, column), over factor × factor blocks of pixels
(Shi et al., CVPR 2016)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

FUNCTION = """
<domain: "trt_graft", opset_import: ["" : 17]>
PixelShuffle <factor, plugin_version, plugin_namespace> (x) => (y) {
    y = DepthToSpace <blocksize: int = @factor, mode = "CRD"> (x)
}
"""


def pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    """x (B, C·factor², H, W) → (B, C, H·factor, W·factor)."""
    return F.pixel_shuffle(x, factor)
