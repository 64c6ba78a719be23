import numpy as np
import pytest
import torch

from plugins import find
from plugins.encoder_attention.reference import encoder_attention
from plugins.testing import assert_close, assert_replaces_in_trocr, export_graph, run_function

PLUGIN = find("encoder_attention")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("sizes", [(1, 577, 2, 64), (2, 1, 1, 8), (3, 33, 16, 4), (1, 5, 3, 1)])
def test_function_is_the_reference(sizes, dtype):
    batch, tokens, heads, head_dim = sizes
    random = np.random.default_rng(0)
    inputs = {name: random.standard_normal((batch, tokens, heads * head_dim)).astype(dtype) for name in "qkv"}
    (actual,) = run_function(PLUGIN, inputs, heads=heads, scale=head_dim**-0.5)
    q, k, v = (torch.from_numpy(values) for values in inputs.values())
    assert_close(actual, encoder_attention(q, k, v, heads, head_dim**-0.5))


def test_scores_beyond_fp16_stay_finite():
    x = np.full((1, 3, 64), 200, np.float16)  # q · kᵀ is 2.6 million
    (actual,) = run_function(PLUGIN, {"q": x, "k": x, "v": x}, heads=1, scale=0.125)
    assert_close(actual, x)


def test_pattern_replaces_those_of_trocr():
    matches = assert_replaces_in_trocr(PLUGIN, "encoder")
    assert all(match.attributes == {"heads": 4, "scale": pytest.approx(0.25)} for match in matches)


def test_pattern_refuses_attention_with_a_mask():
    class Masked(torch.nn.Module):
        def forward(self, x):
            q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in (x, x + 1, x + 2))
            scores = q @ k.transpose(2, 3) * 0.5 + torch.ones(6, 6).triu(1) * -1e4
            return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    graph = export_graph(Masked(), ("batch", 6, 8), {"batch": 2})
    assert any(node.op == "Softmax" for node in graph.nodes)
    assert PLUGIN.pattern.matches(graph) == []
