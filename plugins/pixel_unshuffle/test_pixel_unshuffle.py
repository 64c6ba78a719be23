import math

import numpy as np
import pytest
import torch

from plugins import find, kernels
from plugins.pixel_unshuffle.reference import pixel_unshuffle
from plugins.testing import assert_close, export_graph, grafted, run_function

PLUGIN = find("pixel_unshuffle")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("shape", "factor"), [((1, 24, 2, 2), 2), ((2, 1, 6, 10), 2), ((3, 5, 9, 3), 3)])
def test_function_is_the_reference(shape, factor, dtype):
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    (actual,) = run_function(PLUGIN, {"x": x}, factor=factor)
    np.testing.assert_array_equal(actual, pixel_unshuffle(torch.from_numpy(x), factor).numpy())


@pytest.mark.parametrize("factor", [2, 3])
def test_pattern_replaces_an_exported_pixel_unshuffle(factor):
    # the Reshape behind it must not be taken for part of the pattern
    module = torch.nn.Sequential(torch.nn.PixelUnshuffle(factor), torch.nn.Flatten(2))
    graph = export_graph(module, ("batch", 4, "h", "w"), {"batch": 2, "h": 12, "w": 18}, multiple_of=factor)
    (match,) = PLUGIN.pattern.matches(graph)
    assert match.attributes == {"factor": factor}
    assert match.outputs[0].shape[1] == 4 * factor**2
    x = torch.randn(3, 4, 6, 18)
    (actual,) = grafted(graph, PLUGIN, [match]).run(None, {"x": x.numpy()})
    assert_close(actual, module(x))


def test_pattern_refuses_space_to_depth():
    """ONNX's own channel order (row, column, channel) is a different permutation."""

    class SpaceToDepth(torch.nn.Module):
        def forward(self, x):
            return x.reshape(2, 4, 3, 2, 5, 2).permute(0, 3, 5, 1, 2, 4).reshape(2, 16, 3, 5)

    graph = export_graph(SpaceToDepth(), (2, 4, 6, 10), {})
    assert any(node.op == "Transpose" for node in graph.nodes)
    assert PLUGIN.pattern.matches(graph) == []


def launch(x, factor):
    """The kernel's y (B, C·factor², H/factor, W/factor) of x (B, C, H, W)."""
    batch, channels, height, width = x.shape
    wide = channels * factor**2
    shape = (batch, height // factor, width // factor, kernels.pitch(wide, x.dtype))
    y = kernels.poisoned(math.prod(shape) + 64, dtype=x.dtype)
    image = kernels.channel_last(x)
    kernels.launch("pixel_unshuffle", x.dtype, image, y, batch, height, width, channels, factor)
    assert y[math.prod(shape) :].isnan().all()  # nothing behind the end
    return kernels.channel_first(y[: math.prod(shape)].view(shape), wide)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("shape", "factor"),
    [((batch, channels, 2, 2), 2) for batch in (1, 3) for channels in (1, 2, 3, 6, 7, 16, 24, 48, 96, 127, 192, 384)]
    + [((2, 1, 6, 10), 2), ((2, 3, 4, 14), 2), ((1, 7, 10, 66), 2), ((2, 127, 6, 10), 2), ((1, 24, 4, 400), 2)]
    + [((3, 5, 9, 3), 3), ((1, 2, 8, 12), 4), ((2, 3, 5, 7), 1), ((1, 48, 6, 9), 3), ((1, 1, 1, 1), 1)]
    + [((1, 24, 256, 256), 2), ((1, 48, 128, 128), 2), ((2, 96, 64, 64), 2)]
    + [((1, 24, 720, 1280), 2), ((1, 12, 720, 1280), 4), ((1, 3, 718, 1278), 2)],
)
def test_kernel_is_the_reference(shape, factor, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape, device="cuda").to(dtype)
    assert torch.equal(launch(x, factor), pixel_unshuffle(x, factor))


@pytest.mark.gpu
def test_kernel_takes_no_pixels_and_refuses_those_that_make_no_whole_blocks():
    assert launch(torch.zeros(0, 4, 2, 2, device="cuda"), 2).shape == (0, 16, 1, 1)
    with pytest.raises(RuntimeError):
        launch(torch.zeros(1, 3, 4, 5, device="cuda"), 2)
