import math

import numpy as np
import pytest
import torch
from torch import nn

from plugins import find, kernels
from plugins.layer_norm_linear.reference import ACTIVATIONS
from plugins.linear.reference import linear
from plugins.testing import assert_close, assert_replaces_in_trocr, export_graph, grafted, run_function

PLUGIN = find("linear")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS.values())
@pytest.mark.parametrize(("shape", "outputs"), [((1, 2, 64), 48), ((3, 5, 7), 5), ((2, 1, 256), 1), ((1, 9, 1), 3)])
def test_function_is_the_reference(shape, outputs, activation, dtype):
    random = np.random.default_rng(0)
    inputs = {
        "x": random.standard_normal(shape).astype(dtype),
        "weight": (random.standard_normal((outputs, shape[2])) / math.sqrt(shape[2])).astype(dtype),
        "bias": random.standard_normal(outputs).astype(dtype),
    }
    (actual,) = run_function(PLUGIN, inputs, activation=activation)
    assert_close(actual, linear(*(torch.from_numpy(values) for values in inputs.values()), activation))


def test_pattern_replaces_those_of_trocr():
    matches = assert_replaces_in_trocr(PLUGIN, "encoder")
    activations = [match.attributes["activation"] for match in matches]
    assert activations == [0, 0, 0, 0, ACTIVATIONS["gelu"], 0] * (len(matches) // 6)
    matches = assert_replaces_in_trocr(PLUGIN, "prefill")
    assert not any(match.attributes["activation"] for match in matches)


class Layers(nn.Module):
    """A linear layer of `tokens` tokens, and something behind it."""

    def __init__(self, tokens=5, bias=True, activation=None):
        super().__init__()
        self.linear = nn.Linear(12, 20, bias=bias)
        self.tokens, self.activation = tokens, activation or nn.Identity()

    def forward(self, x):
        return self.activation(self.linear(x.repeat(1, self.tokens, 1))) + x.sum()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("name", "activation"), [("none", nn.SiLU()), ("gelu", nn.GELU()), ("relu", nn.ReLU())])
def test_pattern_takes_bias_and_activation(name, activation, bias):
    torch.manual_seed(0)
    module = Layers(bias=bias, activation=activation)
    graph = export_graph(module, ("batch", 1, 12), {"batch": 2})
    (match,) = PLUGIN.pattern.matches(graph)
    assert match.attributes == {"activation": ACTIVATIONS[name]}
    x = torch.randn(3, 1, 12)
    (actual,) = grafted(graph, PLUGIN, [match]).run(None, {"x": x.numpy()})
    with torch.inference_mode():
        assert_close(actual, module(x))


def test_pattern_leaves_layers_of_one_token():
    graph = export_graph(Layers(tokens=1), ("batch", 1, 12), {"batch": 2})
    assert "MatMul" in [node.op for node in graph.nodes]
    assert not PLUGIN.pattern.matches(graph)


def test_pattern_leaves_products_of_two_activations():
    class Product(nn.Module):
        def forward(self, x):
            return x @ x.transpose(1, 2) @ x

    assert not PLUGIN.pattern.matches(export_graph(Product(), ("batch", 6, 12), {"batch": 2}))


def random_on_gpu(rows, inputs, outputs, dtype):
    torch.manual_seed(0)
    x = torch.randn(rows, inputs, device="cuda")
    weight = torch.randn(outputs, inputs, device="cuda") / math.sqrt(inputs)
    bias = torch.randn(outputs, device="cuda")
    return [values.to(dtype) for values in (x, weight, bias)]


def launch(x, weight, bias, activation):
    """The kernel's y; it writes nothing behind its end, and the same in every run."""
    (rows, inputs), outputs = x.shape, len(weight)

    def run():
        y = kernels.poisoned(rows * outputs + 64, dtype=x.dtype)
        kernels.launch("linear", x.dtype, x, weight, bias, y, rows, inputs, outputs, activation)
        assert y[rows * outputs :].isnan().all()
        return y[: rows * outputs].view(rows, outputs)

    first = run()
    with kernels.busy_memory():
        second = run()
    assert torch.equal(first.nan_to_num(7), second.nan_to_num(7))
    return first


