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
from plugins.transposed_attention_block.reference import transposed_attention_block

PLUGIN = find("transposed_attention_block")
PARTS = ("norm_pointwise_conv", "depthwise_conv", "transposed_attention_residual")


def random_inputs(sizes, dtype):
    batch, channels, heads, height, width = sizes
    random = np.random.default_rng(0)

    def normal(*shape):
        return random.standard_normal(shape)

    inputs = {
        "x": 3 * normal(batch, channels, height, width) + 1,
        "norm_weight": normal(channels),
        "norm_bias": normal(channels),
        "qkv_weight": normal(3 * channels, channels, 1, 1) / math.sqrt(channels),
        "qkv_bias": normal(3 * channels),
        "depthwise_weight": normal(3 * channels, 1, 3, 3) / 3,
        "depthwise_bias": normal(3 * channels),
        "temperature": random.uniform(0.5, 2, (heads, 1, 1)),
        "weight": normal(channels, channels, 1, 1) / math.sqrt(channels),
        "bias": normal(channels),
    }
    return {name: values.astype(dtype) for name, values in inputs.items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("subtract_mean", [1, 0])
@pytest.mark.parametrize("sizes", [(1, 48, 1, 7, 9), (2, 6, 3, 1, 1), (1, 96, 2, 3, 2), (3, 16, 16, 5, 4)])
def test_function_is_the_reference(sizes, subtract_mean, dtype):
    inputs = random_inputs(sizes, dtype)
    attributes = {"epsilon": 1e-5, "subtract_mean": subtract_mean}
    (actual,) = run_function(PLUGIN, inputs, channels=3 * sizes[1], **attributes)
    tensors = {name: torch.from_numpy(values) for name, values in inputs.items()}
    assert_close(actual, transposed_attention_block(**tensors, **attributes))


@pytest.mark.parametrize("norm_bias", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("heads", [1, 4])
def test_pattern_replaces_the_networks_attention(heads, bias, norm_bias):
    torch.manual_seed(0)
    block = TransformerBlock(16, heads, Architecture(bias=bias, norm_bias=norm_bias))
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    graph = export_graph(block, ("batch", 16, "h", "w"), {"batch": 2, "h": 6, "w": 10})
    (match,) = PLUGIN.pattern.matches(graph)
    assert match.inputs[0].name == "x"
    assert [list(tensor.shape) for tensor in match.inputs[1:]] == [
        *([16], [16], [48, 16, 1, 1], [48], [48, 1, 3, 3], [48]),
        *([heads, 1, 1], [16, 16, 1, 1], [16]),
    ]
    assert match.attributes == {"channels": 48, "epsilon": pytest.approx(1e-5), "subtract_mean": int(norm_bias)}
    x = torch.randn(3, 16, 5, 7)
    (actual,) = grafted(graph, PLUGIN, [match]).run(None, {"x": x.numpy()})
    with torch.inference_mode():
        assert_close(actual, block(x))


def test_reach_exceeds_that_of_the_parts():
    assert all(PLUGIN.reach > find(name).reach for name in PARTS)


class Block(nn.Module):
    """The pattern, and variants of it: `shared` names a module whose result others use, too."""

    def __init__(self, residual="x", shared=None, depthwise=True):
        super().__init__()
        self.block = TransformerBlock(8, 2, Architecture())
        self.residual, self.kept = residual, None
        attention: TransposedAttention = self.block.attn
        if not depthwise:
            attention.qkv_dwconv = nn.Conv2d(24, 24, 3, padding=1)
        if shared is not None:
            getattr(attention, shared).register_forward_hook(self.keep)

    def keep(self, module, arguments, result):
        self.kept = result.mean(dim=1, keepdim=True)

    def forward(self, x):
        y = self.block.attn(self.block.norm1(x))
        y = y + (x if self.residual == "x" else x.relu())
        return y if self.kept is None else y * self.kept


def export_block(**options):
    return export_graph(Block(**options), ("batch", 8, "h", "w"), {"batch": 2, "h": 6, "w": 10})


def test_pattern_takes_the_operands_in_both_orders():
    (match,) = PLUGIN.pattern.matches(export_block())
    assert match.inputs[0].name == "x"


@pytest.mark.parametrize(
    "options", [{"residual": "another"}, {"shared": "qkv"}, {"shared": "qkv_dwconv"}, {"depthwise": False}], ids=str
)
def test_pattern_refuses_what_it_does_not_compute(options):
    graph = export_block(**options)
    assert len(find("transposed_attention_residual").pattern.matches(graph)) == 1
    assert PLUGIN.pattern.matches(graph) == []


@pytest.mark.parametrize("part", ["norm_pointwise_conv", "depthwise_conv"])
def test_pattern_refuses_outputs_on_its_way(part):
    graph = export_block()
    (match,) = find(part).pattern.matches(graph)
    graph.outputs.append(match.outputs[0])
    assert isinstance(graph.outputs[-1], gs.Variable)
    assert PLUGIN.pattern.matches(graph) == []


def workspace_bytes(dtype, *sizes):
    function = kernels.library().transposed_attention_block_workspace_bytes
    function.restype = ctypes.c_int64
    return function(ctypes.c_int32(kernels.DATA_TYPES[dtype]), *map(ctypes.c_int64, sizes))


def launched(x, *parameters, subtract_mean=True):
    """The kernels' y (B, C, H, W) of x (B, C, H, W); they write neither behind y nor behind their workspace, and the
    same in every run."""
    batch, channels, height, width = x.shape
    heads = len(parameters[6])
    sizes = (batch, heads, channels // heads, height, width)
    image = kernels.channel_last(x)
    floats = workspace_bytes(x.dtype, *sizes) // 4

    def run():
        workspace = kernels.poisoned(floats + 64, dtype=torch.float32)
        y = kernels.poisoned(image.numel() + 64, dtype=x.dtype)
        arguments = (image, *parameters, y, workspace, *sizes, 1e-5, subtract_mean)
        kernels.launch("transposed_attention_block", x.dtype, *arguments)
        assert workspace[floats:].isnan().all()
        assert y[image.numel() :].isnan().all()
        return y[: image.numel()]

    y = run()
    with kernels.busy_memory():
        assert torch.equal(y, run())  # no atomics: bit by bit
    return kernels.channel_first(y.view(image.shape), channels)


def expected_in_fp64(inputs, subtract_mean):
    """The reference, which computes in FP32 only, in FP64; what the kernels round on their way is rounded here."""
    dtype = inputs[0].dtype
    x, norm_weight, norm_bias, qkv_weight, qkv_bias, depthwise_weight, depthwise_bias, temperature, weight, bias = (
        values.double() for values in inputs
    )
    batch, channels, height, width = x.shape
    variance, mean = torch.var_mean(x, dim=1, unbiased=False, keepdim=True)
    normalised = (x - mean if subtract_mean else x) / (variance + 1e-5).sqrt()
    normalised = normalised * norm_weight[:, None, None] + norm_bias[:, None, None]
    z = (qkv_weight.flatten(1) @ normalised.to(dtype).double().flatten(2) + qkv_bias[:, None]).to(dtype).double()
    z = F.pad(z.unflatten(2, (height, width)), (1, 1, 1, 1))
    qkv = sum(
        depthwise_weight[:, :, i, j, None] * z[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)
    )
    qkv = (qkv + depthwise_bias[:, None, None]).to(dtype).double()
    q, k, v = qkv.view(batch, 3, len(temperature), channels // len(temperature), height * width).unbind(1)
    q, k = (F.normalize(rows, dim=-1) for rows in (q, k))
    attended = ((q @ k.transpose(-2, -1) * temperature).softmax(-1) @ v).flatten(1, 2)
    return (x.flatten(2) + weight.flatten(1) @ attended + bias[:, None]).view(x.shape)


def check(inputs, subtract_mean=True):
    """The kernels are within their tolerance; on the GPU, since the images are large."""
    expected = expected_in_fp64(inputs, subtract_mean)
    y = launched(*inputs, subtract_mean=subtract_mean)
    assert y.shape == expected.shape
    assert y.isfinite().all()
    if y.numel():
        error = (y.double() - expected.to(y.dtype).double()).abs().max()
        assert error <= kernels.TOLERANCE[y.dtype] * max(1.0, float(expected.abs().max()))


def random_on_gpu(sizes, dtype):
    batch, channels, heads, height, width = sizes
    torch.manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, device="cuda")

    depthwise_bias = normal(3 * channels)
    if height * width < 10:  # q and k of few pixels stay away from zero, where rounding would turn them round
        depthwise_bias += 4 * depthwise_bias.sign()
    inputs = (
        3 * normal(batch, channels, height, width) + 1,
        normal(channels).clamp(-1, 1),
        normal(channels).clamp(-1, 1),
        normal(3 * channels, channels, 1, 1) / math.sqrt(channels),
        normal(3 * channels),
        normal(3 * channels, 1, 3, 3) / 3,
        depthwise_bias,
        torch.empty(heads, 1, 1, device="cuda").uniform_(0.5, 2),
        normal(channels, channels, 1, 1) / math.sqrt(channels),
        normal(channels),
    )
    return [values.to(dtype) for values in inputs]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "sizes",  # batch, channels, heads, height, width
    [
        (1, 48, 1, 1, 1),
        (0, 48, 1, 4, 4),
        (1, 48, 1, 7, 9),
        (3, 48, 1, 10, 21),
        (1, 48, 1, 1, 70),
        (1, 48, 1, 70, 1),
        (2, 96, 1, 1, 1),
        (1, 96, 1, 17, 33),
        (1, 96, 2, 1, 19),
        (2, 96, 2, 18, 15),
        (2, 144, 3, 9, 20),
        (1, 192, 2, 9, 17),
        (1, 192, 4, 1, 1),
        (3, 192, 4, 7, 9),
        (1, 288, 6, 5, 18),
        (2, 384, 8, 1, 1),
        (1, 384, 8, 11, 10),
        (1, 384, 4, 11, 10),
        (2, 6, 3, 1, 1),
        (2, 1, 1, 3, 3),
        (1, 3, 1, 9, 7),
        (3, 16, 16, 5, 4),
        (2, 12, 3, 4, 5),  # 4 channels a head: packs of FP32, none of FP16
        (2, 34, 2, 5, 13),  # 17 channels a head
        (1, 97, 1, 9, 8),
        (1, 128, 1, 13, 3),
        (1, 40, 1, 5, 14),
        (2, 160, 2, 6, 11),
        (1, 432, 9, 5, 6),
        (140, 48, 1, 9, 17),  # more images than multiprocessors: several tiles for each block
        (13, 48, 1, 40, 70),  # wide tiles: one for each block, several
        (70, 48, 1, 17, 33),
        (140, 96, 1, 17, 18),
        (70, 192, 4, 17, 33),
        (300, 8, 1, 9, 7),
        (20, 8, 1, 256, 256),  # more pixels than the parts' kernels take at once
    ],
)
def test_kernel_is_the_reference(sizes, dtype):
    check(random_on_gpu(sizes, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("channels", "heads", "height", "width"),
    [(48, 1, 256, 256), (96, 1, 256, 256), (96, 2, 128, 128), (192, 4, 64, 64), (384, 8, 32, 32)]
    + [(48, 1, 131, 121), (96, 1, 123, 77), (96, 2, 61, 67), (192, 4, 31, 33), (384, 8, 17, 15)],
)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_kernel_is_the_reference_at_restormers_sizes(channels, heads, height, width, batch, dtype):
    check(random_on_gpu((batch, channels, heads, height, width), dtype))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sizes", [(1, 48, 1, 720, 1280), (1, 96, 1, 720, 1280), (1, 96, 2, 360, 640), (1, 384, 8, 90, 160)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernel_is_the_reference_on_a_large_image(sizes, dtype):
    check(random_on_gpu(sizes, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("subtract_mean", [True, False])
@pytest.mark.parametrize(("channels", "heads"), [(48, 1), (96, 1), (96, 2), (192, 4), (384, 8)])
def test_kernel_without_the_mean(channels, heads, subtract_mean, dtype):
    check(random_on_gpu((1, channels, heads, 19, 18), dtype), subtract_mean)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("channels", "heads"), [(24, 3), (48, 1), (96, 1), (96, 2), (128, 1), (192, 4), (384, 8)])
def test_kernel_tells_channels_apart(channels, heads, dtype):
    """Each channel of q is one of k, so that softmax picks a row of v: random q and k average them all."""
    inputs = random_on_gpu((2, channels, heads, 20, 22), dtype)
    for index in (3, 4, 5, 6):  # of the 1×1 and the depthwise convolution
        q, k, _ = inputs[index].unflatten(0, (3, heads, channels // heads))
        k.copy_(q[:, torch.randperm(channels // heads)])
    inputs[7].fill_(8)
    check(inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("channels", "heads"), [(48, 1), (96, 1), (96, 2), (40, 2), (384, 8)])
def test_kernel_on_zero_constant_and_large_values(channels, heads, dtype):
    x, *parameters = random_on_gpu((2, channels, heads, 14, 20), dtype)
    for case in (torch.zeros_like(x), torch.full_like(x, 7), 60000 * (torch.rand_like(x) - 0.5)):
        check([case, *parameters])
    for index in (2, 4):  # one channel each of q, k and v
        parameters[index + 1].view(3, -1)[:, 1] = 0
    parameters[4].view(3, -1, 9)[:, 1] = 0
    check([x, *parameters])
    parameters[4] *= 300  # sums of squares and of products are beyond FP16
    check([x, *parameters])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernel_pads_behind_the_convolution(dtype):
    """A large bias of the 1×1 convolution: nothing of it lies around the image."""
    inputs = random_on_gpu((1, 96, 2, 18, 35), dtype)
    inputs[4].fill_(100)
    check(inputs)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("channels", "heads", "side"), [(48, 1, 256), (96, 1, 256), (96, 2, 128), (192, 4, 64), (384, 8, 32)]
)
def test_kernels_that_follow_each_other_wait(channels, heads, side):
    """Each takes what the one before it has just written, and writes where the one before that has read; bit by bit
    as when the GPU is idle between all calls."""
    x, *parameters = random_on_gpu((1, channels, heads, side, side), torch.float16)
    image = kernels.channel_last(x)
    sizes = (1, heads, channels // heads, side, side)
    workspace = kernels.poisoned(workspace_bytes(x.dtype, *sizes) // 4, dtype=torch.float32)

    def run(calls, finish):
        buffers = image.clone(), torch.empty_like(image)
        torch.cuda.synchronize()
        for call in range(calls):
            source, target = buffers[call % 2], buffers[1 - call % 2]
            arguments = (source, *parameters, target, workspace, *sizes, 1e-5, True)
            kernels.launch("transposed_attention_block", x.dtype, *arguments)
            finish()
        torch.cuda.synchronize()
        return buffers[calls % 2]

    y = run(16, lambda: None)
    assert y.isfinite().all()
    assert torch.equal(y, run(16, torch.cuda.synchronize))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_workspace_for_the_largest_image_is_enough_for_smaller_ones(dtype):
    smaller, larger = (1, 1, 1), (300, 720, 1280)  # batch, height, width
    usual = (2, 100, 60)
    for heads, head_channels in ((1, 48), (1, 96), (4, 48), (3, 17)):
        for axis in range(3):
            for others in (smaller, usual, larger):
                needed = [
                    workspace_bytes(dtype, *sizes[:1], heads, head_channels, *sizes[1:])
                    for size in range(smaller[axis], larger[axis] + 1, 1 + larger[axis] // 500)
                    for sizes in [(*others[:axis], size, *others[axis + 1 :])]
                ]
                assert needed == sorted(needed)


@pytest.mark.gpu
def test_kernel_refuses_more_channels_than_it_has_room_for():
    with pytest.raises(RuntimeError, match="CUDA error 1"):
        launched(*random_on_gpu((1, 129, 1, 2, 2), torch.float32))
