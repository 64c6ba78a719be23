import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch

from plugins import find
from plugins.cached_self_attention.reference import cached_self_attention
from plugins.testing import assert_close, assert_replaces_in_trocr, run_function, trocr_part

PLUGIN = find("cached_self_attention")


def random_inputs(sizes, position, dtype):
    batch, heads, capacity, head_dim = sizes
    random = np.random.default_rng(0)
    token, cache = (batch, 1, heads * head_dim), (batch, heads, capacity, head_dim)
    shapes = {"query": token, "key": token, "value": token, "key_cache": cache, "value_cache": cache}
    inputs = {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    return {**inputs, "position": np.array([position], np.int32)}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("sizes", "position"), [((1, 16, 64, 64), 63), ((2, 1, 1, 8), 0), ((3, 5, 33, 4), 7), ((1, 2, 9, 4), 0)]
)
def test_function_is_the_reference(sizes, position, dtype):
    inputs = random_inputs(sizes, position, dtype)
    actual = run_function(PLUGIN, inputs, outputs=3, scale=0.3)
    query, key, value, key_cache, value_cache, _ = (torch.from_numpy(values) for values in inputs.values())
    expected = cached_self_attention(query, key, value, key_cache, value_cache, position, 0.3)
    assert_close(actual[0], expected[0])
    for cache, reference in zip(actual[1:], expected[1:]):
        np.testing.assert_array_equal(cache, reference.numpy())


def test_slots_behind_the_position_are_not_looked_at():
    inputs = random_inputs((2, 3, 16, 4), 5, np.float32)
    (before, *_) = run_function(PLUGIN, inputs, outputs=3, scale=0.3)
    for name in ("key_cache", "value_cache"):
        inputs[name][:, :, 6:] = 1e6
    (after, *_) = run_function(PLUGIN, inputs, outputs=3, scale=0.3)
    np.testing.assert_array_equal(after, before)


def test_pattern_replaces_those_of_trocr():
    matches = assert_replaces_in_trocr(PLUGIN, "step")
    names = [[tensor.name for tensor in match.inputs[3:]] for match in matches]
    assert names == [["self_key_0", "self_value_0", "position"], ["self_key_1", "self_value_1", "position"]]
    outputs = [[tensor.name for tensor in match.outputs[1:]] for match in matches]
    assert outputs == [["present_key_0", "present_value_0"], ["present_key_1", "present_value_1"]]


def test_pattern_refuses_a_mask_that_hides_the_present():
    graph = gs.import_onnx(trocr_part("step")[1])
    for node in graph.nodes:
        if node.op == "Greater":
            node.op = "GreaterOrEqual"
    assert PLUGIN.pattern.matches(graph) == []
