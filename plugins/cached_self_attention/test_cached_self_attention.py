import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch

from plugins import find, kernels
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


def random_tensors(sizes, dtype):
    """query, key, value and both caches, on the GPU."""
    batch, heads, capacity, head_dim = sizes
    torch.manual_seed(0)
    token, cache = (batch, 1, heads * head_dim), (batch, heads, capacity, head_dim)
    return [torch.randn(shape, device="cuda").to(dtype) for shape in (token, token, token, cache, cache)]


def launch(query, key, value, key_cache, value_cache, position, scale, in_place):
    """The kernel's y and present caches: the caches themselves, or others."""
    caches = (key_cache, value_cache)
    present = caches if in_place else [kernels.poisoned(*cache.shape, dtype=cache.dtype) for cache in caches]
    y = kernels.poisoned(*query.shape, dtype=query.dtype)
    position = torch.tensor([position], dtype=torch.int32, device="cuda")
    inputs, sizes = (query, key, value, *caches, position), key_cache.shape
    kernels.launch("cached_self_attention", query.dtype, *inputs, y, *present, *sizes, scale)
    return y, *present


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(
    ("sizes", "position"),
    [((2, 1, 1, 8), 0), ((1, 2, 9, 4), 0), ((3, 5, 33, 4), 7), ((1, 2, 50, 33), 49), ((2, 3, 130, 128), 128)]
    + [((1, 4, 64, 16), 20), ((1, 16, 64, 64), 63), ((32, 16, 512, 64), 0), ((32, 16, 512, 64), 300)],
)
def test_kernel_is_the_reference(sizes, position, in_place, dtype):
    query, key, value, *caches = random_tensors(sizes, dtype)
    for cache in caches:
        cache[:, :, position:] = torch.nan  # kept, but not looked at
    expected = cached_self_attention(query, key, value, *caches, position, 0.3)
    before = [cache.clone() for cache in caches]
    actual = launch(query, key, value, *caches, position, 0.3, in_place)
    kernels.assert_close(actual[0], expected[0])
    for cache, reference in zip(actual[1:], expected[1:]):
        torch.testing.assert_close(cache, reference, rtol=0, atol=0, equal_nan=True)
    if not in_place:
        for cache, reference in zip(caches, before):
            torch.testing.assert_close(cache, reference, rtol=0, atol=0, equal_nan=True)
    with kernels.busy_memory():
        assert torch.equal(actual[0], launch(query, key, value, *caches, position, 0.3, in_place)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("capacity", [8, 24, 65, 128, 130, 257, 512])
@pytest.mark.parametrize(("rows", "heads", "head_dim"), [(1, 2, 128), (2, 3, 64), (1, 8, 32), (1, 1, 100), (1, 2, 61)])
def test_kernel_is_the_reference_however_slots_are_divided(rows, heads, head_dim, capacity, in_place, dtype):
    for position in sorted({0, 1, capacity // 2 - 1, capacity // 2, capacity - 2, capacity - 1}):
        query, key, value, *caches = random_tensors((rows, heads, capacity, head_dim), dtype)
        for cache in caches:
            cache[:, :, position:] = torch.nan
        expected = cached_self_attention(query, key, value, *caches, position, 0.3)
        first = None
        for _ in range(2):
            actual = launch(query, key, value, *caches, position, 0.3, in_place)
            kernels.assert_close(actual[0], expected[0])
            for cache, reference in zip(actual[1:], expected[1:]):
                torch.testing.assert_close(cache, reference, rtol=0, atol=0, equal_nan=True)
            first = actual[0] if first is None else first
            assert torch.equal(actual[0], first)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8, 9, 16, 17, 32, 64])
def test_kernel_is_the_reference_for_many_rows(rows):
    """The more rows, the fewer blocks for each head."""
    query, key, value, *caches = random_tensors((rows, 16, 512, 64), torch.float16)
    expected = cached_self_attention(query, key, value, *caches, 400, 0.125)
    actual = launch(query, key, value, *caches, 400, 0.125, in_place=True)
    kernels.assert_close(actual[0], expected[0])
    assert all(map(torch.equal, actual[1:], expected[1:]))


@pytest.mark.gpu
@pytest.mark.parametrize("in_place", [(True, False), (False, True)])
def test_kernel_writes_one_cache_in_place(in_place):
    query, key, value, *caches = random_tensors((1, 2, 300, 64), torch.float16)
    expected = cached_self_attention(query, key, value, *caches, 150, 0.3)
    present = [cache if same else torch.full_like(cache, torch.nan) for cache, same in zip(caches, in_place)]
    y, position = torch.full_like(query, torch.nan), torch.tensor([150], dtype=torch.int32, device="cuda")
    tensors = (query, key, value, *caches, position, y, *present)
    kernels.launch("cached_self_attention", query.dtype, *tensors, *caches[0].shape, 0.3)
    kernels.assert_close(y, expected[0])
    assert all(map(torch.equal, present, expected[1:]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("capacity", "head_dim"), [(40, 64), (140, 128)])
def test_kernel_decodes_step_by_step_in_place(capacity, head_dim, dtype):
    query, key, value, *caches = random_tensors((2, 3, capacity, head_dim), dtype)
    expected = [cache.clone() for cache in caches]
    for position in range(capacity):
        query, key, value = key, value, query + position % 3
        y, *_ = launch(query, key, value, *caches, position, 0.1, in_place=True)
        expected_y, *expected = cached_self_attention(query, key, value, *expected, position, 0.1)
        kernels.assert_close(y, expected_y)
    assert all(map(torch.equal, caches, expected))


@pytest.mark.gpu
@pytest.mark.parametrize(("position", "clamped"), [(-3, 0), (9, 8), (2**31 - 1, 8)])
def test_kernel_clamps_the_position(position, clamped):
    tensors = random_tensors((1, 2, 9, 8), torch.float32)
    expected = cached_self_attention(*tensors, clamped, 0.3)
    for actual, reference in zip(launch(*tensors, position, 0.3, in_place=False), expected):
        kernels.assert_close(actual, reference)


@pytest.mark.gpu
def test_kernel_refuses_wide_heads_and_takes_no_rows():
    tensors = random_tensors((1, 1, 2, 129), torch.float32)
    with pytest.raises(RuntimeError):
        launch(*tensors, 0, 1.0, in_place=True)
    launch(*(tensor[:0] for tensor in tensors), 0, 1.0, in_place=True)
