"""PixelShuffle, which the exporter writes as one node:  x (B, C·r², H, W) ─ DepthToSpace (CRD) ─ y (B, C, H·r, W·r)"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from plugins.matching import Match, Op, Value, find

OP = "PixelShuffle"
DEFAULT_IN = ("fp16",)  # TensorRT's FP32 images have channels first, see depthwise_conv


def channels_first(node: gs.Node) -> bool:
    return node.attrs.get("mode") == "CRD"


x = Value(rank=4)
PATTERN = Op("DepthToSpace", x, where=channels_first)


def matches(graph: gs.Graph) -> list[Match]:
    return [
        Match([bound[x]], [bound[PATTERN]], {"factor": bound.nodes[0].attrs["blocksize"]}, bound.nodes)
        for bound in find(graph, PATTERN)
    ]
