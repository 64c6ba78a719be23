import numpy as np
import pytest
import torch

from models.restormer.network import ChannelLayerNorm
from plugins import find, kernels
from plugins.channel_layer_norm.reference import channel_layer_norm
from plugins.testing import assert_close, export_graph, grafted, run_function

PLUGIN = find("channel_layer_norm")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("subtract_mean", [1, 0])
@pytest.mark.parametrize("shape", [(1, 48, 1, 1), (2, 6, 5, 7), (1, 384, 3, 2), (3, 1, 4, 4)])
def test_function_is_the_reference(shape, subtract_mean, dtype):
    random = np.random.default_rng(0)
    inputs = {
        "x": (3 * random.standard_normal(shape) + 1).astype(dtype),
        "weight": random.standard_normal(shape[1]).astype(dtype),
        "bias": random.standard_normal(shape[1]).astype(dtype),
    }
    (actual,) = run_function(PLUGIN, inputs, epsilon=1e-5, subtract_mean=subtract_mean)
    x, weight, bias = (torch.from_numpy(values) for values in inputs.values())
    assert_close(actual, channel_layer_norm(x, weight, bias, 1e-5, bool(subtract_mean)))


def test_large_values_do_not_overflow_in_fp16():
    """Squares beyond 65504 are summed in FP32."""
    x = np.linspace(-3000, 3000, 64, dtype=np.float16).reshape(1, 64, 1, 1)
    ones = np.ones(64, np.float16)
    (actual,) = run_function(PLUGIN, {"x": x, "weight": ones, "bias": 0 * ones}, epsilon=1e-5, subtract_mean=1)
    x64 = x.astype(np.float64)
    assert_close(actual, ((x64 - x64.mean()) / x64.std()).astype(np.float16))


@pytest.mark.parametrize("norm_bias", [True, False])
def test_pattern_replaces_the_networks_norm(norm_bias):
    torch.manual_seed(0)
    norm = ChannelLayerNorm(12, norm_bias)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    graph = export_graph(norm, ("batch", 12, "h", "w"), {"batch": 2, "h": 6, "w": 10})
    (match,) = PLUGIN.pattern.matches(graph)
    assert match.attributes["subtract_mean"] == norm_bias
    assert match.attributes["epsilon"] == pytest.approx(1e-5)
    x = torch.randn(3, 12, 5, 7)
    (actual,) = grafted(graph, PLUGIN, [match]).run(None, {"x": x.numpy()})
    with torch.inference_mode():
        assert_close(actual, norm(x))


def test_pattern_refuses_a_norm_over_pixels():
    class OverPixels(ChannelLayerNorm):
        def forward(self, x):
            return self.body(x.flatten(2)).unflatten(2, (3, 4))

    graph = export_graph(OverPixels(12, True), ("batch", 5, 3, 4), {"batch": 2})
    assert any(node.op == "Sqrt" for node in graph.nodes)
    assert PLUGIN.pattern.matches(graph) == []


def launch(x, weight, bias, epsilon, subtract_mean):
    """The kernel's y (B, C, H, W) of x (B, C, H, W)."""
    batch, channels, height, width = x.shape
    image = kernels.channel_last(x)
    y = kernels.poisoned(image.numel() + 64, dtype=x.dtype)
    pixels = batch * height * width
    kernels.launch("channel_layer_norm", x.dtype, image, weight, bias, y, pixels, channels, epsilon, subtract_mean)
    assert y[image.numel() :].isnan().all()  # nothing behind the end
    return kernels.channel_first(y[: image.numel()].view(image.shape), channels)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("subtract_mean", [True, False])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (3, 1, 4, 4), (2, 3, 5, 7), (2, 6, 5, 7), (1, 7, 3, 43), (1, 16, 9, 5), (2, 25, 7, 3), (1, 47, 5, 5)]
    + [(1, 48, 1, 1), (1, 64, 3, 11), (1, 96, 1, 1), (2, 96, 64, 72), (2, 127, 3, 5), (1, 192, 5, 7), (1, 200, 3, 3)]
    + [(1, 384, 3, 2), (3, 385, 1, 3), (1, 769, 2, 2), (1, 1024, 3, 1), (2, 2047, 2, 3), (1, 2048, 3, 1)]
    + [(1, 48, 256, 256), (1, 96, 128, 128), (1, 192, 64, 64), (1, 384, 32, 32), (1, 48, 720, 1280), (2, 0, 3, 3)],
)
def test_kernel_is_the_reference(shape, subtract_mean, dtype):
    torch.manual_seed(0)
    x = (3 * torch.randn(shape, device="cuda") + 30).to(dtype)  # a mean that dwarfs the deviation
    weight, bias = (torch.randn(shape[1], device="cuda").clamp(-1, 1).to(dtype) for _ in range(2))
    y = launch(x, weight, bias, 1e-5, subtract_mean)
    kernels.assert_close(y, channel_layer_norm(x, weight, bias, 1e-5, subtract_mean))
    with kernels.busy_memory():
        assert torch.equal(y, launch(x, weight, bias, 1e-5, subtract_mean))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("subtract_mean", [True, False])
@pytest.mark.parametrize("channels", [3, 48, 50])
def test_kernel_on_constant_and_on_large_values(channels, subtract_mean, dtype):
    shape = (1, channels, 8, 9)
    ones = torch.ones(channels, dtype=dtype, device="cuda")
    for x in (torch.full(shape, 7.0), torch.zeros(shape), 30000 * torch.randn(shape).clamp(-2, 2)):
        x = x.to("cuda", dtype)
        y = launch(x, ones, 0 * ones, 1e-5, subtract_mean)
        kernels.assert_close(y, channel_layer_norm(x, ones, 0 * ones, 1e-5, subtract_mean))


@pytest.mark.gpu
def test_kernel_refuses_pixels_that_do_not_fit_registers():
    x = torch.zeros(1, 2049, 1, 1, device="cuda")
    with pytest.raises(RuntimeError):
        launch(x, x.flatten(), x.flatten(), 1e-5, True)
