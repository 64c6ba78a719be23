import math

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch
from torch import nn

from models.restormer.network import Architecture, TransformerBlock
from plugins import find, kernels
from plugins.pointwise_conv_residual.reference import pointwise_conv_residual
from plugins.testing import assert_close, export_graph, grafted, run_function

PLUGIN = find("pointwise_conv_residual")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("shape", "outputs"), [((1, 128, 1, 1), 48), ((2, 6, 5, 7), 9), ((1, 96, 3, 2), 96)])
def test_function_is_the_reference(shape, outputs, dtype):
    random = np.random.default_rng(0)
    inputs = {
        "x": random.standard_normal(shape).astype(dtype),
        "weight": (random.standard_normal((outputs, shape[1], 1, 1)) / math.sqrt(shape[1])).astype(dtype),
        "bias": random.standard_normal(outputs).astype(dtype),
        "residual": random.standard_normal((shape[0], outputs, *shape[2:])).astype(dtype),
    }
    (actual,) = run_function(PLUGIN, inputs)
    assert_close(actual, pointwise_conv_residual(*(torch.from_numpy(values) for values in inputs.values())))


@pytest.mark.parametrize("bias", [True, False])
def test_pattern_replaces_the_networks_residual_connections(bias):
    torch.manual_seed(0)
    block = TransformerBlock(12, 2, Architecture(bias=bias))
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    graph = export_graph(block, ("batch", 12, "h", "w"), {"batch": 2, "h": 6, "w": 10})
    matches = PLUGIN.pattern.matches(graph)
    assert [match.inputs[1].shape for match in matches] == [[12, 12, 1, 1], [12, 31, 1, 1]]
    x = torch.randn(3, 12, 5, 7)
    (actual,) = grafted(graph, PLUGIN, matches).run(None, {"x": x.numpy()})
    with torch.inference_mode():
        assert_close(actual, block(x))


class Residual(nn.Module):
    """The pattern, and variants of it."""

    def __init__(self, outputs=12, swapped=False, reused=False, **options):
        super().__init__()
        self.conv = nn.Conv2d(12, outputs, **{"kernel_size": 1, **options})
        self.swapped, self.reused = swapped, reused

    def forward(self, x):
        z = self.conv(x)
        y = z + x.sin() if self.swapped else x.sin() + z
        return y * z if self.reused else y


def export_residual(**options):
    return export_graph(Residual(**options), ("batch", 12, "h", "w"), {"batch": 2, "h": 6, "w": 10})


@pytest.mark.parametrize("swapped", [True, False])
def test_pattern_takes_the_operands_in_both_orders(swapped):
    (match,) = PLUGIN.pattern.matches(export_residual(swapped=swapped))
    assert match.inputs[0].name == "x"
    assert match.inputs[3].inputs[0].op == "Sin"


@pytest.mark.parametrize(
    "options", [{"reused": True}, {"outputs": 1}, {"groups": 2}, {"kernel_size": 3, "padding": 1}], ids=str
)
def test_pattern_refuses_what_it_does_not_compute(options):
    graph = export_residual(**options)
    assert any(node.op == "Add" for node in graph.nodes)
    assert PLUGIN.pattern.matches(graph) == []


def test_pattern_refuses_a_convolution_whose_result_is_an_output():
    graph = export_residual()
    conv = next(node for node in graph.nodes if node.op == "Conv")
    graph.outputs.append(conv.outputs[0])
    assert isinstance(conv.outputs[0], gs.Variable)
    assert PLUGIN.pattern.matches(graph) == []


def random_on_gpu(shape, outputs, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape, device="cuda")
    weight = torch.randn(outputs, shape[1], 1, 1, device="cuda") / math.sqrt(shape[1])
    bias = torch.randn(outputs, device="cuda")
    residual = torch.randn(shape[0], outputs, *shape[2:], device="cuda")
    return [values.to(dtype) for values in (x, weight, bias, residual)]


