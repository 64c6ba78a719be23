"""Restormer's transposed attention, the 1×1 convolution `project_out` and the residual connection behind it:

    qkv (B, 3·C, H, W) ─ TransposedAttention ─ Conv 1×1 ─ Add ─ y (B, C, H, W)
    residual (B, C, H, W) ─────────────────────────────────┘

See transposed_attention/pattern.py and pointwise_conv_residual/pattern.py for both.  Nobody else may use what lies
between them.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from plugins.matching import Constant, Match, Op, Value, find
from plugins.pointwise_conv_residual.pattern import adds_alike, convolved, weight_and_bias
from plugins.transposed_attention import pattern as transposed_attention

OP = "TransposedAttentionResidual"
FUSES = ("transposed_attention", "pointwise_conv_residual")
DEFAULT_IN = ()  # transposed_attention_block has its nodes
# No NEEDS_FP32: what needs it here is transposed_attention's, which says so, and the sum behind it does not.

attended, residual = transposed_attention.PATTERN, Value(rank=4)
weight, bias = Constant(), Constant()
conv = convolved(attended, weight, bias)
PATTERN = Op("Add", conv, residual, where=adds_alike)


def matches(graph: gs.Graph) -> list[Match]:
    outputs = {id(tensor) for tensor in graph.outputs}
    return [
        Match(
            [
                bound[transposed_attention.qkv],
                bound[transposed_attention.temperature],
                *weight_and_bias(bound, weight, bias),
                bound[residual],
            ],
            [bound[PATTERN]],
            {},
            bound.nodes,
        )
        for bound in find(graph, PATTERN)
        if not {id(bound[attended]), id(bound[conv])} & outputs
        and len(bound[attended].outputs) == 1
        and bound[weight].shape[0] == bound[weight].shape[1]
    ]
