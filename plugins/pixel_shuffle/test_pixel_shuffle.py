import math

import numpy as np
import pytest
import torch

from plugins import find, kernels
from plugins.pixel_shuffle.reference import pixel_shuffle
from plugins.testing import assert_close, export_graph, grafted, run_function

PLUGIN = find("pixel_shuffle")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("shape", "factor"), [((1, 96, 1, 1), 2), ((2, 4, 3, 5), 2), ((3, 18, 2, 7), 3)])
def test_function_is_the_reference(shape, factor, dtype):
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    (actual,) = run_function(PLUGIN, {"x": x}, factor=factor)
    np.testing.assert_array_equal(actual, pixel_shuffle(torch.from_numpy(x), factor).numpy())


def test_pattern_replaces_an_exported_pixel_shuffle():
    module = torch.nn.PixelShuffle(2)
    graph = export_graph(module, ("batch", 12, "h", "w"), {"batch": 2, "h": 6, "w": 10})
    (match,) = PLUGIN.pattern.matches(graph)
    assert match.attributes == {"factor": 2}
    x = torch.randn(3, 12, 5, 7)
    (actual,) = grafted(graph, PLUGIN, [match]).run(None, {"x": x.numpy()})
    assert_close(actual, module(x))


def test_pattern_refuses_the_other_channel_order():
    graph = export_graph(torch.nn.PixelShuffle(2), ("batch", 12, "h", "w"), {"batch": 2, "h": 6, "w": 10})
    next(node for node in graph.nodes if node.op == "DepthToSpace").attrs["mode"] = "DCR"
    assert PLUGIN.pattern.matches(graph) == []


def launch(x, factor):
    """The kernel's y (B, C, H·factor, W·factor) of x (B, C·factor², H, W)."""
    batch, wide, height, width = x.shape
    channels = wide // factor**2
    shape = (batch, height * factor, width * factor, kernels.pitch(channels, x.dtype))
    y = kernels.poisoned(math.prod(shape) + 64, dtype=x.dtype)
    image = kernels.channel_last(x)
    kernels.launch("pixel_shuffle", x.dtype, image, y, batch, height, width, channels, factor)
    assert y[math.prod(shape) :].isnan().all()  # nothing behind the end
    return kernels.channel_first(y[: math.prod(shape)].view(shape), channels)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("shape", "factor"),
    [((batch, 4 * c, 1, 1), 2) for batch in (1, 3) for c in (1, 2, 3, 6, 7, 16, 24, 48, 96, 127, 192, 384)]
    + [((2, 4, 3, 5), 2), ((2, 12, 2, 7), 2), ((1, 28, 5, 33), 2), ((2, 508, 3, 5), 2), ((1, 96, 2, 200), 2)]
    + [((3, 18, 2, 7), 3), ((1, 32, 2, 3), 4), ((2, 3, 5, 7), 1), ((1, 432, 2, 3), 3), ((1, 1, 1, 1), 1)]
    + [((0, 4, 2, 2), 2), ((1, 192, 128, 128), 2), ((1, 384, 64, 64), 2), ((2, 768, 32, 32), 2)]
    + [((1, 96, 360, 640), 2), ((1, 192, 180, 320), 4), ((1, 12, 359, 639), 2)],
)
def test_kernel_is_the_reference(shape, factor, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape, device="cuda").to(dtype)
    assert torch.equal(launch(x, factor), pixel_shuffle(x, factor))
