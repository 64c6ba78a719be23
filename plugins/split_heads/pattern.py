"""Keys or values that are kept, by heads:

    x (B, T, heads·head_dim) ─ Reshape ─ Transpose ─ y (B, heads, T, head_dim)

Only where y is what the graph hands on, as a decoder's prefill does.  Heads that attention reads at once are part of
encoder_attention, and where that is left out, of what TensorRT makes of attention.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from plugins.matching import Match, Op, Value, find

OP = "SplitHeads"


def splits_last(node: gs.Node) -> bool:
    """A Reshape that leaves images and tokens as they are."""
    before, after = node.inputs[0].shape, node.outputs[0].shape
    return before is not None and after is not None and list(before[:2]) == list(after[:2])


def hands_on_heads_first(node: gs.Node) -> bool:
    return node.attrs.get("perm") == [0, 2, 1, 3] and not node.outputs[0].outputs


x = Value(rank=3)
split = Op("Reshape", x, Value(), rank=4, where=splits_last)
PATTERN = Op("Transpose", split, where=hands_on_heads_first)


def matches(graph: gs.Graph) -> list[Match]:
    return [
        Match([bound[x]], [bound[PATTERN]], {"heads": bound[split].shape[2]}, bound.nodes)
        for bound in find(graph, PATTERN)
    ]
