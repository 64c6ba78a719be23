import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch

from plugins import find, kernels
from plugins.split_heads.reference import split_heads
from plugins.testing import assert_close, assert_replaces_in_trocr, export_graph, grafted, run_function, trocr_part

PLUGIN = find("split_heads")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("sizes", [(1, 577, 16, 64), (2, 1, 1, 8), (3, 33, 12, 5), (2, 7, 3, 1)])
def test_function_is_the_reference(sizes, dtype):
    batch, tokens, heads, head_dim = sizes
    x = np.random.default_rng(0).standard_normal((batch, tokens, heads * head_dim)).astype(dtype)
    (actual,) = run_function(PLUGIN, {"x": x}, heads=heads)
    expected = split_heads(torch.from_numpy(x), heads).numpy()
    assert actual.dtype == dtype
    np.testing.assert_array_equal(actual, expected)


def test_pattern_replaces_those_of_trocr():
    matches = assert_replaces_in_trocr(PLUGIN, "prefill")
    assert all(match.attributes == {"heads": 6} for match in matches)


@pytest.mark.parametrize(("part", "num_beams"), [("encoder", 1), ("step", 1), ("step", 4)])
def test_pattern_leaves_attention_its_heads(part, num_beams):
    _, model = trocr_part(part, num_beams)
    assert PLUGIN.pattern.matches(gs.import_onnx(model)) == []


class Heads(torch.nn.Module):
    """What is made of x (B, 6, 8) and its two heads."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        if self.kind == "some tokens":  # as if they were images
            return x.reshape(-1, 3, 2, 8).transpose(1, 2)
        split = x.unflatten(2, (2, 4))
        if self.kind == "attention":
            return split.transpose(1, 2) @ split.permute(0, 2, 3, 1)
        return split.permute({"alike": (0, 2, 1, 3), "keys": (0, 2, 3, 1), "dims": (0, 3, 1, 2)}[self.kind])


@pytest.mark.parametrize(
    ("kind", "count"), [("alike", 1), ("keys", 0), ("dims", 0), ("some tokens", 0), ("attention", 0)]
)
def test_only_heads_that_are_handed_on_match(kind, count):
    graph = export_graph(Heads(kind), ("batch", 6, 8), {"batch": 2})
    assert "Transpose" in [node.op for node in graph.nodes]
    matches = PLUGIN.pattern.matches(graph)
    assert len(matches) == count
    x = torch.randn(3, 6, 8)
    (actual,) = grafted(graph, PLUGIN, matches).run(None, {"x": x.numpy()})
    assert_close(actual, Heads(kind)(x))


def launch(x, heads, y=None):
    """The kernel's y (B, heads, T, head_dim), written to `y` if given."""
    batch, tokens, width = x.shape
    head_dim = width // heads
    y = kernels.poisoned(batch, heads, tokens, head_dim, dtype=x.dtype) if y is None else y
    kernels.launch("split_heads", x.dtype, x, y, batch, tokens, heads, head_dim)
    return y


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "sizes",
    [(batch, 577, 16, 64) for batch in (1, 2, 8, 32)]
    + [(1, 1, 1, 1), (1, 577, 1, 64), (3, 1, 16, 64), (64, 578, 8, 32), (2, 193, 6, 32), (5, 2, 3, 8), (300, 3, 5, 16)]
    # heads of whole words of 16, 8, 4 and 2 bytes, in the one type or the other
    + [(3, 33, 12, 20), (2, 17, 7, 6), (3, 127, 13, 5), (1, 576, 16, 127), (7, 5, 11, 1), (2, 31, 9, 2), (4, 9, 15, 4)]
    + [(1, 65, 2, 2048), (2, 3, 1, 4099), (1, 100_003, 3, 8), (70_000, 1, 2, 8), (70_001, 3, 1, 2)],
)
def test_kernel_is_the_reference(sizes, dtype):
    batch, tokens, heads, head_dim = sizes
    torch.manual_seed(0)
    x = torch.randn(batch, tokens, heads * head_dim, device="cuda").to(dtype)
    assert torch.equal(launch(x, heads), split_heads(x, heads))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 8), (2, 5, 3, 16), (1, 577, 16, 64), (3, 33, 4, 5), (2, 7, 1, 1)])
@pytest.mark.parametrize(("ahead_of_x", "ahead_of_y"), [(64, 64), (60, 64), (64, 62), (66, 65), (61, 63)])
def test_kernel_touches_nothing_outside(sizes, ahead_of_x, ahead_of_y, dtype):
    """NaN before and behind the tensors, which begin on boundaries of 16 bytes and of fewer."""
    batch, tokens, heads, head_dim = sizes
    torch.manual_seed(0)
    values = torch.randn(batch, tokens, heads * head_dim, device="cuda").to(dtype)
    count = values.numel()
    memory_x, memory_y = (kernels.poisoned(count + 192, dtype=dtype) for _ in range(2))
    x = memory_x[ahead_of_x : ahead_of_x + count].view(values.shape)
    y = memory_y[ahead_of_y : ahead_of_y + count].view(batch, heads, tokens, head_dim)
    x.copy_(values)
    assert torch.equal(launch(x, heads, y), split_heads(values, heads))
    assert memory_y.isnan().sum() == 192
    assert torch.equal(x, values)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(1, 577, 16, 64), (8, 577, 16, 64), (2, 5, 3, 7)])
def test_kernels_that_follow_each_other_wait(sizes):
    """Heads taken for tokens, and tokens for heads: every other kernel brings x back, to where it was read before."""
    batch, tokens, heads, head_dim = sizes
    torch.manual_seed(0)
    x = torch.randn(batch, tokens, heads * head_dim, dtype=torch.float16, device="cuda")
    there, back = launch(x, heads), x.clone()
    for _ in range(50):
        launch(there.view(batch, heads, tokens * head_dim), tokens, back.view(batch, tokens, heads, head_dim))
        launch(back, heads, there)
    assert torch.equal(back, x)
    assert torch.equal(there, split_heads(x, heads))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernel_copies_bits(dtype):
    """Infinities, zeros of either sign and NaNs of any payload."""
    torch.manual_seed(0)
    bits = torch.randint(-(2**15), 2**15, (2, 33, 3 * 64), device="cuda", dtype=torch.int16)
    x = bits.view(dtype)
    expected = split_heads(x, 3)
    assert torch.equal(launch(x, 3).view(torch.int16), expected.view(torch.int16))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(0, 577, 1024), (2, 0, 1024), (2, 577, 0)])
def test_kernel_takes_none(shape):
    launch(torch.zeros(shape, dtype=torch.float16, device="cuda"), 16)


@pytest.mark.gpu
def test_kernel_refuses_more_words_than_it_counts():
    x = torch.zeros(8, device="cuda")
    for sizes in ((2**31, 1, 1, 4), (1, 2**31, 1, 4), (1, 1, 2**31, 4), (1, 1, 1, 2**34)):
        with pytest.raises(RuntimeError):
            kernels.launch("split_heads", x.dtype, x, x, *sizes)
