"""PixelUnshuffle, as the exporter writes it:

    x (B, C, H, W) ─ Reshape ─ (B, C, H/r, r, W/r, r) ─ Transpose ─ Reshape ─ y (B, C·r², H/r, W/r)

The six-dimensional Transpose is the anchor; more Reshapes may stand before and behind it.
"""

from __future__ import annotations

import math

import onnx_graphsurgeon as gs

from plugins.matching import Match, Op, Reshaped, Value, find

OP = "PixelUnshuffle"
DEFAULT_IN = ("fp16",)  # TensorRT's FP32 images have channels first, see depthwise_conv


def moves_blocks_to_channels(node: gs.Node) -> bool:
    return node.attrs["perm"] == [0, 1, 3, 5, 2, 4]


x = Value(rank=4)
PATTERN = Reshaped(Op("Transpose", Reshaped(x, rank=6, longest=True), where=moves_blocks_to_channels), rank=4)


def matches(graph: gs.Graph) -> list[Match]:
    found = []
    for bound in find(graph, PATTERN):
        # exporters compute the 6-D shape at run time; the channel counts, which are known, tell the factor
        before, after = bound[x].shape[1], bound[PATTERN].shape[1]
        found.append(Match([bound[x]], [bound[PATTERN]], {"factor": math.isqrt(after // before)}, bound.nodes))
    return found
