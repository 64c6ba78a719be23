import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch

from plugins import find, kernels
from plugins.cross_attention.reference import cross_attention
from plugins.testing import assert_close, assert_replaces_in_trocr, run_function, trocr_part

PLUGIN = find("cross_attention")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("sizes", [(1, 16, 577, 64), (2, 1, 1, 8), (3, 5, 33, 4)])
def test_function_is_the_reference(sizes, beams, dtype):
    images, heads, tokens, head_dim = sizes
    random = np.random.default_rng(0)
    inputs = {"query": random.standard_normal((images * beams, 1, heads * head_dim)).astype(dtype)}
    inputs |= {
        name: random.standard_normal((images, heads, tokens, head_dim)).astype(dtype) for name in ("key", "value")
    }
    (actual,) = run_function(PLUGIN, inputs, scale=0.3)
    query, key, value = (torch.from_numpy(values) for values in inputs.values())
    assert_close(actual, cross_attention(query, key, value, 0.3))


def test_beams_share_an_image():
    torch.manual_seed(0)
    query = torch.randn(6, 1, 8)
    key, value = (torch.randn(2, 2, 5, 4) for _ in range(2))
    each = cross_attention(query, *(x.repeat_interleave(3, 0) for x in (key, value)), 0.3)
    torch.testing.assert_close(cross_attention(query, key, value, 0.3), each)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_pattern_replaces_those_of_trocr(num_beams):
    matches = assert_replaces_in_trocr(PLUGIN, "step", num_beams)
    assert {match.inputs[1].name for match in matches} == {"cross_key_0", "cross_key_1"}
    assert all(match.attributes == {"scale": pytest.approx(32**-0.5)} for match in matches)


def test_pattern_refuses_heads_that_do_not_return():
    graph = gs.import_onnx(trocr_part("step", 3)[1])
    for node in graph.nodes:
        if node.op == "Transpose" and any(producer.op == "MatMul" for producer in node.inputs[0].inputs):
            node.attrs["perm"] = [0, 1, 2, 3]
    assert PLUGIN.pattern.matches(graph) == []


def test_pattern_refuses_a_softmax_over_another_axis():
    graph = gs.import_onnx(trocr_part("step")[1])
    for node in graph.nodes:
        if node.op == "Softmax":
            node.attrs["axis"] = 1
    assert PLUGIN.pattern.matches(graph) == []


def launch(query, key, value, scale):
    y = kernels.poisoned(*query.shape, dtype=query.dtype)
    kernels.launch("cross_attention", query.dtype, query, key, value, y, len(query), *key.shape, scale)
    return y


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "sizes",
    [(2, 1, 1, 8), (3, 5, 33, 4), (1, 2, 1000, 1), (2, 4, 100, 80), (1, 3, 50, 33), (1, 1, 7, 127), (2, 3, 578, 128)]
    + [(1, 4, 577, 16), (1, 12, 577, 64), (32, 16, 577, 64)],
)
def test_kernel_is_the_reference(sizes, dtype):
    batch, heads, _, head_dim = sizes
    torch.manual_seed(0)
    query = torch.randn(batch, 1, heads * head_dim, device="cuda").to(dtype)
    key, value = (torch.randn(sizes, device="cuda").to(dtype) for _ in range(2))
    scale = 2 * head_dim**-0.5
    y = launch(query, key, value, scale)
    kernels.assert_close(y, cross_attention(query, key, value, scale))
    with kernels.busy_memory():
        assert torch.equal(y, launch(query, key, value, scale))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [1, 2, 31, 33, 64, 65, 129, 255, 257, 300, 513, 577, 600])
@pytest.mark.parametrize(("rows", "heads", "head_dim"), [(1, 1, 128), (1, 2, 127), (2, 3, 64), (1, 8, 32), (3, 1, 34)])
def test_kernel_is_the_reference_however_tokens_are_divided(rows, heads, head_dim, tokens, dtype):
    torch.manual_seed(0)
    query = torch.randn(rows, 1, heads * head_dim, device="cuda").to(dtype)
    key, value = (torch.randn(rows, heads, tokens, head_dim, device="cuda").to(dtype) for _ in range(2))
    y = launch(query, key, value, 0.3)
    kernels.assert_close(y, cross_attention(query, key, value, 0.3))
    for _ in range(3):
        assert torch.equal(y, launch(query, key, value, 0.3))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8, 9, 16, 17, 32, 33, 64])
