"""GatedDepthwiseConv: depthwise 3×3 convolution, then GELU of one half times the other (Restormer, section 3.2).

z = conv(x);  y = gelu(z[:, :C]) · z[:, C:]      with zero padding and the exact, erf-based GELU
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

FUNCTION = """
<domain: "trt_graft", opset_import: ["" : 17]>
GatedDepthwiseConv <channels, plugin_version, plugin_namespace> (x, weight, bias) => (y) {
    x32 = Cast <to = 1> (x)
    weight32 = Cast <to = 1> (weight)
    bias32 = Cast <to = 1> (bias)
    z = Conv <group: int = @channels, kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x32, weight32, bias32)
    gate, value = Split <axis = 1> (z)
    half = Constant <value_float = 0.5> ()
    one = Constant <value_float = 1.0> ()
    root_of_two = Constant <value_float = 1.4142135623730951> ()
    scaled = Div (gate, root_of_two)
    erf = Erf (scaled)
    shifted = Add (erf, one)
    share = Mul (half, shifted)
    gelu = Mul (gate, share)
    y32 = Mul (gelu, value)
    y = CastLike (y32, x)
}
"""


def gated_depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (B, 2·C, H, W), weight (2·C, 1, 3, 3), bias (2·C,) → (B, C, H, W) in x's type, computed in FP32."""
    z = F.conv2d(x.float(), weight.float(), bias.float(), padding=1, groups=len(weight))
    gate, value = z.chunk(2, dim=1)
    return (F.gelu(gate) * value).to(x.dtype)
