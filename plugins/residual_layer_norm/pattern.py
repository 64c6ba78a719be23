"""A residual connection and the LayerNorm behind it:

    x ───────┐
    residual ┴ Add ─┬─ LayerNormalization ─ y
                    └─ sum                          what the next residual connection takes

Both operands of the Add have one shape; an Add of a constant or a broadcast one (position embeddings) is no residual.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from plugins.matching import Constant, Match, Op, Value, find

OP = "ResidualLayerNorm"
DEFAULT_IN = ("fp16",)  # in FP32 TensorRT's own layers are 2 to 13 % faster, see docs/trocr-tuning.md


def adds_alike(node: gs.Node) -> bool:
    first, second = node.inputs
    return isinstance(first, gs.Variable) and isinstance(second, gs.Variable) and first.shape == second.shape


def over_last(node: gs.Node) -> bool:
    return node.attrs.get("axis", -1) in (-1, len(node.inputs[0].shape) - 1)


x, residual = Value(), Value()
weight, bias = Constant(), Constant()
total = Op("Add", x, residual, where=adds_alike)
PATTERN = Op("LayerNormalization", total, weight, bias, where=over_last)


def matches(graph: gs.Graph) -> list[Match]:
    found = []
    for bound in find(graph, PATTERN):
        norm = bound.nodes[0]
        inputs = [bound[x], bound[residual], bound[weight], bound[bias]]
        attributes = {"epsilon": norm.attrs.get("epsilon", 1e-5)}
        found.append(Match(inputs, [bound[total], bound[PATTERN]], attributes, bound.nodes))
    return found
