import ctypes
import math

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.restormer.network import Architecture, TransformerBlock, TransposedAttention
from plugins import find, kernels
from plugins.testing import assert_close, export_graph, grafted, run_function
from plugins.transposed_attention_residual.reference import transposed_attention_residual

PLUGIN = find("transposed_attention_residual")


def random_inputs(sizes, dtype):
    batch, channels, heads, height, width = sizes
    random = np.random.default_rng(0)
    return {
        "qkv": random.standard_normal((batch, 3 * channels, height, width)).astype(dtype),
        "temperature": random.uniform(0.5, 2, (heads, 1, 1)).astype(dtype),
        "weight": (random.standard_normal((channels, channels, 1, 1)) / math.sqrt(channels)).astype(dtype),
        "bias": random.standard_normal(channels).astype(dtype),
        "residual": random.standard_normal((batch, channels, height, width)).astype(dtype),
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("sizes", [(1, 48, 1, 7, 9), (2, 6, 3, 1, 1), (1, 384, 8, 3, 2), (3, 16, 16, 5, 4)])
def test_function_is_the_reference(sizes, dtype):
    inputs = random_inputs(sizes, dtype)
    (actual,) = run_function(PLUGIN, inputs)
    assert_close(actual, transposed_attention_residual(*(torch.from_numpy(values) for values in inputs.values())))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_zero_channels_stay_finite(dtype):
    """A channel of zeros has norm 0; torch in half precision gives NaN there, since 1e-12 rounds to 0."""
    inputs = random_inputs((1, 8, 2, 4, 4), dtype)
    inputs["qkv"][:, [0, 9, 17]] = 0  # one each of q, k and v
    (actual,) = run_function(PLUGIN, inputs)
    assert np.isfinite(actual).all()
    expected = transposed_attention_residual(*(torch.from_numpy(values).float() for values in inputs.values()))
    assert_close(actual, expected.numpy().astype(dtype))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("heads", [1, 4])
def test_pattern_replaces_the_networks_attention(heads, bias):
    torch.manual_seed(0)
    block = TransformerBlock(16, heads, Architecture(bias=bias))
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    graph = export_graph(block, ("batch", 16, "h", "w"), {"batch": 2, "h": 6, "w": 10})
    (match,) = PLUGIN.pattern.matches(graph)
    assert [list(match.inputs[index].shape) for index in (1, 2, 3)] == [[heads, 1, 1], [16, 16, 1, 1], [16]]
    assert match.inputs[4].name == "x"
    x = torch.randn(3, 16, 5, 7)
    (actual,) = grafted(graph, PLUGIN, [match]).run(None, {"x": x.numpy()})
    with torch.inference_mode():
        assert_close(actual, block(x))


class Residual(nn.Module):
    """The pattern, and variants of it."""

    def __init__(self, outputs=8, swapped=False, reused=False, residual=True):
        super().__init__()
        self.attention = TransposedAttention(8, 2, bias=False)
        if outputs != 8:
            self.attention.project_out = nn.Conv2d(8, outputs, 1)
        self.residual = nn.Conv2d(8, outputs, 3, padding=1)
        self.attended = None
        if reused:  # by the convolution's pre-hook
            self.attention.project_out.register_forward_pre_hook(self.keep)
        self.swapped, self.with_residual = swapped, residual

    def keep(self, module, arguments):
        (self.attended,) = arguments

    def forward(self, x):
        y, residual = self.attention(x), self.residual(x)
        if self.with_residual:
            y = y + residual if self.swapped else residual + y
        return y if self.attended is None else y * self.attended


def export_residual(**options):
    return export_graph(Residual(**options), ("batch", 8, "h", "w"), {"batch": 2, "h": 6, "w": 10})


@pytest.mark.parametrize("swapped", [True, False])
def test_pattern_takes_the_operands_in_both_orders(swapped):
    (match,) = PLUGIN.pattern.matches(export_residual(swapped=swapped))
    assert match.inputs[4].inputs[0].op == "Conv"
    assert match.inputs[4].inputs[0].inputs[1].shape == [8, 8, 3, 3]


@pytest.mark.parametrize("options", [{"reused": True}, {"outputs": 12}, {"residual": False}], ids=str)
def test_pattern_refuses_what_it_does_not_compute(options):
    graph = export_residual(**options)
    assert len(find("transposed_attention").pattern.matches(graph)) == 1
    assert PLUGIN.pattern.matches(graph) == []


@pytest.mark.parametrize("between", ["the attention", "the convolution"])
def test_pattern_refuses_outputs_on_its_way(between):
    graph = export_residual()
    (match,) = PLUGIN.pattern.matches(graph)
    conv = next(node for node in match.nodes if node.op == "Conv")
    graph.outputs.append(conv.inputs[0] if between == "the attention" else conv.outputs[0])
    assert isinstance(graph.outputs[-1], gs.Variable)
    assert PLUGIN.pattern.matches(graph) == []


def workspace_bytes(*sizes):
    function = kernels.library().transposed_attention_residual_workspace_bytes
    function.restype = ctypes.c_int64
    return function(*map(ctypes.c_int64, sizes))


def launched(qkv, temperature, weight, bias, residual):
    """The kernels' y (B, C, H, W) of qkv (B, 3·C, H, W); they write neither behind y nor behind their workspace, and
    the same in every run."""
    batch, channels, height, width = residual.shape
    sizes = (batch, len(temperature), channels // len(temperature), height * width)
    image, added = kernels.channel_last(qkv), kernels.channel_last(residual)
    floats = workspace_bytes(*sizes) // 4

    def run():
        workspace = kernels.poisoned(floats + 64, dtype=torch.float32)
        y = kernels.poisoned(added.numel() + 64, dtype=qkv.dtype)
        tensors = (image, temperature, weight, bias, added, y, workspace)
        kernels.launch("transposed_attention_residual", qkv.dtype, *tensors, *sizes)
        assert workspace[floats:].isnan().all()
        assert y[added.numel() :].isnan().all()
        return y[: added.numel()]

    y = run()
    with kernels.busy_memory():
        assert torch.equal(y, run())  # no atomics: bit by bit
    return kernels.channel_first(y.view(added.shape), channels)


def check(inputs):
    """The kernels are within their tolerance of FP64; on the GPU, since the images are large."""
    qkv, temperature, weight, bias, residual = (values.double() for values in inputs)
    batch, channels, height, width = residual.shape
    q, k, v = qkv.view(batch, 3, len(temperature), channels // len(temperature), height * width).unbind(1)
    q, k = (F.normalize(rows, dim=-1) for rows in (q, k))
    attended = ((q @ k.transpose(-2, -1) * temperature).softmax(-1) @ v).flatten(1, 2)
    expected = residual.flatten(2) + weight.flatten(1) @ attended + bias[:, None]
    y = launched(*inputs).flatten(2)
    assert y.shape == expected.shape
    assert y.isfinite().all()
    if y.numel():
        error = (y.double() - expected.to(y.dtype).double()).abs().max()
        assert error <= kernels.TOLERANCE[y.dtype] * max(1.0, float(expected.abs().max()))


def random_on_gpu(sizes, dtype):
    batch, channels, heads, height, width = sizes
    torch.manual_seed(0)
    qkv = torch.randn(batch, 3 * channels, height, width, device="cuda")
    temperature = torch.empty(heads, 1, 1, device="cuda").uniform_(0.5, 2)
    weight = torch.randn(channels, channels, 1, 1, device="cuda") / math.sqrt(channels)
    bias = torch.randn(channels, device="cuda")
    residual = torch.randn(batch, channels, height, width, device="cuda")
    return [values.to(dtype) for values in (qkv, temperature, weight, bias, residual)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "sizes",  # batch, channels, heads, height, width
    [
        (1, 48, 1, 1, 1),
        (0, 48, 1, 4, 4),
        (1, 48, 1, 7, 9),
        (3, 48, 1, 10, 21),
        (2, 6, 3, 1, 1),
        (2, 1, 1, 3, 3),
        (1, 3, 1, 9, 7),
        (3, 16, 16, 5, 4),
        (2, 12, 3, 4, 5),  # 4 channels a head: packs of FP32, none of FP16
        (2, 34, 2, 5, 13),  # 17 channels a head
        (1, 97, 1, 9, 8),
        (1, 127, 1, 4, 9),
        (1, 128, 1, 43, 3),
        (2, 256, 2, 8, 8),
        (1, 8, 1, 3, 5),  # heads that end within a granule
        (2, 24, 3, 20, 7),
        (1, 320, 40, 5, 5),
        (1, 40, 1, 5, 14),
        (2, 160, 2, 6, 11),
        (2, 200, 5, 4, 9),
        (1, 88, 1, 7, 19),
        (1, 2400, 20, 5, 7),  # more channels than fit shared memory
        (1, 96, 1, 253, 255),
        (8, 96, 2, 5, 7),
        (140, 8, 1, 13, 10),  # more images than multiprocessors
        (300, 16, 1, 31, 33),
    ],
)
def test_kernel_is_the_reference(sizes, dtype):
    check(random_on_gpu(sizes, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("channels", "heads", "height", "width"),
    [(48, 1, 256, 256), (96, 1, 256, 256), (96, 2, 128, 128), (192, 4, 64, 64), (384, 8, 32, 32)]
    + [(96, 2, 61, 67), (192, 4, 31, 33), (384, 8, 17, 15)],
)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_kernel_is_the_reference_at_restormers_sizes(channels, heads, height, width, batch, dtype):
    check(random_on_gpu((batch, channels, heads, height, width), dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "sizes", [(1, 48, 1, 720, 1280), (1, 96, 1, 720, 1280), (1, 96, 2, 360, 640), (1, 384, 8, 90, 160)]
)
def test_kernel_is_the_reference_on_a_large_image(sizes, dtype):
    check(random_on_gpu(sizes, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("channels", "heads"),
    [(17, 1), (24, 3), (48, 1), (64, 8), (96, 1), (96, 2), (128, 1), (192, 4), (240, 2), (384, 8)],
)
def test_kernel_tells_channels_apart(channels, heads, dtype):
    """Each channel of q is one of k, so that softmax picks a row of v: random q and k average them all."""
    qkv, temperature, weight, bias, residual = random_on_gpu((2, channels, heads, 24, 24), dtype)
    v = qkv[:, 2 * channels :]
    q = torch.randn(2, heads, channels // heads, 24, 24, dtype=dtype, device="cuda")
    k = q[:, :, torch.randperm(channels // heads)]
    qkv = torch.cat([q.flatten(1, 2), k.flatten(1, 2), v], dim=1)
    check([qkv, torch.full_like(temperature, 8), weight, bias, residual])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernel_on_zero_constant_and_large_channels(dtype):
    qkv, *others = random_on_gpu((2, 96, 2, 24, 40), dtype)
    zeros = qkv.clone()
    zeros[:, [0, 97, 200]] = 0  # one each of q, k and v
    # their squares, and sums of products, are beyond FP16
    large = (30000 * qkv.float().clamp(-2, 2)).to(dtype)
    for case in (zeros, torch.full_like(qkv, 7), large, torch.zeros_like(qkv)):
        check([case, *others])


@pytest.mark.gpu
def test_workspace_for_the_largest_image_is_enough_for_smaller_ones():
    smaller, larger = (1, 1, 1, 1), (300, 300, 128, 40000)  # batch, heads, head_channels, pixels
    usual = (2, 4, 48, 3000)
    for axis in range(4):
        for others in (smaller, usual, larger):
            needed = [
                workspace_bytes(*others[:axis], size, *others[axis + 1 :])
                for size in range(smaller[axis], larger[axis] + 1, 1 + larger[axis] // 1000)
            ]
            assert needed == sorted(needed)


@pytest.mark.gpu
def test_kernel_refuses_more_channels_than_it_has_room_for():
    with pytest.raises(RuntimeError, match="CUDA error 1"):
        launched(*random_on_gpu((1, 129, 1, 2, 2), torch.float32))
