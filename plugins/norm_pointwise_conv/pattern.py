"""The channel LayerNorm of Restormer and the 1×1 convolution behind it: qkv in attention, project_in in the
feed-forward network.

    x (B, C, H, W) ─ ChannelLayerNorm ─ Conv 1×1 ─ y (B, N, H, W)

See channel_layer_norm/pattern.py for the norm as the exporter writes it, with bias and BiasFree.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from plugins.channel_layer_norm import pattern as channel_layer_norm
from plugins.matching import Constant, Either, Match, Op, Value, find, scalar
from plugins.pointwise_conv_residual.pattern import is_pointwise, weight_and_bias

OP = "NormPointwiseConv"
FUSES = ("channel_layer_norm",)
NEEDS_FP32 = True  # the norm
DEFAULT_IN = ()  # transposed_attention_block and gated_feed_forward have its nodes

weight, bias = Constant(), Constant()


def convolved(norm: Value) -> Value:
    return Either(Op("Conv", norm, weight, bias, where=is_pointwise), Op("Conv", norm, weight, where=is_pointwise))


WITH_BIAS = convolved(channel_layer_norm.WITH_BIAS)
BIAS_FREE = convolved(channel_layer_norm.BIAS_FREE)


def matches(graph: gs.Graph) -> list[Match]:
    found = []
    for pattern in (WITH_BIAS, BIAS_FREE):
        for bound in find(graph, pattern):
            gamma = bound[channel_layer_norm.weight]
            no_bias = gs.Constant(f"{gamma.name}.no_bias", np.zeros_like(gamma.values))
            beta = bound.get(channel_layer_norm.bias, no_bias)
            epsilon = scalar(bound[channel_layer_norm.epsilon])
            attributes = {"epsilon": epsilon, "subtract_mean": int(pattern is WITH_BIAS)}
            inputs = [bound[channel_layer_norm.x], gamma, beta, *weight_and_bias(bound, weight, bias)]
            found.append(Match(inputs, [bound[pattern]], attributes, bound.nodes))
    return found
