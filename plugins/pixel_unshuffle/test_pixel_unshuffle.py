import numpy as np
import pytest
import torch

from plugins import find
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
