import numpy as np
import pytest
import torch

from plugins import find, kernels
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
    assert all(match.attributes["epsilon"] == pytest.approx(1e-5) for match in matches)


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


def launch(x, residual, weight, bias, epsilon, total=None):
    """The kernel's sum, written to `total` if given, and y."""
    total = kernels.poisoned(*x.shape, dtype=x.dtype) if total is None else total
    y = kernels.poisoned(*x.shape, dtype=x.dtype)
    rows, dim = x.shape
    kernels.launch("residual_layer_norm", x.dtype, x, residual, weight, bias, total, y, rows, dim, epsilon)
    return total, y


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (7, 5), (3, 255), (2, 260), (1, 1024), (32, 768), (5, 1025), (577, 384), (3, 2047), (9, 2048)]
    + [(32 * 577, 768), (32 * 577, 1024)],
)
def test_kernel_is_the_reference(shape, dtype):
    torch.manual_seed(0)
    x = (3 * torch.randn(shape, device="cuda") + 100).to(dtype)  # a mean that dwarfs the deviation
    residual = torch.randn(shape, device="cuda").to(dtype)
    weight, bias = (torch.randn(shape[1], device="cuda").to(dtype) for _ in range(2))
    total, y = launch(x, residual, weight, bias, 1e-5)
    expected = residual_layer_norm(x, residual, weight, bias, 1e-5)
    assert torch.equal(total, expected[0])  # one addition, rounded once
    kernels.assert_close(y, expected[1])
    with kernels.busy_memory():
        assert torch.equal(y, launch(x, residual, weight, bias, 1e-5)[1])
    in_place, y_in_place = launch(x, residual, weight, bias, 1e-5, total=x)
    assert torch.equal(in_place, total)
    assert torch.equal(y_in_place, y)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernel_takes_the_statistics_of_the_unrounded_sum(dtype):
    torch.manual_seed(0)
    x, residual = ((4e4 + 1e4 * torch.rand(3, 384, device="cuda")).to(dtype) for _ in range(2))
    ones = torch.ones(384, dtype=dtype, device="cuda")
    total, y = launch(x, residual, ones, 0 * ones, 1e-12)
    expected = residual_layer_norm(x, residual, ones, 0 * ones, 1e-12)
    assert total.isinf().all() == (dtype == torch.float16)
    assert torch.equal(total, expected[0])
    kernels.assert_close(y, expected[1])


@pytest.mark.gpu
def test_kernel_refuses_rows_that_do_not_fit_registers_and_takes_none():
    long, empty = torch.zeros(1, 2049, device="cuda"), torch.zeros(0, 8, device="cuda")
    with pytest.raises(RuntimeError):
        launch(long, long, long[0], long[0], 1e-5)
    launch(empty, empty, long, long, 1e-5)
