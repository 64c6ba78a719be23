import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.restormer.network import GatedFeedForward
from plugins import find, kernels
from plugins.gated_depthwise_conv.reference import gated_depthwise_conv
from plugins.testing import assert_close, export_graph, grafted, run_function

PLUGIN = find("gated_depthwise_conv")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(1, 254, 5, 7), (2, 2, 1, 1), (1, 42, 1, 13), (3, 6, 8, 3)])
def test_function_is_the_reference(shape, dtype):
    random = np.random.default_rng(0)
    inputs = {
        "x": random.standard_normal(shape).astype(dtype),
        "weight": random.standard_normal((shape[1], 1, 3, 3)).astype(dtype) / 3,
        "bias": random.standard_normal(shape[1]).astype(dtype),
    }
    (actual,) = run_function(PLUGIN, inputs, channels=shape[1])
    assert_close(actual, gated_depthwise_conv(*(torch.from_numpy(values) for values in inputs.values())))


@pytest.mark.parametrize("bias", [False, True])
def test_pattern_replaces_the_networks_gate(bias):
    torch.manual_seed(0)
    feed_forward = GatedFeedForward(12, 2.66, bias)
    graph = export_graph(feed_forward, ("batch", 12, "h", "w"), {"batch": 2, "h": 6, "w": 10})
    (match,) = PLUGIN.pattern.matches(graph)
    assert match.attributes == {"channels": 62}
    x = torch.randn(3, 12, 5, 7)
    (actual,) = grafted(graph, PLUGIN, [match]).run(None, {"x": x.numpy()})
    with torch.inference_mode():
        assert_close(actual, feed_forward(x))


@pytest.mark.parametrize(
    ("activation", "dilation"), [(F.silu, 1), (F.gelu, 2)], ids=["another activation", "a dilated convolution"]
)
def test_pattern_refuses_what_it_does_not_compute(activation, dilation):
    class Other(GatedFeedForward):
        def forward(self, x):
            self.dwconv.dilation = self.dwconv.padding = (dilation, dilation)
            gate, value = self.dwconv(self.project_in(x)).chunk(2, dim=1)
            return self.project_out(activation(gate) * value)

    graph = export_graph(Other(8, 2, bias=False), ("batch", 8, "h", "w"), {"batch": 2, "h": 6, "w": 10})
    assert PLUGIN.pattern.matches(graph) == []


def launched(x, weight, bias):
    """The kernel's result; it writes nothing behind y."""
    batch, channels, height, width = x.shape
    channels //= 2
    shape = (batch, height, width, kernels.pitch(channels, x.dtype))
    elements = math.prod(shape)
    y = kernels.poisoned(elements + 64, dtype=x.dtype)
    image = kernels.channel_last(x)
    kernels.launch("gated_depthwise_conv", x.dtype, image, weight, bias, y, batch, height, width, channels)
    assert y[elements:].isnan().all()
    return kernels.channel_first(y[:elements].view(shape), channels)


def expected_in_fp64(x, weight, bias):
    """The reference, which computes in FP32 only, in FP64."""
    z = F.conv2d(x.double(), weight.double(), bias.double(), padding=1, groups=len(weight))
    gate, value = z.chunk(2, dim=1)
    return (F.gelu(gate) * value).to(x.dtype)


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
        (2, 2, 1, 1),
        (1, 6, 1, 13),
        (1, 288, 13, 1),
        (3, 12, 8, 3),
        (2, 32, 4, 4),
        (1, 254, 5, 7),
        (1, 42, 7, 9),
        (2, 256, 25, 8),
        (1, 4, 12, 130),
        (2, 10, 253, 251),
        (1, 254, 256, 256),
        (1, 256, 256, 256),
        (1, 512, 128, 128),
        (1, 1020, 64, 64),
        (1, 2048, 32, 32),
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
    [(2, 16, 1, 4), (1, 32, 7, 5), (3, 96, 37, 70), (1, 272, 70, 9), (2, 48, 2, 135)],
)
def test_kernel_that_sums_in_fp16(shape):
    """Packs of 8 channels; where few values are tried, the largest of them may be one that is rounded worst."""
    inputs = random_on_gpu(shape, torch.float16)
    expected = expected_in_fp64(*inputs)
    torch.testing.assert_close(launched(*inputs), expected, rtol=0, atol=4e-3 * float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernel_on_zero_constant_and_large_values(dtype, channels):
    x, weight, bias = random_on_gpu((1, 2 * channels, 14, 20), dtype)
    # large gates are passed or stopped entirely; the product stays within FP16
    large = torch.cat([1000 * x[:, :channels], x[:, channels:]], dim=1)
    for case in (torch.zeros_like(x), torch.full_like(x, 7), large):
        kernels.assert_close(launched(case, weight, bias), expected_in_fp64(case, weight, bias))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("gate", [-65504, -100, -10, -6, -3, -0.5, 0, 1e-6, 0.5, 3, 6, 10, 100, 65504])
def test_kernel_on_every_part_of_gelu(gate, dtype):
    x = torch.ones((1, 32, 6, 9), dtype=dtype, device="cuda")
    x[:, :16] = gate
    weight = torch.zeros((32, 1, 3, 3), dtype=dtype, device="cuda")
    weight[:, :, 1, 1] = 1
    inputs = x, weight, torch.zeros(32, dtype=dtype, device="cuda")
    kernels.assert_close(launched(*inputs), expected_in_fp64(*inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_kernel_reads_no_other_row_or_image(rows):
    """NaN in one of three images stays there, and infinity within a pixel of where it is."""
    x, weight, bias = random_on_gpu((3, 32, rows, 12), torch.float16)
    x[1] = torch.nan
    x[2, :, rows // 2, 5] = torch.inf
    y = launched(x, weight, bias)
    kernels.assert_close(y[:1], expected_in_fp64(x[:1], weight, bias))
    assert y[1].isnan().all()
    near = torch.zeros_like(y[2], dtype=torch.bool)
    near[:, max(rows // 2 - 1, 0) : rows // 2 + 2, 4:7] = True
    assert y[2][~near].isfinite().all()


@pytest.mark.gpu
def test_kernel_accepts_empty_batches():
    inputs = random_on_gpu((0, 8, 4, 4), torch.float32)
    assert launched(*inputs).shape == (0, 4, 4, 4)
