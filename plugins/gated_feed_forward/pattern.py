"""The second half of Restormer's transformer block: the gated feed-forward network, the norm before it and the residual
connection around it.

    x (B, C, H, W) ┬ NormPointwiseConv ─ z (B, 2·hidden, H, W) ─ GatedDepthwiseConv ─ PointwiseConvResidual ─ y
                   └─ residual ───────────────────────────────────────────────────────┘

See the patterns of these three.  Nobody else may use what lies between them.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from plugins.gated_depthwise_conv import pattern as gated_depthwise_conv
from plugins.matching import Match
from plugins.norm_pointwise_conv import pattern as norm_pointwise_conv
from plugins.pointwise_conv_residual import pattern as pointwise_conv_residual

OP = "GatedFeedForward"
FUSES = ("norm_pointwise_conv", "gated_depthwise_conv", "pointwise_conv_residual")
DEFAULT_IN = ("fp16",)  # TensorRT multiplies FP32 matrices faster
# No NEEDS_FP32: the parts say which of their nodes need it.


def by_output(matches: list[Match]) -> dict[int, Match]:
    return {id(match.outputs[0]): match for match in matches}


def matches(graph: gs.Graph) -> list[Match]:
    outputs = {id(tensor) for tensor in graph.outputs}
    gates = by_output(gated_depthwise_conv.matches(graph))
    norms = by_output(norm_pointwise_conv.matches(graph))
    found = []
    for sum_ in pointwise_conv_residual.matches(graph):
        gated, *out_parameters, residual = sum_.inputs
        gate = gates.get(id(gated))
        if gate is None:
            continue
        z, *gate_parameters = gate.inputs
        norm = norms.get(id(z))
        if norm is None or norm.inputs[0] is not residual:
            continue
        if {id(z), id(gated)} & outputs or len(z.outputs) > 1 or len(gated.outputs) > 1:
            continue
        found.append(
            Match(
                [*norm.inputs, *gate_parameters, *out_parameters],
                sum_.outputs,
                {**norm.attributes, **gate.attributes},
                (*norm.nodes, *gate.nodes, *sum_.nodes),
            )
        )
    return found
