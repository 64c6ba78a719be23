import ctypes
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.restormer.network import TransposedAttention
from plugins import find, kernels
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


def launched(qkv, temperature):
    """The kernels' y (B, C, H, W) of qkv (B, 3·C, H, W); they write neither behind y nor behind their workspace."""
    batch, channels, height, width = qkv.shape
    channels //= 3
    heads = len(temperature)
    sizes = (batch, heads, channels // heads, height * width)
    floats = workspace_bytes(*sizes) // 4
    workspace = kernels.poisoned(floats + 64, dtype=torch.float32)
    shape = (batch, height, width, kernels.pitch(channels, qkv.dtype))
    elements = math.prod(shape)
    y = kernels.poisoned(elements + 64, dtype=qkv.dtype)
    kernels.launch("transposed_attention", qkv.dtype, kernels.channel_last(qkv), temperature, y, workspace, *sizes)
    assert workspace[floats:].isnan().all()
    assert y[elements:].isnan().all()
    return kernels.channel_first(y[:elements].view(shape), channels)


def workspace_bytes(*sizes):
    function = kernels.library().transposed_attention_workspace_bytes
    function.restype = ctypes.c_int64
    return function(*map(ctypes.c_int64, sizes))


def expected_in_fp64(qkv, temperature):
    """The reference, which computes in FP32 only, in FP64."""
    batch, channels, height, width = qkv.shape
    heads = len(temperature)
    q, k, v = qkv.double().view(batch, 3, heads, channels // 3 // heads, height * width).unbind(1)
    q, k = (F.normalize(rows, dim=-1) for rows in (q, k))
    y = (q @ k.transpose(-2, -1) * temperature.double()).softmax(-1) @ v
    return y.view(batch, channels // 3, height, width).to(qkv.dtype)


def random_on_gpu(sizes, dtype):
    batch, channels, heads, height, width = sizes
    torch.manual_seed(0)
    qkv = torch.randn(batch, 3 * channels, height, width, device="cuda")
    temperature = torch.empty(heads, 1, 1, device="cuda").uniform_(0.5, 2)
    return qkv.to(dtype), temperature.to(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "sizes",  # batch, channels, heads, height, width
    [
        (1, 48, 1, 1, 1),
        (1, 48, 1, 7, 9),
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
        (1, 8, 1, 3, 5),  # heads that end within a fragment
        (1, 24, 1, 20, 7),
        (1, 40, 1, 5, 14),
        (2, 160, 2, 6, 11),
        (1, 88, 1, 7, 19),
        (1, 104, 1, 3, 30),
        (140, 3, 1, 13, 10),  # more heads than blocks aimed at
        (140, 8, 1, 13, 10),
        (300, 16, 1, 31, 33),
        (1, 48, 1, 256, 256),  # Restormer's levels
        (1, 96, 2, 128, 128),
        (1, 192, 4, 64, 64),
        (1, 384, 8, 32, 32),
        (1, 96, 1, 256, 256),
        (1, 96, 1, 253, 255),
        (8, 48, 1, 256, 256),
        (8, 96, 2, 128, 128),
        (8, 192, 4, 64, 64),
        (8, 384, 8, 32, 32),
        (1, 48, 1, 720, 1280),
        (1, 96, 2, 360, 640),
        (1, 192, 4, 180, 320),
        (1, 384, 8, 90, 160),
        (1, 96, 1, 720, 1280),
    ],
)
def test_kernel_is_the_reference(sizes, dtype):
    qkv, temperature = random_on_gpu(sizes, dtype)
    y = launched(qkv, temperature)
    kernels.assert_close(y, expected_in_fp64(qkv, temperature))
    with kernels.busy_memory():
        assert torch.equal(y, launched(qkv, temperature))  # no atomics: bit by bit


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels", [17, 48, 56, 96, 128])
def test_kernel_tells_channels_apart(channels, dtype):
    """Each channel of q is one of k, so that softmax picks a row of v: random q and k average them all."""
    torch.manual_seed(0)
    q, v = torch.randn(2, 1, channels, 24, 24, device="cuda")
    k = q[:, torch.randperm(channels)]
    qkv = torch.cat([q, k, v], dim=1).to(dtype)
    temperature = torch.full((1, 1, 1), 8.0, dtype=dtype, device="cuda")
    kernels.assert_close(launched(qkv, temperature), expected_in_fp64(qkv, temperature))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernel_on_zero_constant_and_large_channels(dtype):
    qkv, temperature = random_on_gpu((1, 96, 2, 24, 40), dtype)
    zeros = qkv.clone()
    zeros[:, [0, 97, 200]] = 0  # one each of q, k and v
    constant = torch.full_like(qkv, 7)
    # their squares, and sums of products, are beyond FP16
    large = (30000 * qkv.float().clamp(-2, 2)).to(dtype)
    for case in (zeros, constant, large, torch.zeros_like(qkv)):
        kernels.assert_close(launched(case, temperature), expected_in_fp64(case, temperature))


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
    qkv, temperature = random_on_gpu((1, 129, 1, 2, 2), torch.float32)
    with pytest.raises(RuntimeError, match="CUDA error 1"):
        launched(qkv, temperature)


@pytest.mark.gpu
def test_kernel_accepts_empty_batches():
    qkv, temperature = random_on_gpu((0, 48, 1, 4, 4), torch.float32)
    assert launched(qkv, temperature).shape == (0, 48, 4, 4)
