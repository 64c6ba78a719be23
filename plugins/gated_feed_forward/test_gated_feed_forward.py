import ctypes
import math

import onnx_graphsurgeon as gs
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.restormer.network import Architecture, ChannelLayerNorm, GatedFeedForward, TransformerBlock
from plugins import find, kernels
from plugins.gated_feed_forward.reference import gated_feed_forward
from plugins.testing import assert_close, export_graph, grafted, run_function

PLUGIN = find("gated_feed_forward")
PARTS = ("channel_layer_norm", "norm_pointwise_conv", "gated_depthwise_conv", "pointwise_conv_residual")


def random_tensors(shape, hidden, dtype, device="cpu"):
    """x, norm_weight, norm_bias, project_in and its bias, depthwise and its bias, project_out and its bias."""
    torch.manual_seed(0)
    channels = shape[1]

    def normal(*sizes, over=1.0):
        return torch.randn(sizes, device=device) / math.sqrt(over)

    tensors = (
        3 * normal(*shape) + 1,
        normal(channels).clamp(-1, 1),
        normal(channels).clamp(-1, 1),
        normal(2 * hidden, channels, 1, 1, over=channels),
        normal(2 * hidden),
        normal(2 * hidden, 1, 3, 3, over=9),
        normal(2 * hidden),
        normal(channels, hidden, 1, 1, over=hidden),
        normal(channels),
    )
    return [values.to(dtype) for values in tensors]


