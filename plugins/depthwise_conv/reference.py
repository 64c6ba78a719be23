"""DepthwiseConv: 3×3 convolution of each channel by itself, with zeros around the image.

y[b, c, h, w] = Σᵢⱼ weight[c, 0, i, j] · x[b, c, h + i − 1, w + j − 1] + bias[c]
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

FUNCTION = """
<domain: "trt_graft", opset_import: ["" : 17]>
DepthwiseConv <channels, plugin_version, plugin_namespace> (x, weight, bias) => (y) {
    x32 = Cast <to = 1> (x)
    weight32 = Cast <to = 1> (weight)
    bias32 = Cast <to = 1> (bias)
    y32 = Conv <group: int = @channels, kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x32, weight32, bias32)
    y = CastLike (y32, x)
}
"""


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (B, C, H, W), weight (C, 1, 3, 3), bias (C,) → (B, C, H, W) in x's type, computed in FP32."""
    return F.conv2d(x.float(), weight.float(), bias.float(), padding=1, groups=len(weight)).to(x.dtype)