def launch(x, weight, bias, residual):
    """The kernel's y (B, N, H, W) of x (B, K, H, W); it writes nothing behind the end, and the same in every run."""
    batch, channels, height, width = x.shape
    image, added, outputs = kernels.channel_last(x), kernels.channel_last(residual), len(weight)

    def run():
        y = kernels.poisoned(added.numel() + 64, dtype=x.dtype)
        sizes = (batch * height * width, channels, outputs)
        kernels.launch("pointwise_conv_residual", x.dtype, image, weight, bias, added, y, *sizes)
        assert y[added.numel() :].isnan().all()
        return y[: added.numel()]

    y = run()
    with kernels.busy_memory():
        assert torch.equal(y, run())
    return kernels.channel_first(y.view(added.shape), outputs)


def check(inputs):
    """The kernel is within its tolerance of FP64; on the GPU, since the images are large."""
    x, weight, bias, residual = (values.double() for values in inputs)
    expected = residual.flatten(2) + weight.flatten(1) @ x.flatten(2) + bias[:, None]
    y = launch(*inputs).flatten(2)
    assert y.shape == expected.shape
    assert y.isfinite().all()
    if y.numel():
        error = (y.double() - expected).abs().max()
        assert error <= kernels.TOLERANCE[y.dtype] * max(1.0, float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("shape", "outputs"),
    [((1, 1, 1, 1), 1), ((3, 1, 4, 4), 8), ((2, 3, 5, 7), 3), ((2, 6, 5, 7), 17), ((1, 7, 3, 43), 31)]
    + [((1, 16, 9, 5), 48), ((2, 25, 7, 3), 49), ((1, 32, 33, 17), 33), ((1, 33, 5, 5), 144), ((1, 47, 5, 5), 71)]
    + [((1, 64, 160, 163), 64), ((1, 65, 40, 13), 95), ((2, 96, 64, 72), 96), ((2, 97, 3, 5), 98), ((1, 352, 9, 9), 99)]
    + [((1, 129, 183, 170), 50), ((1, 255, 5, 7), 97), ((1, 512, 31, 33), 193), ((1, 1021, 17, 8), 384)]
    + [((1, 1024, 130, 129), 40), ((1, 2047, 3, 7), 100), ((1, 2048, 30, 31), 48), ((1, 4096, 3, 5), 60)]
    + [((0, 48, 3, 3), 48), ((1, 9, 90, 91), 10)]
    + [((1, 128, 1, 1), 48), ((3, 128, 61, 67), 48), ((1, 256, 31, 9), 96), ((1, 256, 190, 191), 96)]
    + [((2, 512, 31, 17), 192), ((1, 512, 131, 133), 192), ((1, 1024, 11, 13), 384)],
)
def test_kernel_is_the_reference(shape, outputs, dtype):
    check(random_on_gpu(shape, outputs, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(
    ("channels", "side", "outputs"),
    [(48, 256, 48), (128, 256, 48), (96, 256, 96), (256, 256, 96), (96, 128, 96), (256, 128, 96)]
    + [(192, 64, 192), (512, 64, 192), (384, 32, 384), (1024, 32, 384)],
)
def test_kernel_is_the_reference_at_restormers_sizes(channels, side, outputs, batch, dtype):
    check(random_on_gpu((batch, channels, side, side), outputs, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels", [48, 128])
def test_kernel_is_the_reference_on_a_large_image(channels, dtype):
    check(random_on_gpu((1, channels, 720, 1280), 48, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("channels", "outputs"), [(3, 5), (48, 48), (256, 96), (1024, 384)])
def test_kernel_on_zero_constant_and_large_values(channels, outputs, dtype):
    x, weight, bias, residual = random_on_gpu((1, channels, 20, 30), outputs, dtype)
    large = 10000 * residual.clamp(-3, 3)
    for case, added in ((0 * x, residual), (0 * x + 7, 0 * residual), (x, large), (1000 * x, large)):
        check([case, weight, bias, added])