NAMES = (
    "x",
    "norm_weight",
    "norm_bias",
    "project_in",
    "project_in_bias",
    "depthwise",
    "depthwise_bias",
    "project_out",
    "project_out_bias",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("subtract_mean", [1, 0])
@pytest.mark.parametrize(("shape", "hidden"), [((1, 48, 1, 1), 127), ((2, 6, 5, 7), 9), ((1, 96, 3, 2), 256)])
def test_function_is_the_reference(shape, hidden, subtract_mean, dtype):
    tensors = random_tensors(shape, hidden, dtype)
    inputs = {name: values.numpy() for name, values in zip(NAMES, tensors, strict=True)}
    attributes = {"epsilon": 1e-5, "subtract_mean": subtract_mean, "channels": 2 * hidden}
    (actual,) = run_function(PLUGIN, inputs, **attributes)
    assert_close(actual, gated_feed_forward(*tensors, 1e-5, bool(subtract_mean)))


@pytest.mark.parametrize("norm_bias", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_pattern_replaces_the_networks_feed_forward(bias, norm_bias):
    torch.manual_seed(0)
    block = TransformerBlock(12, 2, Architecture(bias=bias, norm_bias=norm_bias))
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    graph = export_graph(block, ("batch", 12, "h", "w"), {"batch": 2, "h": 6, "w": 10})
    (match,) = PLUGIN.pattern.matches(graph)
    assert [list(values.shape) for values in match.inputs[1:]] == (
        [[12], [12], [62, 12, 1, 1], [62], [62, 1, 3, 3], [62], [12, 31, 1, 1], [12]]
    )
    assert match.attributes == {"epsilon": pytest.approx(1e-5), "subtract_mean": norm_bias, "channels": 62}
    x = torch.randn(3, 12, 5, 7)
    (actual,) = grafted(graph, PLUGIN, [match]).run(None, {"x": x.numpy()})
    with torch.inference_mode():
        assert_close(actual, block(x))


def test_reach_exceeds_that_of_the_parts():
    assert all(PLUGIN.reach > find(name).reach for name in PARTS)


class Block(nn.Module):
    """The pattern, and variants of it."""

    def __init__(self, swapped=False, residual="x", reused=None):
        super().__init__()
        self.norm, self.feed_forward = ChannelLayerNorm(8, True), GatedFeedForward(8, 2, bias=False)
        self.swapped, self.residual = swapped, residual
        self.kept = None
        if reused is not None:  # what goes into one of its convolutions
            getattr(self.feed_forward, reused).register_forward_pre_hook(self.keep)

    def keep(self, module, arguments):
        (self.kept,) = arguments

    def forward(self, x):
        y = self.feed_forward(self.norm(x))
        if self.residual != "none":
            residual = x if self.residual == "x" else x.sin()
            y = y + residual if self.swapped else residual + y
        return y if self.kept is None else y * self.kept[:, :8]


def export_block(**options):
    return export_graph(Block(**options), ("batch", 8, "h", "w"), {"batch": 2, "h": 6, "w": 10})


@pytest.mark.parametrize("swapped", [True, False])
def test_pattern_takes_the_operands_in_both_orders(swapped):
    (match,) = PLUGIN.pattern.matches(export_block(swapped=swapped))
    assert match.inputs[0].name == "x"


@pytest.mark.parametrize(
    "options", [{"residual": "another"}, {"residual": "none"}, {"reused": "dwconv"}, {"reused": "project_out"}], ids=str
)
def test_pattern_refuses_what_it_does_not_compute(options):
    graph = export_block(**options)
    assert len(find("gated_depthwise_conv").pattern.matches(graph)) == 1
    assert PLUGIN.pattern.matches(graph) == []


@pytest.mark.parametrize("index", [0, 1, 2])
def test_pattern_refuses_outputs_on_its_way(index):
    graph = export_block()
    (match,) = PLUGIN.pattern.matches(graph)
    convolutions = [node for node in match.nodes if node.op == "Conv"]
    assert len(convolutions) == 3
    shape = list(match.inputs[(3, 5, 7)[index]].shape)
    (conv,) = (node for node in convolutions if list(node.inputs[1].shape) == shape)
    graph.outputs.append(conv.inputs[0] if index == 2 else conv.outputs[0])
    assert isinstance(graph.outputs[-1], gs.Variable)
    assert len(PLUGIN.pattern.matches(graph)) == (1 if index == 1 else 0)


def workspace_bytes(*sizes):
    function = kernels.library().gated_feed_forward_workspace_bytes
    function.restype = ctypes.c_int64
    return function(*map(ctypes.c_int64, sizes))


def launched(inputs, subtract_mean=True):
    """The kernels' y (B, C, H, W); they write neither behind y nor behind their workspace, the same in every run."""
    x, *parameters = inputs
    batch, channels, height, width = x.shape
    hidden = parameters[6].shape[1]
    image = kernels.channel_last(x)
    floats = -(-workspace_bytes(batch, height, width, hidden) // 4)

    def run():
        workspace = kernels.poisoned(floats + 64, dtype=torch.float32)
        y = kernels.poisoned(image.numel() + 64, dtype=x.dtype)
        sizes = (batch, height, width, channels, hidden)
        kernels.launch("gated_feed_forward", x.dtype, image, *parameters, y, workspace, *sizes, 1e-5, subtract_mean)
        assert workspace[floats:].isnan().all()
        assert y[image.numel() :].isnan().all()
        return y[: image.numel()]

    y = run()
    with kernels.busy_memory():
        assert torch.equal(y, run())  # no atomics: bit by bit
    return kernels.channel_first(y.view(image.shape), channels)


def expected_in_fp64(inputs, subtract_mean=True):
    """The reference, which computes in FP32 only, in FP64."""
    x, norm_weight, norm_bias, project_in, bias_in, depthwise, depthwise_bias, project_out, bias_out = (
        values.double() for values in inputs
    )
    variance, mean = torch.var_mean(x, dim=1, unbiased=False, keepdim=True)
    normalised = (x - mean if subtract_mean else x) / (variance + 1e-5).sqrt()
    normalised = normalised * norm_weight[:, None, None] + norm_bias[:, None, None]
    z = F.conv2d(normalised, project_in, bias_in)
    gate, value = F.conv2d(z, depthwise, depthwise_bias, padding=1, groups=len(depthwise)).chunk(2, dim=1)
    return x + F.conv2d(F.gelu(gate) * value, project_out, bias_out)


def check(inputs, subtract_mean=True):
    """The kernels are within their tolerance of FP64; on the GPU, since the images are large."""
    expected = expected_in_fp64(inputs, subtract_mean)
    y = launched(inputs, subtract_mean)
    assert y.shape == expected.shape
    assert y.isfinite().all()
    if y.numel():
        error = (y.double() - expected).abs().max()
        assert error <= kernels.TOLERANCE[y.dtype] * max(1.0, float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("subtract_mean", [True, False])
@pytest.mark.parametrize(
    ("shape", "hidden"),
    [((1, 1, 1, 1), 1), ((0, 48, 3, 3), 128), ((2, 3, 5, 7), 4), ((1, 12, 3, 43), 31), ((2, 47, 9, 5), 8)]
    # tiles: whole, beyond the image, several, images of a row, a column, a pixel
    + [((1, 48, 16, 32), 128), ((1, 48, 1, 1), 128), ((2, 48, 1, 50), 16), ((1, 48, 50, 1), 24), ((1, 40, 37, 70), 40)]
    + [((1, 8, 5, 7), 8), ((1, 24, 17, 33), 128), ((3, 96, 20, 35), 256), ((1, 64, 33, 31), 56), ((1, 72, 9, 65), 8)]
    + [((1, 192, 20, 35), 512), ((2, 104, 16, 17), 40), ((1, 128, 34, 15), 344), ((1, 384, 9, 35), 1024)]
    + [((2, 200, 8, 16), 24), ((1, 376, 17, 18), 104), ((1, 392, 9, 9), 16), ((1, 48, 12, 20), 127)]
    # strips of rows
    + [((2, 6, 32, 5), 10), ((1, 6, 33, 5), 10), ((1, 5, 34, 3), 7), ((1, 5, 35, 3), 7), ((2, 3, 97, 4), 5)],
)
def test_kernel_is_the_reference(shape, hidden, subtract_mean, dtype):
    check(random_tensors(shape, hidden, dtype, "cuda"), subtract_mean)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("channels", "hidden", "side"),
    [(48, 128, 256), (96, 256, 256), (96, 256, 128), (192, 512, 64), (384, 1024, 32)],
)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_kernel_is_the_reference_at_restormers_sizes(channels, hidden, side, batch, dtype):
    check(random_tensors((batch, channels, side, side), hidden, dtype, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("shape", "hidden"),
    [((1, 48, 720, 1280), 128), ((1, 96, 360, 640), 256), ((1, 384, 90, 160), 1024)]
    # the demo's: some warps have channels at first, and none later
    + [((1, 16, 720, 1280), 40), ((1, 32, 720, 1280), 80), ((1, 32, 640, 816), 80), ((1, 64, 180, 320), 160)]
    + [((1, 16, 640, 816), 72), ((1, 64, 360, 640), 136)],
)
def test_kernel_is_the_reference_on_a_large_image(shape, hidden, dtype):
    check(random_tensors(shape, hidden, dtype, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("subtract_mean", [True, False])
@pytest.mark.parametrize(("channels", "hidden"), [(3, 5), (48, 128), (96, 64), (192, 64), (384, 32)])
def test_kernel_on_constant_and_on_large_values(channels, hidden, subtract_mean, dtype):
    x, *parameters = random_tensors((1, channels, 20, 30), hidden, dtype, "cuda")
    cases = [0 * x, 20000 * (torch.rand_like(x) - 0.5)]
    # what is not subtracted is divided by √epsilon, and gates are multiplied by values
    cases += [0 * x + value for value in ((7, 20000) if subtract_mean else (0.02,))]
    for case in cases:
        check([case, *parameters], subtract_mean)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("channels", "hidden"), [(6, 10), (48, 48), (384, 64)])
def test_kernel_passes_or_stops_large_gates(channels, hidden, dtype):
    """Gates up to some thousands, of either sign, times values near one."""
    x, *parameters = random_tensors((1, channels, 20, 34), hidden, dtype, "cuda")
    parameters[4][:hidden] *= 1000  # the gate's depthwise weights, and those of the values
    parameters[4][hidden:] *= 0.1
    check([x, *parameters])


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [48, 96, 192, 384])
@pytest.mark.parametrize(("value", "gated"), [(torch.inf, torch.inf), (-torch.inf, 0.0), (torch.nan, torch.nan)])
def test_gelu_of_what_is_not_finite(channels, value, gated):
    """Gates of inf pass, those of −inf stop, and NaN does not vanish."""
    inputs = random_tensors((1, channels, 8, 8), 16, torch.float16, "cuda")
    inputs[6][:16] = value  # the gate's depthwise biases
    inputs[5][16:] = 0  # values of one
    inputs[6][16:] = 1
    inputs[7][:] = 1
    inputs[8][:] = 0
    y = launched_once(inputs)
    expected = inputs[0].float() + 16 * gated
    torch.testing.assert_close(y.float(), expected, rtol=2e-3, atol=2e-3, equal_nan=True)


def launched_once(inputs):
    """As `launched`, where NaN may be right."""
    x, *parameters = inputs
    batch, channels, height, width = x.shape
    image, hidden = kernels.channel_last(x), parameters[6].shape[1]
    workspace = kernels.poisoned(workspace_bytes(batch, height, width, hidden), dtype=torch.float32)
    y = kernels.poisoned(image.numel(), dtype=x.dtype)
    sizes = (batch, height, width, channels, hidden)
    kernels.launch("gated_feed_forward", x.dtype, image, *parameters, y, workspace, *sizes, 1e-5, True)
    return y.view(image.shape).permute(0, 3, 1, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels", [6, 48, 96, 192, 384])
def test_kernel_pads_behind_the_first_convolution(channels, dtype):
    """Outside of the image z is 0, not project_in's bias."""
    inputs = random_tensors((1, channels, 18, 34), 16, dtype, "cuda")
    inputs[3][:] = 0
    inputs[4] += 5
    check(inputs)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("channels", "hidden", "side"), [(48, 128, 256), (96, 256, 128), (192, 512, 64), (384, 1024, 32)]
)
def test_kernels_that_follow_each_other_wait(channels, hidden, side):
    """Each takes what the one before it has just written, and writes where the one before that has read; bit by bit
    as when the GPU is idle between all calls."""
    x, *parameters = random_tensors((1, channels, side, side), hidden, torch.float16, "cuda")
    image = kernels.channel_last(x)
    workspace = kernels.poisoned(workspace_bytes(1, side, side, hidden) // 4, dtype=torch.float32)
    sizes = (1, side, side, channels, hidden)

    def run(calls, finish):
        buffers = image.clone(), torch.empty_like(image)
        torch.cuda.synchronize()
        for call in range(calls):
            source, target = buffers[call % 2], buffers[1 - call % 2]
            kernels.launch("gated_feed_forward", x.dtype, source, *parameters, target, workspace, *sizes, 1e-5, True)
            finish()
        torch.cuda.synchronize()
        return buffers[calls % 2]

    y = run(16, lambda: None)
    assert y.isfinite().all()
    assert torch.equal(y, run(16, torch.cuda.synchronize))


@pytest.mark.gpu
def test_workspace_for_the_largest_image_is_enough_for_smaller_ones():
    smaller, usual, larger = (1, 1, 1, 1), (2, 40, 60, 128), (20, 400, 700, 1100)  # batch, height, width, hidden
    for axis in range(4):
        for others in (smaller, usual, larger):
            needed = [
                workspace_bytes(*others[:axis], size, *others[axis + 1 :])
                for size in range(smaller[axis], larger[axis] + 1)
            ]
            assert needed == sorted(needed)
