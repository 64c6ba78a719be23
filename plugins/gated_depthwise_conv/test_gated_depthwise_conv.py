import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.restormer.network import GatedFeedForward
from plugins import find
from plugins.gated_depthwise_conv.reference import gated_depthwise_conv
from plugins.testing import assert_close, export_graph, grafted, run_function

PLUGIN = find("gated_depthwise_conv")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("shape", [(1, 254, 5, 7), (2, 2, 1, 1), (1, 42, 1, 13), (3, 6, 8, 3)])
def test_function_is_the_reference(shape, dtype):
    random = np.random.default_rng(0)
    inputs = {
        "x": random.standard_normal(shape).astype(dtype),
        "weight": random.standard_normal((shape[1], 1, 3, 3)).astype(dtype) / 3,
        "bias": random.standard_normal(shape[1]).astype(dtype),
    }
    (actual,) = run_function(PLUGIN, inputs, channels=shape[1])
    assert_close(actual, gated_depthwise_conv(*(torch.from_numpy(values) for values in inputs.values())))


@pytest.mark.parametrize("bias", [False, True])
def test_pattern_replaces_the_networks_gate(bias):
    torch.manual_seed(0)
    feed_forward = GatedFeedForward(12, 2.66, bias)
    graph = export_graph(feed_forward, ("batch", 12, "h", "w"), {"batch": 2, "h": 6, "w": 10})
    (match,) = PLUGIN.pattern.matches(graph)
    assert match.attributes == {"channels": 62}
    x = torch.randn(3, 12, 5, 7)
    (actual,) = grafted(graph, PLUGIN, [match]).run(None, {"x": x.numpy()})
    with torch.inference_mode():
        assert_close(actual, feed_forward(x))


@pytest.mark.parametrize(
    ("activation", "dilation"), [(F.silu, 1), (F.gelu, 2)], ids=["another activation", "a dilated convolution"]
)
def test_pattern_refuses_what_it_does_not_compute(activation, dilation):
    class Other(GatedFeedForward):
        def forward(self, x):
            self.dwconv.dilation = self.dwconv.padding = (dilation, dilation)
            gate, value = self.dwconv(self.project_in(x)).chunk(2, dim=1)
            return self.project_out(activation(gate) * value)

    graph = export_graph(Other(8, 2, bias=False), ("batch", 8, "h", "w"), {"batch": 2, "h": 6, "w": 10})
    assert PLUGIN.pattern.matches(graph) == []
