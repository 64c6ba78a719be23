import numpy as np
import pytest
import torch

from models.restormer.network import TransposedAttention
from plugins import find
from plugins.testing import assert_close, export_graph, grafted, run_function
from plugins.transposed_attention.reference import transposed_attention

PLUGIN = find("transposed_attention")


def random_inputs(sizes, dtype):
    batch, channels, heads, height, width = sizes
    random = np.random.default_rng(0)
    return {
        "qkv": random.standard_normal((batch, 3 * channels, height, width)).astype(dtype),
        "temperature": random.uniform(0.5, 2, (heads, 1, 1)).astype(dtype),
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("sizes", [(1, 48, 1, 7, 9), (2, 6, 3, 1, 1), (1, 384, 8, 3, 2), (3, 16, 16, 5, 4)])
def test_function_is_the_reference(sizes, dtype):
    inputs = random_inputs(sizes, dtype)
    (actual,) = run_function(PLUGIN, inputs)
    assert_close(actual, transposed_attention(*(torch.from_numpy(values) for values in inputs.values())))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_zero_channels_stay_finite(dtype):
    """A channel of zeros has norm 0; torch in half precision gives NaN there, since 1e-12 rounds to 0."""
    inputs = random_inputs((1, 8, 2, 4, 4), dtype)
    inputs["qkv"][:, [0, 9, 17]] = 0  # one each of q, k and v
    (actual,) = run_function(PLUGIN, inputs)
    assert np.isfinite(actual).all()
    expected = transposed_attention(*(torch.from_numpy(values).float() for values in inputs.values()))
    assert_close(actual, expected.numpy().astype(dtype))


@pytest.mark.parametrize("heads", [1, 4])
def test_pattern_replaces_the_networks_attention(heads):
    torch.manual_seed(0)
    attention = TransposedAttention(16, heads, bias=False)
    torch.nn.init.uniform_(attention.temperature, 0.5, 2)
    graph = export_graph(attention, ("batch", 16, "h", "w"), {"batch": 2, "h": 6, "w": 10})
    (match,) = PLUGIN.pattern.matches(graph)
    assert match.inputs[1].shape == [heads, 1, 1]
    x = torch.randn(3, 16, 5, 7)
    (actual,) = grafted(graph, PLUGIN, [match]).run(None, {"x": x.numpy()})
    with torch.inference_mode():
        assert_close(actual, attention(x))


def test_pattern_refuses_attention_without_normalisation():
    class Plain(TransposedAttention):
        def forward(self, x):
            q, k, v = (part.flatten(2).unflatten(1, (2, -1)) for part in self.qkv(x).chunk(3, dim=1))
            y = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1) @ v
            return y.flatten(1, 2).unflatten(2, (4, 4))

    graph = export_graph(Plain(8, 2, bias=False), ("batch", 8, 4, 4), {"batch": 2})
    assert any(node.op == "Softmax" for node in graph.nodes)
    assert PLUGIN.pattern.matches(graph) == []
