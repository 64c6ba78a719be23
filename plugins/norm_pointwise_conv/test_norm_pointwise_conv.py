import math

import numpy as np
import pytest
import torch
from torch import nn

from models.restormer.network import Architecture, ChannelLayerNorm, TransformerBlock
from plugins import find, kernels
from plugins.norm_pointwise_conv.reference import norm_pointwise_conv
from plugins.testing import assert_close, export_graph, grafted, run_function

PLUGIN = find("norm_pointwise_conv")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("subtract_mean", [1, 0])
@pytest.mark.parametrize(("shape", "outputs"), [((1, 48, 1, 1), 144), ((2, 6, 5, 7), 9), ((1, 96, 3, 2), 288)])
def test_function_is_the_reference(shape, outputs, subtract_mean, dtype):
    random = np.random.default_rng(0)
    channels = shape[1]
    inputs = {
        "x": (3 * random.standard_normal(shape) + 1).astype(dtype),
        "norm_weight": random.standard_normal(channels).astype(dtype),
        "norm_bias": random.standard_normal(channels).astype(dtype),
        "weight": (random.standard_normal((outputs, channels, 1, 1)) / math.sqrt(channels)).astype(dtype),
        "bias": random.standard_normal(outputs).astype(dtype),
    }
    (actual,) = run_function(PLUGIN, inputs, epsilon=1e-5, subtract_mean=subtract_mean)
    tensors = (torch.from_numpy(values) for values in inputs.values())
    assert_close(actual, norm_pointwise_conv(*tensors, 1e-5, bool(subtract_mean)))


