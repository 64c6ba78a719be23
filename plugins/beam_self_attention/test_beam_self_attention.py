import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch

from plugins import find, kernels
from plugins.beam_self_attention.reference import beam_self_attention
from plugins.cached_self_attention.reference import cached_self_attention
from plugins.testing import assert_close, assert_replaces_in_trocr, run_function, trocr_part

PLUGIN = find("beam_self_attention")


def random_inputs(sizes, position, dtype):
    images, beams, heads, capacity, head_dim = sizes
    random = np.random.default_rng(0)
    token, cache = (images * beams, 1, heads * head_dim), (images, beams * heads, capacity, head_dim)
    shapes = {"query": token, "key": token, "value": token, "key_cache": cache, "value_cache": cache}
    inputs = {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    ancestors = random.integers(0, beams, (images, beams, capacity), np.int32)
    return {**inputs, "ancestors": ancestors, "position": np.array([position], np.int32)}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("sizes", "position"),
    [((1, 4, 16, 64, 64), 63), ((2, 2, 1, 1, 8), 0), ((3, 5, 5, 33, 4), 7), ((1, 3, 2, 9, 4), 0), ((2, 1, 2, 9, 4), 5)],
)
def test_function_is_the_reference(sizes, position, dtype):
    inputs = random_inputs(sizes, position, dtype)
    actual = run_function(PLUGIN, inputs, outputs=3, scale=0.3)
    *tensors, _ = (torch.from_numpy(values) for values in inputs.values())
    expected = beam_self_attention(*tensors, position, 0.3)
    assert_close(actual[0], expected[0])
    for cache, reference in zip(actual[1:], expected[1:]):
        np.testing.assert_array_equal(cache, reference.numpy())


def test_beams_that_change_places_are_caches_that_do():
    """Step by step, against caches whose rows are copied."""
    images, beams, heads, capacity, head_dim = 2, 3, 2, 12, 4
    random = torch.Generator().manual_seed(0)
    moved = [torch.zeros(images * beams, heads, capacity, head_dim) for _ in range(2)]
    kept = [cache.reshape(images, beams * heads, capacity, head_dim) for cache in moved]
    ancestors = torch.zeros(images, beams, capacity, dtype=torch.int32)
    for position in range(capacity):
        token = [torch.randn(images * beams, 1, heads * head_dim, generator=random) for _ in range(3)]
        expected, *moved = cached_self_attention(*token, *moved, position, 0.3)
        actual, *kept = beam_self_attention(*token, *kept, ancestors, position, 0.3)
        torch.testing.assert_close(actual, expected)
        parents = torch.randint(beams, (images, beams), generator=random)
        rows = (parents + torch.arange(images)[:, None] * beams).flatten()
        moved = [cache[rows] for cache in moved]
        ancestors = ancestors.gather(1, parents[:, :, None].expand(-1, -1, capacity))
        ancestors[:, :, position] = parents.int()


def test_slots_behind_the_position_are_not_looked_at():
    inputs = random_inputs((2, 2, 3, 16, 4), 5, np.float32)
    (before, *_) = run_function(PLUGIN, inputs, outputs=3, scale=0.3)
    for name in ("key_cache", "value_cache"):
        inputs[name][:, :, 6:] = 1e6
    inputs["ancestors"][:, :, 5:] = 1 - inputs["ancestors"][:, :, 5:]
    (after, *_) = run_function(PLUGIN, inputs, outputs=3, scale=0.3)
    np.testing.assert_array_equal(after, before)


def test_pattern_replaces_those_of_trocr():
    matches = assert_replaces_in_trocr(PLUGIN, "step", 3)
    for layer, match in enumerate(matches):
        caches = [f"self_key_{layer}", f"self_value_{layer}"]
        assert [tensor.name for tensor in match.inputs[3:]] == [*caches, "ancestors", "position"]
        assert [tensor.name for tensor in match.outputs[1:]] == [f"present_key_{layer}", f"present_value_{layer}"]
    assert len(matches) == 2


def test_pattern_refuses_beams_in_another_order():
    graph = gs.import_onnx(trocr_part("step", 3)[1])
    for node in graph.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant) and tensor.values.ravel().tolist() == [0, 1, 2]:
                tensor.values = tensor.values[::-1].copy()
    assert PLUGIN.pattern.matches(graph) == []


def test_pattern_refuses_caches_of_another_row_each():
    assert PLUGIN.pattern.matches(gs.import_onnx(trocr_part("step")[1])) == []


def random_tensors(sizes, dtype):
    """query, key, value, both caches and ancestors, on the GPU."""
    images, beams, heads, capacity, head_dim = sizes
    torch.manual_seed(0)
    token, cache = (images * beams, 1, heads * head_dim), (images, beams * heads, capacity, head_dim)
    tensors = [torch.randn(shape, device="cuda").to(dtype) for shape in (token, token, token, cache, cache)]
    return [*tensors, torch.randint(beams, (images, beams, capacity), dtype=torch.int32, device="cuda")]