def check(tensors, activation):
    kernels.assert_close(launch(*tensors, activation), linear(*tensors, activation))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS.values())
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(1, 1, 1), (5, 7, 3), (0, 16, 16), (2, 8, 8), (5, 8, 9), (63, 16, 24), (64, 40, 64), (65, 31, 65), (70, 33, 66)]
    + [
        (3, 0, 8),
        (129, 64, 72),
        (130, 72, 200),
        (300, 100, 250),
        (257, 96, 77),
        (577, 104, 136),
        (1, 768, 50),
        (5, 3072, 64),
    ],
)
def test_kernel_is_the_reference(rows, inputs, outputs, activation, dtype):
    check(random_on_gpu(rows, inputs, outputs, dtype), activation)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [1, 5, 577, 1154, 4616, 18464, 36928])
@pytest.mark.parametrize(
    ("inputs", "outputs", "activation"),
    [(768, 768, "none"), (768, 2304, "none"), (768, 3072, "gelu"), (3072, 768, "none"), (768, 2048, "relu")]
    + [(384, 384, "none"), (384, 1536, "gelu"), (1536, 384, "none"), (384, 256, "none"), (104, 200, "gelu")],
)
def test_kernel_is_the_reference_at_trocrs_sizes(rows, inputs, outputs, activation, dtype):
    check(random_on_gpu(rows, inputs, outputs, dtype), ACTIVATIONS[activation])


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [1, 4])
@pytest.mark.parametrize("which", range(3))
def test_kernel_takes_tensors_that_begin_anywhere(which, offset):
    tensors = random_on_gpu(70, 64, 136, torch.float16)
    values = tensors[which]
    moved = torch.empty(values.numel() + offset, dtype=values.dtype, device=values.device)
    moved[offset:] = values.flatten()
    tensors[which] = moved[offset:].view(values.shape)
    check(tensors, ACTIVATIONS["gelu"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS.values())
@pytest.mark.parametrize(("inputs", "outputs"), [(7, 40), (64, 40), (768, 512)])
def test_kernel_on_constant_and_on_large_values(inputs, outputs, activation, dtype):
    x, weight, bias = random_on_gpu(130, inputs, outputs, dtype)
    check([0 * x, weight, bias], activation)
    check([0 * x + 7, weight, 0 * bias], activation)
    check([8000 * x.clamp(-2, 2), weight, bias], activation)
    check([x, weight, 100 * bias], activation)


@pytest.mark.gpu
@pytest.mark.parametrize(("inputs", "outputs"), [(65, 40), (768, 512)])
def test_kernel_sums_in_fp32(inputs, outputs):
    """Sums that leave FP16's range, or would lose what is small, on their way."""
    x = torch.ones(577, inputs, dtype=torch.float16, device="cuda")
    weight = torch.full((outputs, inputs), 60000.0, dtype=torch.float16, device="cuda")
    weight[:, 1::2] *= -1
    weight[:, (inputs - 3) // 2 * 2 :] = 0.25
    bias = torch.zeros(outputs, dtype=torch.float16, device="cuda")
    expected = (x.double() @ weight.double().T).half()
    assert torch.equal(launch(x, weight, bias, ACTIVATIONS["none"]), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS.values())
@pytest.mark.parametrize(("inputs", "outputs"), [(33, 50), (768, 512)])
def test_kernel_mixes_no_rows(inputs, outputs, activation, dtype):
    """NaN in one row stays there."""
    tensors = random_on_gpu(140, inputs, outputs, dtype)
    expected = launch(*tensors, activation)
    tensors[0][77, 5] = torch.nan
    actual = launch(*tensors, activation)
    assert actual[77].isnan().all()
    others = torch.arange(140, device="cuda") != 77
    assert torch.equal(actual[others], expected[others])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", [(33, 50), (64, 56)])
def test_kernel_refuses_an_unknown_activation(sizes, dtype):
    with pytest.raises(RuntimeError):
        launch(*random_on_gpu(1, *sizes, dtype), 3)
