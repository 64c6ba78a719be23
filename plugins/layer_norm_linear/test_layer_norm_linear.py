import math

import numpy as np
import pytest
import torch
from torch import nn

from plugins import find, kernels
from plugins.layer_norm_linear.reference import ACTIVATIONS, layer_norm_linear
from plugins.testing import assert_close, assert_replaces_in_trocr, export_graph, grafted, run_function

PLUGIN = find("layer_norm_linear")
EPSILON = 1e-5


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS.values())
@pytest.mark.parametrize(("shape", "outputs"), [((1, 1, 64), 48), ((3, 1, 7), 5), ((2, 1, 256), 1), ((1, 1, 1), 3)])
def test_function_is_the_reference(shape, outputs, activation, dtype):
    random = np.random.default_rng(0)
    inputs = {
        "x": (3 * random.standard_normal(shape) + 1).astype(dtype),
        "gamma": random.standard_normal(shape[2]).astype(dtype),
        "beta": random.standard_normal(shape[2]).astype(dtype),
        "weight": (random.standard_normal((outputs, shape[2])) / math.sqrt(shape[2])).astype(dtype),
        "bias": random.standard_normal(outputs).astype(dtype),
    }
    actual = run_function(PLUGIN, inputs, outputs=2, epsilon=EPSILON, activation=activation)
    expected = layer_norm_linear(*(torch.from_numpy(values) for values in inputs.values()), EPSILON, activation)
    for values, reference in zip(actual, expected):
        assert_close(values, reference)


def test_pattern_replaces_those_of_trocr():
    matches = assert_replaces_in_trocr(PLUGIN, "step")
    assert [match.attributes["activation"] for match in matches] == [0, ACTIVATIONS["gelu"]] * 2 + [0]
    assert matches[-1].inputs[3].shape == (439, 192)  # the vocabulary
    assert not matches[-1].inputs[4].values.any()  # has no bias


class Layers(nn.Module):
    """A LayerNorm and linear layers behind it, for `tokens` tokens."""

    def __init__(self, tokens=1, layers=1, bias=True, activation=None):
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.linears = nn.ModuleList(nn.Linear(12, 20, bias=bias) for _ in range(layers))
        self.tokens, self.activation = tokens, activation or nn.Identity()

    def forward(self, x):
        h = self.norm(x.repeat(1, self.tokens, 1))
        return sum(self.activation(linear(h)) for linear in self.linears) + h.sum()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("name", "activation"), [("none", nn.SiLU()), ("gelu", nn.GELU()), ("relu", nn.ReLU())])
def test_pattern_takes_bias_and_activation(name, activation, bias):
    torch.manual_seed(0)
    module = Layers(bias=bias, activation=activation)
    graph = export_graph(module, ("batch", 1, 12), {"batch": 2})
    (match,) = PLUGIN.pattern.matches(graph)
    assert match.attributes == {"epsilon": pytest.approx(EPSILON), "activation": ACTIVATIONS[name]}
    x = torch.randn(3, 1, 12)
    (actual,) = grafted(graph, PLUGIN, [match]).run(None, {"x": x.numpy()})
    with torch.inference_mode():
        assert_close(actual, module(x))


@pytest.mark.parametrize(("options", "count"), [({}, 1), ({"tokens": 2}, 0), ({"layers": 2}, 0), ({"layers": 3}, 0)])
def test_pattern_takes_one_layer_of_one_token(options, count):
    graph = export_graph(Layers(**options), ("batch", 1, 12), {"batch": 2})
    assert [node.op for node in graph.nodes].count("LayerNormalization") == 1
    assert len(PLUGIN.pattern.matches(graph)) == count


def random_on_gpu(rows, inputs, outputs, dtype):
    torch.manual_seed(0)
    x = 3 * torch.randn(rows, inputs, device="cuda") + 10
    gamma, beta = (torch.randn(inputs, device="cuda").clamp(-1, 1) for _ in range(2))
    weight = torch.randn(outputs, inputs, device="cuda") / math.sqrt(inputs)
    bias = torch.randn(outputs, device="cuda")
    return [values.to(dtype) for values in (x, gamma, beta, weight, bias)]


def launch(x, gamma, beta, weight, bias, activation):
    """The kernel's h and y; it writes nothing behind their ends, and the same in every run."""
    (rows, inputs), outputs = x.shape, len(weight)

    def run():
        h, y = (kernels.poisoned(rows * width + 64, dtype=x.dtype) for width in (inputs, outputs))
        torch.cuda.synchronize()  # constants are read without waiting for the kernels that make them here
        sizes = (rows, inputs, outputs, EPSILON, activation)
        kernels.launch("layer_norm_linear", x.dtype, x, gamma, beta, weight, bias, h, y, *sizes)
        assert h[rows * inputs :].isnan().all()
        assert y[rows * outputs :].isnan().all()
        return h[: rows * inputs].view(rows, inputs), y[: rows * outputs].view(rows, outputs)

    first = run()
    with kernels.busy_memory():
        second = run()
    assert all(map(torch.equal, first, second))
    return first