@pytest.mark.parametrize("norm_bias", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_pattern_replaces_the_networks_norms(bias, norm_bias):
    torch.manual_seed(0)
    block = TransformerBlock(12, 2, Architecture(bias=bias, norm_bias=norm_bias))
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    graph = export_graph(block, ("batch", 12, "h", "w"), {"batch": 2, "h": 6, "w": 10})
    matches = PLUGIN.pattern.matches(graph)
    assert [match.inputs[3].shape for match in matches] == [[36, 12, 1, 1], [62, 12, 1, 1]]
    for match in matches:
        assert match.attributes["subtract_mean"] == norm_bias
        assert match.attributes["epsilon"] == pytest.approx(1e-5)
    x = torch.randn(3, 12, 5, 7)
    (actual,) = grafted(graph, PLUGIN, matches).run(None, {"x": x.numpy()})
    with torch.inference_mode():
        assert_close(actual, block(x))


@pytest.mark.parametrize("options", [{"stride": 2}, {"padding": 1}, {"groups": 2}, {"kernel_size": 3}], ids=str)
def test_pattern_refuses_other_convolutions(options):
    conv = nn.Conv2d(12, 24, **{"kernel_size": 1, **options})
    module = nn.Sequential(ChannelLayerNorm(12, True), conv)
    graph = export_graph(module, ("batch", 12, "h", "w"), {"batch": 2, "h": 6, "w": 10}, multiple_of=2)
    assert any(node.op == "Conv" for node in graph.nodes)
    assert PLUGIN.pattern.matches(graph) == []


def random_on_gpu(shape, outputs, dtype):
    torch.manual_seed(0)
    channels = shape[1]
    x = 3 * torch.randn(shape, device="cuda") + 10
    norm_weight, norm_bias = (torch.randn(channels, device="cuda").clamp(-1, 1) for _ in range(2))
    weight = torch.randn(outputs, channels, 1, 1, device="cuda") / math.sqrt(channels)
    bias = torch.randn(outputs, device="cuda")
    return [values.to(dtype) for values in (x, norm_weight, norm_bias, weight, bias)]


def launch(x, norm_weight, norm_bias, weight, bias, subtract_mean):
    """The kernel's y (B, N, H, W) of x (B, C, H, W); it writes nothing behind the end, and the same in every run."""
    batch, channels, height, width = x.shape
    image, outputs = kernels.channel_last(x), len(weight)
    shape = (batch, height, width, kernels.pitch(outputs, x.dtype))
    elements = math.prod(shape)

    def run():
        y = kernels.poisoned(elements + 64, dtype=x.dtype)
        parameters = (norm_weight, norm_bias, weight, bias)
        sizes = (batch * height * width, channels, outputs)
        kernels.launch("norm_pointwise_conv", x.dtype, image, *parameters, y, *sizes, 1e-5, subtract_mean)
        assert y[elements:].isnan().all()
        return y[:elements]

    y = run()
    with kernels.busy_memory():
        assert torch.equal(y, run())
    return kernels.channel_first(y.view(shape), outputs)


def expected_in_fp64(x, norm_weight, norm_bias, weight, bias, subtract_mean):
    """The reference, which computes in FP32 only, in FP64."""
    x, weight = x.double().flatten(2), weight.double().flatten(1)
    variance, mean = torch.var_mean(x, dim=1, unbiased=False, keepdim=True)
    normalised = (x - mean if subtract_mean else x) / (variance + 1e-5).sqrt()
    normalised = normalised * norm_weight.double()[:, None] + norm_bias.double()[:, None]
    return weight @ normalised + bias.double()[:, None]


def check(inputs, subtract_mean):
    """The kernel is within its tolerance; on the GPU, since the images are large."""
    expected = expected_in_fp64(*inputs, subtract_mean)
    y = launch(*inputs, subtract_mean).flatten(2)
    assert y.shape == expected.shape
    assert y.isfinite().all()
    if y.numel():
        error = (y.double() - expected).abs().max()
        assert error <= kernels.TOLERANCE[y.dtype] * max(1.0, float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("subtract_mean", [True, False])
@pytest.mark.parametrize(
    ("shape", "outputs"),
    [((1, 1, 1, 1), 1), ((3, 1, 4, 4), 8), ((2, 3, 5, 7), 3), ((2, 6, 5, 7), 17), ((1, 7, 3, 43), 31)]
    + [((1, 16, 9, 5), 48), ((2, 25, 7, 3), 50), ((1, 32, 33, 17), 33), ((1, 33, 5, 5), 144), ((1, 47, 5, 5), 71)]
    + [((1, 64, 3, 11), 16), ((1, 65, 40, 13), 95), ((2, 96, 64, 72), 288), ((2, 97, 3, 5), 98), ((1, 128, 9, 9), 352)]
    + [((1, 129, 3, 5), 65), ((1, 192, 5, 7), 577), ((1, 193, 3, 3), 80), ((1, 256, 17, 8), 700), ((1, 257, 5, 5), 15)]
    + [((1, 383, 3, 47), 24), ((1, 384, 31, 33), 1200), ((1, 385, 3, 3), 40), ((2, 769, 2, 2), 70)]
    + [((1, 1024, 3, 1), 9), ((1, 2047, 3, 7), 100), ((1, 2048, 3, 1), 64), ((0, 48, 3, 3), 144), ((1, 9, 90, 91), 10)],
)
def test_kernel_is_the_reference(shape, outputs, subtract_mean, dtype):
    check(random_on_gpu(shape, outputs, dtype), subtract_mean)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(
    ("channels", "side", "outputs"),
    [(48, 256, 144), (48, 256, 256), (96, 256, 288), (96, 256, 512), (96, 128, 288), (96, 128, 512)]
    + [(192, 64, 576), (192, 64, 1024), (384, 32, 1152), (384, 32, 2048)],
)
def test_kernel_is_the_reference_at_restormers_sizes(channels, side, outputs, batch, dtype):
    check(random_on_gpu((batch, channels, side, side), outputs, dtype), True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("shape", "outputs"),
    [((1, 48, 720, 1280), 144), ((1, 48, 720, 1280), 256)]
    # some warps have no pixels of the last tile
    + [((1, 48, 719, 1279), 144), ((1, 96, 359, 641), 288), ((3, 192, 63, 65), 576), ((8, 96, 127, 129), 512)],
)
def test_kernel_is_the_reference_on_a_large_image(shape, outputs, dtype):
    check(random_on_gpu(shape, outputs, dtype), True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("subtract_mean", [True, False])
@pytest.mark.parametrize("channels", [3, 48, 50, 96, 192, 384, 400])
def test_kernel_on_constant_and_on_large_values(channels, subtract_mean, dtype):
    x, *parameters = random_on_gpu((1, channels, 20, 30), 96, dtype)
    cases = [0 * x, 0 * x + 7, 60000 * (torch.rand_like(x) - 0.5)]
    if subtract_mean:
        cases.append(0 * x + 30000)  # 30000 / √epsilon would leave FP16
    for case in cases:
        check([case, *parameters], subtract_mean)
