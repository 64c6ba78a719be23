"""The first half of Restormer's transformer block: attention, the norm before it and the residual connection around it.

    x (B, C, H, W) ┬ NormPointwiseConv ─ qkv (B, 3·C, H, W) ─ DepthwiseConv ─ TransposedAttentionResidual ─ y
                   └─ residual ──────────────────────────────────────────────┘

See the patterns of these three.  Nobody else may use what lies between them.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from plugins.depthwise_conv import pattern as depthwise_conv
from plugins.matching import Match
from plugins.norm_pointwise_conv import pattern as norm_pointwise_conv
from plugins.transposed_attention_residual import pattern as transposed_attention_residual

OP = "TransposedAttentionBlock"
FUSES = ("norm_pointwise_conv", "depthwise_conv", "transposed_attention_residual")
DEFAULT_IN = ("fp16",)  # TensorRT multiplies FP32 matrices faster
# No NEEDS_FP32: the parts say which of their nodes need it.


def by_output(matches: list[Match]) -> dict[int, Match]:
    return {id(match.outputs[0]): match for match in matches}


def matches(graph: gs.Graph) -> list[Match]:
    outputs = {id(tensor) for tensor in graph.outputs}
    convolutions = by_output(depthwise_conv.matches(graph))
    norms = by_output(norm_pointwise_conv.matches(graph))
    found = []
    for attention in transposed_attention_residual.matches(graph):
        qkv, *attention_inputs, residual = attention.inputs
        convolution = convolutions.get(id(qkv))
        if convolution is None:
            continue
        z, *convolution_inputs = convolution.inputs
        norm = norms.get(id(z))
        if norm is None or norm.inputs[0] is not residual:
            continue
        if {id(z), id(qkv)} & outputs or len(z.outputs) > 1 or len(qkv.outputs) > 1:
            continue
        found.append(
            Match(
                [*norm.inputs, *convolution_inputs, *attention_inputs],
                attention.outputs,
                {**norm.attributes, **convolution.attributes},
                (*norm.nodes, *convolution.nodes, *attention.nodes),
            )
        )
    return found
