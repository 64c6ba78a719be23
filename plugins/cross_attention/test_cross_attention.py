import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch

from plugins import find
from plugins.cross_attention.reference import cross_attention
from plugins.testing import assert_close, assert_replaces_in_trocr, run_function, trocr_part

PLUGIN = find("cross_attention")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("sizes", [(1, 16, 577, 64), (2, 1, 1, 8), (3, 5, 33, 4)])
def test_function_is_the_reference(sizes, dtype):
    batch, heads, tokens, head_dim = sizes
    random = np.random.default_rng(0)
    inputs = {"query": random.standard_normal((batch, 1, heads * head_dim)).astype(dtype)}
    inputs |= {
        name: random.standard_normal((batch, heads, tokens, head_dim)).astype(dtype) for name in ("key", "value")
    }
    (actual,) = run_function(PLUGIN, inputs, scale=0.3)
    query, key, value = (torch.from_numpy(values) for values in inputs.values())
    assert_close(actual, cross_attention(query, key, value, 0.3))


def test_pattern_replaces_those_of_trocr():
    matches = assert_replaces_in_trocr(PLUGIN, "step")
    assert {match.inputs[1].name for match in matches} == {"cross_key_0", "cross_key_1"}
    assert all(match.attributes == {"scale": pytest.approx(0.25)} for match in matches)


def test_pattern_refuses_a_softmax_over_another_axis():
    graph = gs.import_onnx(trocr_part("step")[1])
    for node in graph.nodes:
        if node.op == "Softmax":
            node.attrs["axis"] = 1
    assert PLUGIN.pattern.matches(graph) == []
