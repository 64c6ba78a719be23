import ctypes

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch

from export_onnx import export
from models.trocr.decoding import Generation
from plugins import find, kernels
from plugins.greedy_choice.reference import greedy_choice
from plugins.testing import assert_replaces_in_trocr, grafted, run_function, trocr_part

PLUGIN = find("greedy_choice")
NEVER = np.iinfo(np.int32).max
PAD = 1


def random_state(rows, vocabulary, capacity, position, dtype, restricted=False, ends=(2,)):
    """Inputs of the operator as arrays; few different logits, so that many are equal."""
    random = np.random.default_rng(0)
    allowed_from, forced = np.zeros(1, np.int32), np.full(1, -1, np.int32)
    if restricted:
        allowed_from = random.choice([0, position, position + 1, NEVER], vocabulary).astype(np.int32)
        forced = np.array([-1, -1, vocabulary // 2, 0], np.int32)[np.arange(capacity) % 4]
        forced[-1] = -1
    return {
        "logits": random.integers(-4, 5, (rows, vocabulary)).astype(dtype),
        "sequences": random.integers(0, vocabulary, (rows, capacity), np.int32),
        "position": np.array([position], np.int32),
        "finished": random.integers(0, 2, rows, np.int32),
        "allowed_from": allowed_from,
        "forced": forced,
        "ends": np.array(ends, np.int32),
    }


def expected_of(state, pad=PAD):
    """What follows in PyTorch, as arrays."""
    tensors = {name: torch.from_numpy(values) for name, values in state.items()}
    sequences, position, finished = greedy_choice(**{**tensors, "position": int(state["position"][0])}, pad=pad)
    return sequences.numpy(), np.array([position], np.int32), finished.numpy()


def assert_equal(actual, expected):
    for values, reference in zip(actual, expected, strict=True):
        assert values.dtype == reference.dtype
        np.testing.assert_array_equal(values, reference)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize(
    ("rows", "vocabulary", "capacity", "position"),
    [(1, 1, 1, 0), (3, 40, 16, 0), (2, 7, 9, 6), (4, 100, 8, 7), (5, 33, 12, 10), (2, 50, 8, 9)],
)
def test_function_is_the_reference(rows, vocabulary, capacity, position, restricted, dtype):
    state = random_state(rows, vocabulary, capacity, position, dtype, restricted, ends=(2, 5, 0))
    assert_equal(run_function(PLUGIN, state, outputs=3, pad=PAD), expected_of(state))


def test_nothing_ends_without_ends():
    state = random_state(6, 5, 8, 3, np.float32, ends=(-1,))
    _, _, finished = run_function(PLUGIN, state, outputs=3, pad=2)
    np.testing.assert_array_equal(finished, state["finished"])


def test_first_token_where_none_is_allowed():
    state = random_state(2, 5, 8, 3, np.float32)
    state.update(allowed_from=np.full(5, NEVER, np.int32), finished=np.zeros(2, np.int32))
    sequences, _, _ = run_function(PLUGIN, state, outputs=3, pad=PAD)
    assert sequences[:, 4].tolist() == [0, 0]
    assert_equal(expected_of(state)[:1], [sequences])


def test_pattern_replaces_those_of_trocr():
    (match,) = assert_replaces_in_trocr(PLUGIN, "step")
    assert [tensor.name for tensor in match.inputs[:4]] == ["logits", "sequences", "position", "finished"]
    assert [tensor.name for tensor in match.outputs] == ["next_sequences", "next_position", "next_finished"]
    assert [tensor.values.tolist() for tensor in match.inputs[4:]] == [[0], [-1], [2]]
    assert match.attributes == {"pad": 1}


RESTRICTED = Generation(
    *(0, (2, 9), 1, 40),
    min_length=5,
    forced_bos=11,
    forced_eos=(2,),
    suppress=(3,),
    begin_suppress=(5,),
)


def tiny_model(vocab_size):
    from transformers import TrOCRConfig, VisionEncoderDecoderConfig, ViTConfig

    encoder = ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, image_size=[64, 256]
    )
    decoder = TrOCRConfig(
        vocab_size=vocab_size, d_model=64, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=256,
        max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    return VisionEncoderDecoderConfig(encoder=encoder.to_dict(), decoder=decoder.to_dict())


@pytest.mark.parametrize(
    ("generation", "restricted", "forced"),
    [
        (RESTRICTED, True, True),
        (Generation(0, (), 1, 40, suppress=(3, 4)), True, False),
        (Generation(0, (2,), 0, 40, forced_eos=(2, 7)), False, True),
    ],
)
def test_pattern_takes_restrictions(generation, restricted, forced):
    from models.trocr.network import parts_of, random_weights

    (step,) = (one for one in parts_of(random_weights(tiny_model(50)), generation) if one.part.name == "step")
    graph = gs.import_onnx(export(step))
    (match,) = PLUGIN.pattern.matches(graph)
    *_, allowed_from, table, ends = (tensor.values for tensor in match.inputs if isinstance(tensor, gs.Constant))
    assert allowed_from.shape == ((50,) if restricted else (1,))
    assert table.shape == ((128,) if forced else (1,))
    assert ends.tolist() == list(generation.eos or (-1,))
    assert match.attributes == {"pad": generation.pad}
    session = grafted(graph, PLUGIN, [match])
    inputs = step.example({"batch": 3, "length": 40}, np.random.default_rng(0))
    for position in (0, 1, 3, 4, 37, 38, 39):
        inputs["position"][:] = position
        with torch.inference_mode():
            expected = step.module(*(torch.from_numpy(values) for values in inputs.values()))
        assert_equal(session.run(None, inputs)[1:4], [values.numpy() for values in expected[1:4]])


def test_pattern_refuses_the_last_of_equals():
    graph = gs.import_onnx(trocr_part("step")[1])
    for node in graph.nodes:
        if node.op == "ArgMax":
            node.attrs["select_last_index"] = 1
    assert PLUGIN.pattern.matches(graph) == []


STATE = ("sequences", "position", "finished")


def launch(state, pad=PAD, in_place=()):
    """The kernels' three outputs, which are the inputs that they continue where these are `in_place`; they write
    nothing behind them or behind their workspace."""
    on_gpu = {name: torch.from_numpy(values).cuda() for name, values in state.items()}
    guarded = {name: torch.full((on_gpu[name].numel() + 64,), -7, dtype=torch.int32, device="cuda") for name in STATE}
    outputs = {name: guarded[name][: on_gpu[name].numel()].view(on_gpu[name].shape) for name in STATE}
    for name in in_place:
        outputs[name].copy_(on_gpu[name])
        on_gpu[name] = outputs[name]
    (rows, vocabulary), capacity = state["logits"].shape, state["sequences"].shape[1]
    counts = [len(state[name]) for name in ("allowed_from", "forced", "ends")]
    words = workspace_bytes(rows, vocabulary) // 8
    workspace = torch.full((words + 64,), -7, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()  # constants are read without waiting for the kernels that make them here
    kernels.launch(
        *("greedy_choice", on_gpu["logits"].dtype, *on_gpu.values(), *outputs.values(), workspace),
        *(rows, vocabulary, capacity, *counts, pad),
    )
    for name in STATE:
        assert (guarded[name][on_gpu[name].numel() :] == -7).all()
        if name not in in_place:
            np.testing.assert_array_equal(on_gpu[name].cpu().numpy(), state[name])
    assert (workspace[words:] == -7).all()
    return [values.cpu().numpy() for values in outputs.values()]


def workspace_bytes(rows, vocabulary):
    function = kernels.library().greedy_choice_workspace_bytes
    function.restype = ctypes.c_int64
    return function(ctypes.c_int64(rows), ctypes.c_int64(vocabulary))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("in_place", [STATE, STATE[2:], ()])
@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize(
    ("rows", "vocabulary", "capacity", "position"),
    [(1, 1, 1, 0), (3, 40, 16, 0), (2, 7, 9, 6), (4, 2048, 8, 7), (33, 2049, 12, 10), (70, 255, 65, 40), (0, 9, 8, 3)]
    + [(1, 50265, 64, 17), (8, 50265, 24, 2), (32, 64044, 512, 300), (2, 50, 8, 9), (5, 300, 8, 3)],
)
def test_kernel_is_the_reference(rows, vocabulary, capacity, position, restricted, in_place, dtype):
    state = random_state(rows, vocabulary, capacity, position, dtype, restricted, ends=(2, 5, 0))
    assert_equal(launch(state, in_place=in_place), expected_of(state))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("place", [0, 1, 31, 255, 256, 2047, 2048, 4999])
@pytest.mark.parametrize("logit", [np.nan, np.inf, 3.0])
def test_kernel_finds_the_highest_wherever_it_is(logit, place, dtype):
    state = random_state(3, 5000, 8, 2, dtype)
    state["finished"][:] = 0
    state["logits"][:] = -np.inf
    state["logits"][1, [17, 4000]] = [-1.0, 2.0]
    state["logits"][2] = -np.float32(3.0)
    state["logits"][1:, place] = logit
    if place > 0 and not np.isnan(logit):
        state["logits"][2, : place // 2] = -0.0
    sequences, _, _ = launch(state)
    expected = [0, place, place]
    assert sequences[:, 3].tolist() == state["logits"].argmax(axis=1).tolist() == expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_kernel_takes_the_first_nan(dtype):
    state = random_state(2, 5000, 8, 2, dtype)
    state.update(finished=np.zeros(2, np.int32))
    state["logits"][0, [30, 1200, 4000]] = [np.inf, -np.nan, np.nan]
    state["logits"][1, [30, 1200, 4000]] = [np.nan, np.nan, -np.nan]
    assert launch(state)[0][:, 3].tolist() == [1200, 30]


@pytest.mark.gpu
def test_kernel_takes_both_zeros_for_equal():
    state = random_state(2, 5000, 8, 2, np.float32)
    state.update(finished=np.zeros(2, np.int32))
    state["logits"][:] = -1
    state["logits"][0, [20, 3000]] = [-0.0, 0.0]
    state["logits"][1, [20, 3000]] = [0.0, -0.0]
    assert launch(state)[0][:, 3].tolist() == [20, 20]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_kernel_decodes_step_by_step_in_place(dtype):
    random = np.random.default_rng(1)
    state = random_state(9, 3000, 30, 0, dtype, ends=(4, 11))
    state["finished"][:] = 0
    for _ in range(32):  # two more than there is room for
        state["logits"] = random.standard_normal((9, 3000)).astype(dtype)
        state["logits"][random.integers(0, 9), 11] = 50
        expected = expected_of(state)
        actual = launch(state, in_place=STATE)
        assert_equal(actual, expected)
        state.update(zip(STATE, actual))
    assert 2 < state["finished"].sum() <= 9
    assert state["position"].tolist() == [32]


@pytest.mark.gpu
def test_kernel_refuses_other_restrictions():
    state = random_state(2, 9, 8, 2, np.float32)
    state["allowed_from"] = np.zeros(2, np.int32)
    with pytest.raises(RuntimeError):
        launch(state)
