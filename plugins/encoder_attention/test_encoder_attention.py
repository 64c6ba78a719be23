import numpy as np
import pytest
import torch

from plugins import find, kernels
from plugins.encoder_attention.reference import encoder_attention
from plugins.testing import assert_close, assert_replaces_in_trocr, export_graph, run_function

PLUGIN = find("encoder_attention")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("sizes", [(1, 577, 2, 64), (2, 1, 1, 8), (3, 33, 16, 4), (1, 5, 3, 1)])
def test_function_is_the_reference(sizes, dtype):
    batch, tokens, heads, head_dim = sizes
    random = np.random.default_rng(0)
    inputs = {name: random.standard_normal((batch, tokens, heads * head_dim)).astype(dtype) for name in "qkv"}
    (actual,) = run_function(PLUGIN, inputs, heads=heads, scale=head_dim**-0.5)
    q, k, v = (torch.from_numpy(values) for values in inputs.values())
    assert_close(actual, encoder_attention(q, k, v, heads, head_dim**-0.5))


def test_scores_beyond_fp16_stay_finite():
    x = np.full((1, 3, 64), 200, np.float16)  # q · kᵀ is 2.6 million
    (actual,) = run_function(PLUGIN, {"q": x, "k": x, "v": x}, heads=1, scale=0.125)
    assert_close(actual, x)


def test_pattern_replaces_those_of_trocr():
    matches = assert_replaces_in_trocr(PLUGIN, "encoder")
    assert all(match.attributes == {"heads": 6, "scale": pytest.approx(32**-0.5)} for match in matches)


def test_pattern_refuses_attention_with_a_mask():
    class Masked(torch.nn.Module):
        def forward(self, x):
            q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in (x, x + 1, x + 2))
            scores = q @ k.transpose(2, 3) * 0.5 + torch.ones(6, 6).triu(1) * -1e4
            return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    graph = export_graph(Masked(), ("batch", 6, 8), {"batch": 2})
    assert any(node.op == "Softmax" for node in graph.nodes)
    assert PLUGIN.pattern.matches(graph) == []


def launch(q, k, v, heads, scale, y=None):
    """The kernel's y, written to `y` if given."""
    y = kernels.poisoned(*q.shape, dtype=q.dtype) if y is None else y
    batch, tokens, width = q.shape
    kernels.launch("encoder_attention", q.dtype, q, k, v, y, batch, tokens, heads, width // heads, scale)
    return y


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 16), (2, 5, 2, 32), (3, 33, 4, 16), (1, 64, 1, 64), (1, 65, 2, 48), (1, 127, 3, 8), (1, 128, 2, 128)]
    + [(1, 100, 2, 80), (2, 33, 3, 4), (1, 70, 2, 100), (1, 17, 1, 1), (1, 35, 1, 127), (4, 9, 5, 20)]
    # few blocks and many, which the FP16 kernels cut differently
    + [(1, 577, 12, 64), (1, 578, 6, 64), (1, 577, 2, 128), (1, 31, 2, 24), (1, 49, 2, 64)]
    + [(32, 577, 12, 64), (32, 578, 6, 64), (256, 1, 1, 64), (128, 17, 2, 32), (128, 129, 1, 16), (64, 255, 2, 40)]
    + [(128, 33, 2, 128), (128, 64, 2, 64), (100, 127, 3, 64), (64, 129, 4, 64), (16, 577, 12, 64), (9, 1000, 6, 64)]
    + [(1, 63, 3, 64), (1, 129, 1, 64), (2, 577, 12, 64), (3, 577, 12, 64), (4, 577, 12, 64), (1, 1025, 2, 64)],
)
def test_kernel_is_the_reference(sizes, dtype):
    batch, tokens, heads, head_dim = sizes
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, tokens, heads * head_dim, device="cuda").to(dtype) for _ in range(3))
    scale = 2 * head_dim**-0.5
    y = launch(q, k, v, heads, scale)
    kernels.assert_close(y, encoder_attention(q, k, v, heads, scale))
    with kernels.busy_memory():
        assert torch.equal(y, launch(q, k, v, heads, scale))


def exact(*shape, dtype=torch.float16):
    """Even integers up to 600, whose products FP32 adds up without rounding, in any order.

    Scores as large as theirs are rounded to a sixteenth otherwise, and two that are nearly equal mix differently.
    """
    return 2 * torch.randint(-300, 301, shape, device="cuda").to(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 20])
def test_kernel_keeps_scores_beyond_fp16_finite(head_dim, dtype):
    torch.manual_seed(0)
    constant = torch.full((1, 67, 2 * head_dim), 200, dtype=dtype, device="cuda")  # q · kᵀ is 2.6 million
    kernels.assert_close(launch(constant, constant, constant, 2, 0.125), constant)
    q, k, v = (exact(1, 67, 2 * head_dim, dtype=dtype) for _ in range(3))
    for scale in (0.125, -0.125):
        kernels.assert_close(launch(q, k, v, 2, scale), encoder_attention(q, k, v, 2, scale))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("rise", [0.25, 1.0, -1.0])
@pytest.mark.parametrize("batch", [1, 256])
def test_kernel_follows_the_highest_score(batch, rise, scale, dtype):
    """Scores that rise or fall from key to key, all of them far from zero."""
    torch.manual_seed(0)
    q, k, v = (torch.zeros(batch, 83, 64, dtype=dtype, device="cuda") for _ in range(3))
    q[:], k[..., 0] = 1, rise * torch.arange(83) - 100
    v.normal_()
    kernels.assert_close(launch(q, k, v, 1, scale), encoder_attention(q, k, v, 1, scale))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("tokens", "head_dim"), [(1, 64), (33, 16), (66, 48), (130, 128), (33, 5)])
def test_kernel_touches_nothing_outside(tokens, head_dim, dtype):
    """NaN before and behind the tensors, and what is in y, stays there."""
    torch.manual_seed(0)
    margin = 64
    memory = [kernels.poisoned(1, tokens + 2 * margin, head_dim, dtype=dtype) for _ in range(4)]
    q, k, v, y = (x[:, margin:-margin] for x in memory)
    for x in (q, k, v):
        x.normal_()
    kernels.assert_close(launch(q, k, v, 1, 0.3, y), encoder_attention(q, k, v, 1, 0.3))
    assert memory[3].isnan().sum() == 2 * margin * head_dim


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 65, 577])
def test_kernel_mixes_no_images(tokens):
    """NaN in one of many images stays there."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(130, tokens, 128, device="cuda").half() for _ in range(3))
    expected = launch(q, k, v, 2, 0.3)
    for x in (q, k, v):
        x[70] = torch.nan
    actual = launch(q, k, v, 2, 0.3)
    assert actual[70].isnan().all()
    others = torch.arange(130, device="cuda") != 70
    assert torch.equal(actual[others], expected[others])


@pytest.mark.gpu
def test_kernel_keeps_many_scores_beyond_fp16_finite():
    torch.manual_seed(0)
    q, k, v = (exact(64, 130, 2 * 64) for _ in range(3))
    for scale in (0.125, -0.125):
        kernels.assert_close(launch(q, k, v, 2, scale), encoder_attention(q, k, v, 2, scale))


@pytest.mark.gpu
def test_kernel_refuses_wide_heads_and_takes_no_images():
    wide, empty = torch.zeros(1, 2, 129, device="cuda"), torch.zeros(0, 2, 64, device="cuda")
    with pytest.raises(RuntimeError):
        launch(wide, wide, wide, 1, 1.0)
    launch(empty, empty, empty, 1, 1.0)