def test_kernel_is_the_reference_for_many_rows(rows):
    """The more rows, the fewer blocks for each head."""
    torch.manual_seed(0)
    query = torch.randn(rows, 1, 16 * 64, device="cuda").half()
    key, value = (torch.randn(rows, 16, 577, 64, device="cuda").half() for _ in range(2))
    y = launch(query, key, value, 0.125)
    kernels.assert_close(y, cross_attention(query, key, value, 0.125))
    assert torch.equal(y, launch(query, key, value, 0.125))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("beams", [2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 8), (2, 3, 33, 64), (3, 2, 300, 33), (1, 2, 577, 128), (2, 1, 130, 5), (1, 4, 600, 64)]
)
def test_kernel_is_the_reference_for_beams(sizes, beams, dtype):
    images, heads, _, head_dim = sizes
    torch.manual_seed(0)
    query = torch.randn(images * beams, 1, heads * head_dim, device="cuda").to(dtype)
    key, value = (torch.randn(sizes, device="cuda").to(dtype) for _ in range(2))
    y = launch(query, key, value, 0.3)
    kernels.assert_close(y, cross_attention(query, key, value, 0.3))
    assert torch.equal(y, launch(query, key, value, 0.3))


@pytest.mark.gpu
@pytest.mark.parametrize(("images", "beams"), [(1, 4), (2, 4), (5, 4), (8, 4), (16, 2), (9, 3), (1, 32), (2, 16)])
def test_kernel_is_the_reference_for_many_images_beams(images, beams):
    torch.manual_seed(0)
    query = torch.randn(images * beams, 1, 16 * 64, device="cuda").half()
    key, value = (torch.randn(images, 16, 577, 64, device="cuda").half() for _ in range(2))
    y = launch(query, key, value, 0.125)
    kernels.assert_close(y, cross_attention(query, key, value, 0.125))
    for _ in range(3):
        assert torch.equal(y, launch(query, key, value, 0.125))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("token", [0, 72, 73, 288, 576])
def test_kernel_finds_the_one_token_that_counts(token, dtype):
    """All others' weights vanish, also those of whole blocks."""
    torch.manual_seed(0)
    query = torch.ones(1, 1, 4 * 64, device="cuda").to(dtype)
    key, value = (torch.randn(1, 4, 577, 64, device="cuda").to(dtype) for _ in range(2))
    key[:, :, token] = 100
    assert torch.equal(launch(query, key, value, 1.0), value[:, :, token].flatten(1)[:, None])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 20])
def test_kernel_keeps_scores_beyond_fp16_finite(head_dim, dtype):
    torch.manual_seed(0)
    query = 200 * torch.randn(2, 1, 3 * head_dim, device="cuda").to(dtype)
    key, value = (200 * torch.randn(2, 3, 67, head_dim, device="cuda").to(dtype) for _ in range(2))
    for scale in (1.0, -1.0):
        kernels.assert_close(launch(query, key, value, scale), cross_attention(query, key, value, scale))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("tokens", "head_dim"), [(1, 64), (33, 16), (130, 128), (33, 5), (577, 64)])
def test_kernel_reads_nothing_outside(tokens, head_dim, dtype):
    """NaN before and behind key and value does not reach y."""
    torch.manual_seed(0)
    query = torch.randn(1, 1, head_dim, device="cuda").to(dtype)
    key, value = (kernels.poisoned(1, 1, tokens + 16, head_dim, dtype=dtype)[:, :, 8:-8] for _ in range(2))
    for x in (key, value):
        x.normal_()
    kernels.assert_close(launch(query, key, value, 0.3), cross_attention(query, key, value, 0.3))


@pytest.mark.gpu
def test_kernel_refuses_wide_heads_and_takes_no_rows():
    query, key = torch.zeros(1, 1, 129, device="cuda"), torch.zeros(1, 1, 2, 129, device="cuda")
    with pytest.raises(RuntimeError):
        launch(query, key, key, 1.0)
    launch(query[:0], key[:0], key[:0], 1.0)


@pytest.mark.gpu
def test_kernel_refuses_rows_that_images_do_not_divide():
    query, key = torch.zeros(3, 1, 8, device="cuda"), torch.zeros(2, 1, 2, 8, device="cuda")
    with pytest.raises(RuntimeError):
        launch(query, key, key, 1.0)
