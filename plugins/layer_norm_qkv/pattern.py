"""A LayerNorm of one new token for each row, and the three linear layers behind it that make queries, keys and values:

    x (B, 1, K) ─ LayerNormalization ─┬─ MatMul ─ (+ bias) ─ y0 (B, 1, N)
                                      ├─ MatMul ─ (+ bias) ─ y1 (B, 1, N)
                                      ├─ MatMul ─ (+ bias) ─ y2 (B, 1, N)
                                      └─ h (B, 1, K)        what the residual connection takes

They become one, in the order of the graph.  Only where the tokens of a row are one, see linear_residual/pattern.py.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from plugins.layer_norm_linear.pattern import (
    PATTERN,
    activation,
    beta,
    bias,
    epsilon,
    gamma,
    linear_layers,
    norm,
    weight,
    x,
)
from plugins.layer_norm_linear.reference import ACTIVATIONS
from plugins.linear_residual.pattern import weight_and_bias
from plugins.matching import Match

OP = "LayerNormQkv"
FUSES = ("residual_layer_norm",)  # its norm
DEFAULT_IN = ("fp16",)  # TensorRT multiplies FP32 matrices faster


def matches(graph: gs.Graph) -> list[Match]:
    found = []
    for layers in linear_layers(graph):
        first = layers[0]
        widths = {bound[weight].shape[1] for bound in layers}
        if len(layers) != 3 or len(widths) > 1 or any(activation(bound) != ACTIVATIONS["none"] for bound in layers):
            continue
        constants = [
            gs.Constant(parts[0].name, np.concatenate([part.values for part in parts]))
            for parts in zip(*(weight_and_bias(bound, weight, bias) for bound in layers))
        ]
        inputs = [first[x], first[gamma], first[beta], *constants]
        outputs = [first[norm], *(bound[PATTERN] for bound in layers)]
        nodes = {id(node): node for bound in layers for node in bound.nodes}
        found.append(Match(inputs, outputs, {"epsilon": epsilon(first)}, list(nodes.values())))
    return found
