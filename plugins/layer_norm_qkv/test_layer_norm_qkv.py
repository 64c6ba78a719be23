import math

import numpy as np
import pytest
import torch
from torch import nn

from plugins import find, kernels
from plugins.layer_norm_qkv.reference import layer_norm_qkv
from plugins.testing import assert_close, assert_replaces_in_trocr, export_graph, grafted, run_function

PLUGIN = find("layer_norm_qkv")
EPSILON = 1e-5


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("shape", "width"), [((1, 1, 64), 48), ((3, 1, 7), 5), ((2, 1, 256), 1)])
def test_function_is_the_reference(shape, width, dtype):
    random = np.random.default_rng(0)
    inputs = {
        "x": (3 * random.standard_normal(shape) + 1).astype(dtype),
        "gamma": random.standard_normal(shape[2]).astype(dtype),
        "beta": random.standard_normal(shape[2]).astype(dtype),
        "weight": (random.standard_normal((3 * width, shape[2])) / math.sqrt(shape[2])).astype(dtype),
        "bias": random.standard_normal(3 * width).astype(dtype),
    }
    actual = run_function(PLUGIN, inputs, outputs=4, epsilon=EPSILON)
    expected = layer_norm_qkv(*(torch.from_numpy(values) for values in inputs.values()), EPSILON)
    for values, reference in zip(actual, expected):
        assert_close(values, reference)


def test_pattern_replaces_those_of_trocr():
    matches = assert_replaces_in_trocr(PLUGIN, "step")
    assert [match.inputs[3].shape for match in matches] == [(576, 192), (576, 192)]


class Projections(nn.Module):
    """Linear layers of these widths behind a LayerNorm, for `tokens` tokens."""

    def __init__(self, widths=(20, 20, 20), tokens=1, activation=None, bias=True):
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.linears = nn.ModuleList(nn.Linear(12, width, bias=bias) for width in widths)
        self.tokens, self.activation = tokens, activation or nn.Identity()

    def forward(self, x):
        h = self.norm(x.repeat(1, self.tokens, 1))
        first, *others = (linear(h) for linear in self.linears)
        return torch.cat([self.activation(first), *(other.sin() for other in others), h], -1)


@pytest.mark.parametrize("bias", [True, False])
def test_pattern_keeps_the_order(bias):
    torch.manual_seed(0)
    module = Projections(bias=bias)
    graph = export_graph(module, ("batch", 1, 12), {"batch": 2})
    matches = PLUGIN.pattern.matches(graph)
    x = torch.randn(3, 1, 12)
    (actual,) = grafted(graph, PLUGIN, matches).run(None, {"x": x.numpy()})
    with torch.inference_mode():
        assert_close(actual, module(x))


@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 1), ({"tokens": 2}, 0), ({"widths": (20, 20)}, 0), ({"widths": (20, 20, 8)}, 0)]
    + [({"widths": (20, 20, 20, 20)}, 0), ({"activation": nn.ReLU()}, 0)],
    ids=str,
)
def test_pattern_takes_three_alike_of_one_token(options, count):
    graph = export_graph(Projections(**options), ("batch", 1, 12), {"batch": 2})
    assert [node.op for node in graph.nodes].count("LayerNormalization") == 1
    assert len(PLUGIN.pattern.matches(graph)) == count


def random_on_gpu(rows, inputs, width, dtype):
    torch.manual_seed(0)
    x = 3 * torch.randn(rows, inputs, device="cuda") + 10
    gamma, beta = (torch.randn(inputs, device="cuda").clamp(-1, 1) for _ in range(2))
    weight = torch.randn(3 * width, inputs, device="cuda") / math.sqrt(inputs)
    bias = torch.randn(3 * width, device="cuda")
    return [values.to(dtype) for values in (x, gamma, beta, weight, bias)]


def launch(x, gamma, beta, weight, bias):
    """The kernel's h and three parts; it writes nothing behind their ends, and the same in every run."""
    (rows, inputs), width = x.shape, len(weight) // 3

    def run():
        widths = (inputs, width, width, width)
        outputs = [kernels.poisoned(rows * size + 64, dtype=x.dtype) for size in widths]
        torch.cuda.synchronize()  # constants are read without waiting for the kernels that make them here
        sizes = (rows, inputs, width, EPSILON)
        kernels.launch("layer_norm_qkv", x.dtype, x, gamma, beta, weight, bias, *outputs, *sizes)
        assert all(output[rows * size :].isnan().all() for output, size in zip(outputs, widths))
        return [output[: rows * size].view(rows, size) for output, size in zip(outputs, widths)]

    first = run()
    with kernels.busy_memory():
        second = run()
    assert all(map(torch.equal, first, second))
    return first


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "inputs", "width"),
    [(1, 1, 1), (2, 7, 5), (3, 8, 9), (1, 40, 16), (9, 100, 33), (16, 256, 31), (5, 256, 256), (33, 384, 70)]
    + [(8, 256, 355), (9, 256, 400), (17, 512, 700), (12, 1024, 23), (40, 1024, 1001), (20, 1024, 1500)]
    + [(64, 520, 15), (65, 768, 33), (2, 1000, 710), (17, 1032, 24), (3, 4104, 20), (0, 64, 64)]
    + [(rows, 1024, 1024) for rows in (1, 4, 8, 32, 64, 65)],
)
def test_kernel_is_the_reference(rows, inputs, width, dtype):
    tensors = random_on_gpu(rows, inputs, width, dtype)
    for actual, expected in zip(launch(*tensors), layer_norm_qkv(*tensors, EPSILON)):
        kernels.assert_close(actual, expected)