def check(tensors, activation):
    for actual, expected in zip(launch(*tensors, activation), layer_norm_linear(*tensors, EPSILON, activation)):
        kernels.assert_close(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS.values())
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(1, 1, 1), (2, 7, 5), (3, 8, 9), (1, 40, 16), (5, 64, 100), (8, 72, 130), (9, 100, 77), (16, 256, 31)]
    + [(17, 257, 40), (33, 384, 64), (7, 512, 1100), (64, 520, 48), (65, 768, 33), (2, 1000, 2120), (31, 1024, 65)]
    + [(8, 256, 1060), (9, 256, 1100), (16, 512, 2200), (8, 512, 2120), (17, 1024, 3001), (40, 1024, 70), (8, 1024, 33)]
    + [(6, 1032, 24), (12, 2048, 1090), (1, 2056, 8), (20, 4096, 16), (3, 4104, 20), (0, 64, 64)],
)
def test_kernel_is_the_reference(rows, inputs, outputs, activation, dtype):
    check(random_on_gpu(rows, inputs, outputs, dtype), activation)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [1, 4, 8, 32, 64, 65, 200])
@pytest.mark.parametrize(
    ("inputs", "outputs", "activation"),
    [(1024, 1024, "none"), (1024, 4096, "gelu"), (1024, 50265, "none"), (256, 256, "none"), (256, 1024, "relu")]
    + [(256, 64044, "none")],
)
def test_kernel_is_the_reference_at_trocrs_sizes(rows, inputs, outputs, activation, dtype):
    check(random_on_gpu(rows, inputs, outputs, dtype), ACTIVATIONS[activation])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [5, 11])
@pytest.mark.parametrize("inputs", [3, 64, 256, 1000, 1024])
def test_kernel_on_constant_and_on_large_values(inputs, rows, dtype):
    x, *parameters = random_on_gpu(rows, inputs, 40, dtype)
    for case in (0 * x, 0 * x + 7, 0 * x + 30000):
        # The mean of equal values must be exact, as PyTorch's is on the CPU: epsilon is small.
        actual = launch(case, *parameters, ACTIVATIONS["gelu"])
        assert torch.equal(actual[0], parameters[1].expand_as(x))
        on_cpu = (values.cpu() for values in (case, *parameters))
        for values, expected in zip(actual, layer_norm_linear(*on_cpu, EPSILON, ACTIVATIONS["gelu"])):
            kernels.assert_close(values.cpu(), expected)
    check([60000 * (torch.rand_like(x) - 0.5), *parameters], ACTIVATIONS["gelu"])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("inputs", [256, 1024])
def test_kernel_on_a_first_value_far_off(inputs, rows):
    """Deviations are from that value."""
    x, *parameters = random_on_gpu(rows, inputs, 40, torch.float16)
    for value in (-3000, 60000):
        x[:, 0] = value
        check([x, *parameters], ACTIVATIONS["none"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "row", "column"), [(20, 11, 5), (8, 7, 1023), (40, 32, 0)])
def test_kernel_mixes_no_rows(rows, row, column, dtype):
    """NaN in one row stays there."""
    tensors = random_on_gpu(rows, 1024, 50, dtype)
    expected = launch(*tensors, ACTIVATIONS["none"])
    tensors[0][row, column] = torch.nan
    for actual, reference in zip(launch_with_nan(tensors), expected):
        assert actual[row].isnan().all()
        others = torch.arange(rows, device="cuda") != row
        assert torch.equal(actual[others], reference[others])


def launch_with_nan(tensors):
    x, weight = tensors[0], tensors[3]
    h, y = torch.empty_like(x), x.new_empty(len(x), len(weight))
    torch.cuda.synchronize()
    sizes = (*x.shape, len(weight), EPSILON, ACTIVATIONS["none"])
    kernels.launch("layer_norm_linear", x.dtype, *tensors, h, y, *sizes)
    return h, y


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [4, 20])
def test_kernels_that_follow_each_other_wait(rows):
    """Each takes what the one before it has just written, and writes where the one before that has read."""
    torch.manual_seed(0)
    width, layers = 1024, 48
    x, gamma, beta, weight, bias = random_on_gpu(rows, width, width, torch.float16)
    weights = [weight.roll(shift, 0) for shift in range(layers)]
    expected = x.clone()
    for factors in weights:
        _, expected = layer_norm_linear(expected, gamma, beta, factors, bias, EPSILON, ACTIVATIONS["none"])
    buffers, h = (x.clone(), torch.empty_like(x)), torch.empty_like(x)
    torch.cuda.synchronize()
    for index, factors in enumerate(weights):
        source, target = buffers[index % 2], buffers[1 - index % 2]
        sizes = (rows, width, width, EPSILON, ACTIVATIONS["none"])
        kernels.launch("layer_norm_linear", x.dtype, source, gamma, beta, factors, bias, h, target, *sizes)
    torch.cuda.synchronize()
    error = (buffers[layers % 2].double() - expected.double()).abs().max()
    assert error <= 0.05 * expected.abs().max()  # each layer rounds anew


@pytest.mark.gpu
def test_kernel_refuses_an_unknown_activation():
    tensors = random_on_gpu(1, 8, 8, torch.float32)
    with pytest.raises(RuntimeError):
        launch(*tensors, 3)
