import numpy as np
import pytest
import torch

from plugins import find
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
