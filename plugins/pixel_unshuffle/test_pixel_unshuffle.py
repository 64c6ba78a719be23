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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("shape", "factor"),
    [
        ((1, 24, 2, 2), 2),
        ((2, 1, 6, 10), 2),
        ((2, 3, 4, 12), 2),
        ((2, 3, 4, 24), 2),
        ((3, 5, 9, 3), 3),
        ((1, 2, 8, 12), 4),
        ((2, 3, 5, 7), 1),
        ((0, 4, 2, 2), 2),
        ((1, 24, 256, 256), 2),
        ((2, 96, 64, 64), 2),
        ((1, 12, 720, 1280), 2),
        ((1, 3, 718, 1278), 2),
    ],
)
def test_kernel_is_the_reference(shape, factor, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape, device="cuda").to(dtype)
    expected = pixel_unshuffle(x, factor)
    y = kernels.poisoned(x.numel() + 64, dtype=dtype)
    batch, channels, height, width = shape
    kernels.launch("pixel_unshuffle", dtype, x, y, batch, channels, height, width, factor)
    assert torch.equal(y[: x.numel()].view(expected.shape), expected)
    assert y[x.numel() :].isnan().all()  # nothing behind the end
