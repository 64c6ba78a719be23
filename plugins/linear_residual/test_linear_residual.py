import math

import numpy as np
import pytest
import torch
from torch import nn

from plugins import find, kernels
from plugins.linear_residual.reference import linear_residual
from plugins.testing import assert_close, assert_replaces_in_trocr, export_graph, grafted, run_function

PLUGIN = find("linear_residual")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("shape", "outputs"), [((1, 1, 64), 48), ((3, 1, 7), 5), ((2, 1, 256), 1), ((1, 1, 1), 3)])
def test_function_is_the_reference(shape, outputs, dtype):
    random = np.random.default_rng(0)
    inputs = {
        "x": random.standard_normal(shape).astype(dtype),
        "weight": (random.standard_normal((outputs, shape[2])) / math.sqrt(shape[2])).astype(dtype),
        "bias": random.standard_normal(outputs).astype(dtype),
        "residual": random.standard_normal((*shape[:2], outputs)).astype(dtype),
    }
    (actual,) = run_function(PLUGIN, inputs)
    assert_close(actual, linear_residual(*(torch.from_numpy(values) for values in inputs.values())))


def test_pattern_replaces_those_of_trocr():
    matches = assert_replaces_in_trocr(PLUGIN, "step")
    assert [match.inputs[1].shape for match in matches] == [(192, 192), (192, 192), (192, 512)] * 2


class Residual(nn.Module):
    """The pattern, and variants of it."""

    def __init__(self, outputs=12, tokens=1, bias=True, swapped=False):
        super().__init__()
        self.linear = nn.Linear(12, outputs, bias=bias)
        self.tokens, self.swapped = tokens, swapped

    def forward(self, x):
        x = x.repeat(1, self.tokens, 1)
        z = self.linear(x.cos())
        return z + x.sin() if self.swapped else x.sin() + z


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("swapped", [True, False])
def test_pattern_takes_the_operands_in_both_orders(swapped, bias):
    torch.manual_seed(0)
    module = Residual(swapped=swapped, bias=bias)
    graph = export_graph(module, ("batch", 1, 12), {"batch": 2})
    (match,) = PLUGIN.pattern.matches(graph)
    assert [match.inputs[index].inputs[0].op for index in (0, 3)] == ["Cos", "Sin"]
    x = torch.randn(3, 1, 12)
    (actual,) = grafted(graph, PLUGIN, [match]).run(None, {"x": x.numpy()})
    with torch.inference_mode():
        assert_close(actual, module(x))


@pytest.mark.parametrize("options", [{"tokens": 2}, {"outputs": 1}], ids=str)
def test_pattern_refuses_what_it_does_not_compute(options):
    graph = export_graph(Residual(**options), ("batch", 1, 12), {"batch": 2})
    assert any(node.op == "MatMul" for node in graph.nodes)
    assert PLUGIN.pattern.matches(graph) == []


def random_on_gpu(rows, inputs, outputs, dtype):
    torch.manual_seed(0)
    x = torch.randn(rows, inputs, device="cuda")
    weight = torch.randn(outputs, inputs, device="cuda") / math.sqrt(inputs)
    bias = torch.randn(outputs, device="cuda")
    residual = torch.randn(rows, outputs, device="cuda")
    return [values.to(dtype) for values in (x, weight, bias, residual)]


def launch(x, weight, bias, residual):
    """The kernel's y; it writes nothing behind its end, and the same in every run."""
    (rows, inputs), outputs = x.shape, len(weight)

    def run():
        y = kernels.poisoned(rows * outputs + 64, dtype=x.dtype)
        torch.cuda.synchronize()  # constants are read without waiting for the kernels that make them here
        kernels.launch("linear_residual", x.dtype, x, weight, bias, residual, y, rows, inputs, outputs)
        assert y[rows * outputs :].isnan().all()
        return y[: rows * outputs].view(rows, outputs)

    y = run()
    with kernels.busy_memory():
        assert torch.equal(y, run())
    return y


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(1, 1, 1), (2, 7, 5), (3, 8, 9), (1, 40, 16), (5, 64, 100), (8, 72, 130), (9, 100, 77), (16, 256, 31)]
    + [(17, 257, 40), (33, 384, 64), (7, 512, 1100), (64, 520, 48), (65, 768, 33), (2, 1000, 2120), (31, 1024, 65)]
    + [(8, 256, 1060), (9, 256, 1100), (16, 512, 2200), (8, 512, 2120), (17, 1024, 3001), (40, 1024, 70), (8, 1024, 33)]
    + [(8, 4096, 70), (9, 4096, 70), (33, 4096, 129), (65, 4096, 1030)]
    + [(6, 1032, 24), (12, 2048, 1090), (1, 2056, 8), (20, 4096, 16), (200, 4096, 9), (3, 4104, 20), (0, 64, 64)],
)
def test_kernel_is_the_reference(rows, inputs, outputs, dtype):
    tensors = random_on_gpu(rows, inputs, outputs, dtype)
    kernels.assert_close(launch(*tensors), linear_residual(*tensors))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [1, 4, 8, 32, 64, 65])
@pytest.mark.parametrize(("inputs", "outputs"), [(1024, 1024), (4096, 1024), (256, 256), (1024, 256)])
def test_kernel_is_the_reference_at_trocrs_sizes(rows, inputs, outputs, dtype):
    tensors = random_on_gpu(rows, inputs, outputs, dtype)
    kernels.assert_close(launch(*tensors), linear_residual(*tensors))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("inputs", [5, 64, 1024])
def test_kernel_on_zero_and_large_values(inputs, dtype):
    x, weight, bias, residual = random_on_gpu(6, inputs, 50, dtype)
    large = 10000 * residual.clamp(-3, 3)
    for case, added in ((0 * x, residual), (0 * x + 7, 0 * residual), (x, large), (1000 * x, large)):
        tensors = (case, weight, bias, added)
        kernels.assert_close(launch(*tensors), linear_residual(*tensors))