def launch(query, key, value, key_cache, value_cache, ancestors, position, scale, in_place):
    """The kernel's y and present caches: the caches themselves, or others."""
    caches = (key_cache, value_cache)
    present = caches if in_place else [kernels.poisoned(*cache.shape, dtype=cache.dtype) for cache in caches]
    y = kernels.poisoned(*query.shape, dtype=query.dtype)
    position = torch.tensor([position], dtype=torch.int32, device="cuda")
    images, beams, capacity = ancestors.shape
    sizes = (images, beams, key_cache.shape[1] // beams, capacity, key_cache.shape[3])
    tensors = (query, key, value, *caches, ancestors, position, y, *present)
    kernels.launch("beam_self_attention", query.dtype, *tensors, *sizes, scale)
    return y, *present


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(
    ("sizes", "position"),
    [((2, 2, 1, 1, 8), 0), ((1, 3, 2, 9, 4), 0), ((3, 5, 5, 33, 4), 7), ((1, 4, 2, 50, 33), 49), ((1, 1, 2, 9, 4), 3)]
    + [((2, 2, 3, 130, 128), 128), ((1, 4, 16, 64, 64), 63), ((8, 4, 16, 24, 64), 20), ((8, 4, 16, 512, 64), 300)],
)
def test_kernel_is_the_reference(sizes, position, in_place, dtype):
    query, key, value, *caches, ancestors = random_tensors(sizes, dtype)
    for cache in caches:
        cache[:, :, position:] = torch.nan  # kept, but not looked at
    ancestors[:, :, position:] = 2**31 - 1
    expected = beam_self_attention(query, key, value, *caches, ancestors.clamp(max=sizes[1] - 1), position, 0.3)
    before = [cache.clone() for cache in caches]
    actual = launch(query, key, value, *caches, ancestors, position, 0.3, in_place)
    kernels.assert_close(actual[0], expected[0])
    for cache, reference in zip(actual[1:], expected[1:]):
        torch.testing.assert_close(cache, reference, rtol=0, atol=0, equal_nan=True)
    if not in_place:
        for cache, reference in zip(caches, before):
            torch.testing.assert_close(cache, reference, rtol=0, atol=0, equal_nan=True)
    with kernels.busy_memory():
        assert torch.equal(actual[0], launch(query, key, value, *caches, ancestors, position, 0.3, in_place)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("capacity", [8, 65, 130, 257, 512])
@pytest.mark.parametrize(("images", "beams", "heads", "head_dim"), [(1, 2, 2, 128), (1, 4, 2, 64), (2, 3, 1, 61)])
def test_kernel_is_the_reference_however_slots_are_divided(images, beams, heads, head_dim, capacity, dtype):
    for position in sorted({0, 1, capacity // 2, capacity - 2, capacity - 1}):
        query, key, value, *caches, ancestors = random_tensors((images, beams, heads, capacity, head_dim), dtype)
        for cache in caches:
            cache[:, :, position:] = torch.nan
        expected = beam_self_attention(query, key, value, *caches, ancestors, position, 0.3)
        first = None
        for _ in range(2):
            actual = launch(query, key, value, *caches, ancestors, position, 0.3, True)
            kernels.assert_close(actual[0], expected[0])
            for cache, reference in zip(actual[1:], expected[1:]):
                torch.testing.assert_close(cache, reference, rtol=0, atol=0, equal_nan=True)
            first = actual[0] if first is None else first
            assert torch.equal(actual[0], first)


@pytest.mark.gpu
def test_kernel_clamps_ancestors():
    query, key, value, *caches, ancestors = random_tensors((2, 3, 2, 9, 8), torch.float32)
    ancestors[:, :, :4] = torch.tensor([-5, 3, 2**31 - 1, -(2**31)], dtype=torch.int32, device="cuda")
    expected = beam_self_attention(query, key, value, *caches, ancestors.clamp(0, 2), 6, 0.3)
    for actual, reference in zip(launch(query, key, value, *caches, ancestors, 6, 0.3, in_place=False), expected):
        kernels.assert_close(actual, reference)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("capacity", "head_dim"), [(40, 64), (140, 128)])
def test_kernel_decodes_step_by_step_in_place(capacity, head_dim, dtype):
    """While beams change places."""
    query, key, value, *caches, ancestors = random_tensors((2, 3, 2, capacity, head_dim), dtype)
    expected = [cache.clone() for cache in caches]
    for position in range(capacity):
        query, key, value = key, value, query + position % 3
        y, *_ = launch(query, key, value, *caches, ancestors, position, 0.1, in_place=True)
        expected_y, *expected = beam_self_attention(query, key, value, *expected, ancestors, position, 0.1)
        kernels.assert_close(y, expected_y)
        parents = torch.randint(3, (2, 3), device="cuda")
        ancestors = ancestors.gather(1, parents[:, :, None].expand(-1, -1, capacity))
        ancestors[:, :, position] = parents.int()
    assert all(map(torch.equal, caches, expected))


@pytest.mark.gpu
def test_kernel_refuses_wide_heads_and_takes_no_rows():
    tensors = random_tensors((1, 2, 1, 2, 129), torch.float32)
    with pytest.raises(RuntimeError):
        launch(*tensors, 0, 1.0, in_place=True)
    launch(*(tensor[:0] for tensor in tensors), 0, 1.0, in_place=True)
