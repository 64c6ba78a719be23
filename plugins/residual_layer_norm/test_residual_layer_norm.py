import numpy as np
import pytest
import torch

from plugins import find
from plugins.residual_layer_norm.reference import residual_layer_norm
from plugins.testing import assert_close, assert_replaces_in_trocr, export_graph, run_function

PLUGIN = find("residual_layer_norm")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1024), (2, 577, 48), (3, 7, 5), (1, 1, 1)])
def test_function_is_the_reference(shape, dtype):
    random = np.random.default_rng(0)
    inputs = {name: random.standard_normal(shape).astype(dtype) for name in ("x", "residual")}
    inputs |= {name: random.standard_normal(shape[-1]).astype(dtype) for name in ("weight", "bias")}
    total, y = run_function(PLUGIN, inputs, outputs=2, epsilon=1e-5)
    x, residual, weight, bias = (torch.from_numpy(values) for values in inputs.values())
    expected = residual_layer_norm(x, residual, weight, bias, 1e-5)
    assert_close(total, expected[0])
    assert_close(y, expected[1])


@pytest.mark.parametrize("part", ["encoder", "step"])
def test_pattern_replaces_those_of_trocr(part):
    matches = assert_replaces_in_trocr(PLUGIN, part)
    assert all(match.attributes["epsilon"] == pytest.approx(1e-12 if part == "encoder" else 1e-5) for match in matches)


class Sum(torch.nn.Module):
    """LayerNorm of x plus something."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.norm = shape, torch.nn.LayerNorm(8)
        self.embedding = torch.nn.Parameter(torch.randn(6, 8))

    def forward(self, x):
        return self.norm(x + {"constant": self.embedding, "broadcast": x[:1].cos(), "alike": x.cos()}[self.shape])


@pytest.mark.parametrize(("kind", "count"), [("constant", 0), ("broadcast", 0), ("alike", 1)])
def test_only_sums_of_two_tensors_of_one_shape_are_residuals(kind, count):
    graph = export_graph(Sum(kind), ("batch", 6, 8), {"batch": 2})
    assert [node.op for node in graph.nodes].count("LayerNormalization") == 1
    assert len(PLUGIN.pattern.matches(graph)) == count
