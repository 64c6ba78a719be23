import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.restormer.network import Architecture, TransformerBlock, TransposedAttention
from plugins import find, kernels
from plugins.depthwise_conv.reference import depthwise_conv
from plugins.testing import assert_close, export_graph, grafted, run_function

PLUGIN = find("depthwise_conv")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(1, 144, 5, 7), (2, 1, 1, 1), (1, 21, 1, 13), (3, 6, 8, 3)])
def test_function_is_the_reference(shape, dtype):
    random = np.random.default_rng(0)
    inputs = {
        "x": random.standard_normal(shape).astype(dtype),
        "weight": random.standard_normal((shape[1], 1, 3, 3)).astype(dtype) / 3,
        "bias": random.standard_normal(shape[1]).astype(dtype),
    }
    (actual,) = run_function(PLUGIN, inputs, channels=shape[1])
    assert_close(actual, depthwise_conv(*(torch.from_numpy(values) for values in inputs.values())))


@pytest.mark.parametrize("bias", [False, True])
def test_pattern_replaces_the_networks_convolution(bias):
    torch.manual_seed(0)
    attention = TransposedAttention(12, 2, bias)
    graph = export_graph(attention, ("batch", 12, "h", "w"), {"batch": 2, "h": 6, "w": 10})
    (match,) = PLUGIN.pattern.matches(graph)
    assert match.attributes == {"channels": 36}
    x = torch.randn(3, 12, 5, 7)
    (actual,) = grafted(graph, PLUGIN, [match]).run(None, {"x": x.numpy()})
    with torch.inference_mode():
        assert_close(actual, attention(x))


def test_pattern_leaves_gates_alone():
    block = TransformerBlock(8, 2, Architecture())
    graph = export_graph(block, ("batch", 8, "h", "w"), {"batch": 2, "h": 6, "w": 10})
    (match,) = PLUGIN.pattern.matches(graph)
    (gate,) = find("gated_depthwise_conv").pattern.matches(graph)
    assert match.attributes == {"channels": 24}
    assert not {id(node) for node in match.nodes} & {id(node) for node in gate.nodes}


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 4},
        {"stride": 2},
        {"dilation": 2, "padding": 2},
        {"padding": 0},
        {"kernel_size": 5, "padding": 2},
    ],
    ids=str,
)
def test_pattern_refuses_other_convolutions(options):
    conv = torch.nn.Conv2d(8, 8, **{"kernel_size": 3, "padding": 1, "groups": 8, **options})
    graph = export_graph(conv, ("batch", 8, "h", "w"), {"batch": 2, "h": 6, "w": 10})
    assert any(node.op == "Conv" for node in graph.nodes)
    assert PLUGIN.pattern.matches(graph) == []


def launched(x, weight, bias):
    """The kernel's result; it writes nothing behind y."""
    batch, channels, height, width = x.shape
    shape = (batch, height, width, kernels.pitch(channels, x.dtype))
    elements = math.prod(shape)
    y = kernels.poisoned(elements + 64, dtype=x.dtype)
    image = kernels.channel_last(x)
    kernels.launch("depthwise_conv", x.dtype, image, weight, bias, y, batch, height, width, channels)
    assert y[elements:].isnan().all()
    return kernels.channel_first(y[:elements].view(shape), channels)


def expected_in_fp64(x, weight, bias):
    """The reference, which computes in FP32 only, in FP64."""
    return F.conv2d(x.double(), weight.double(), bias.double(), padding=1, groups=len(weight)).to(x.dtype)


def random_on_gpu(shape, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape, device="cuda")
    weight = torch.randn(shape[1], 1, 3, 3, device="cuda") / 3
    bias = torch.randn(shape[1], device="cuda")
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 1, 1, 1),
        (1, 3, 1, 13),
        (1, 144, 13, 1),
        (3, 6, 8, 3),
        (2, 16, 4, 4),
        (1, 127, 5, 7),
        (2, 128, 25, 8),
        (1, 2, 12, 130),
        (2, 20, 253, 251),
        (1, 144, 256, 256),
        (1, 288, 128, 128),
        (1, 576, 64, 64),
        (1, 1152, 32, 32),
        (1, 12, 720, 1280),
    ],
)
def test_kernel_is_the_reference(shape, dtype):
    inputs = random_on_gpu(shape, dtype)
    y = launched(*inputs)
    kernels.assert_close(y, expected_in_fp64(*inputs))
    with kernels.busy_memory():
        assert torch.equal(y, launched(*inputs))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [(2, 8, 1, 4), (1, 16, 7, 5), (3, 48, 37, 70), (1, 136, 70, 9), (2, 24, 2, 135)],
)
def test_kernel_that_sums_in_fp16(shape):
    """Packs of 8 channels; where few values are tried, the largest of them may be one that is rounded worst."""
    inputs = random_on_gpu(shape, torch.float16)
    expected = expected_in_fp64(*inputs)
    torch.testing.assert_close(launched(*inputs), expected, rtol=0, atol=4e-3 * float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [12, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernel_on_zero_constant_and_large_values(dtype, channels):
    x, weight, bias = random_on_gpu((1, channels, 14, 20), dtype)
    for case in (torch.zeros_like(x), torch.full_like(x, 7), 3000 * x):
        kernels.assert_close(launched(case, weight, bias), expected_in_fp64(case, weight, bias))


@pytest.mark.gpu
def test_kernel_beyond_32_bits():
    """The third of three equal images, whose elements are numbered beyond 2³¹."""
    channels, height, width = 1024, 720, 1280
    one = torch.randn(1, height, width, channels, dtype=torch.float16, device="cuda")
    _, weight, bias = random_on_gpu((1, channels, 1, 1), torch.float16)
    results = []
    for batch in (1, 3):
        x = one.repeat(batch, 1, 1, 1)
        y = kernels.poisoned(*x.shape, dtype=x.dtype)
        kernels.launch("depthwise_conv", x.dtype, x, weight, bias, y, batch, height, width, channels)
        results.append(y)
    assert torch.equal(results[0][0], results[1][2])


@pytest.mark.gpu
def test_kernel_accepts_empty_batches():
    inputs = random_on_gpu((0, 8, 4, 4), torch.float32)
    assert launched(*inputs).shape == (0, 8, 4, 4)
