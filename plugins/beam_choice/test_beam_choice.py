import ctypes

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch

from export_onnx import export
from models.trocr.decoding import OUT, Generation
from plugins import find, kernels
from plugins.beam_choice.reference import beam_choice
from plugins.greedy_choice.test_greedy_choice import RESTRICTED, tiny_model
from plugins.testing import assert_replaces_in_trocr, grafted, run_function, trocr_part

PLUGIN = find("beam_choice")
NEVER = np.iinfo(np.int32).max
STATE = (*("sequences", "scores", "ancestors", "hypotheses", "lengths", "hypothesis_scores", "position", "finished"),)


def random_state(sizes, position, dtype, restricted=False, ends=(2,), few=True):
    """Inputs of the operator as arrays; few different logits, so that many are equal."""
    images, beams, vocabulary, capacity = sizes
    random = np.random.default_rng(0)
    allowed_from, forced = np.zeros(1, np.int32), np.full(1, -1, np.int32)
    if restricted:
        allowed_from = random.choice([0, position, position + 1, NEVER], vocabulary).astype(np.int32)
        forced = np.array([-1, -1, vocabulary // 2, vocabulary, 0], np.int32)[np.arange(capacity) % 5]
        forced[-1] = -1
    shape = (images, beams, vocabulary)
    logits = random.integers(-4, 5, shape) if few else 4 * random.standard_normal(shape)
    lengths = random.integers(0, 9, (images, beams), np.int32)
    return {
        "logits": logits.astype(dtype),
        "sequences": random.integers(0, vocabulary, (images, beams, capacity), np.int32),
        "scores": np.sort(-random.exponential(2, (images, beams)).astype(np.float32))[:, ::-1].copy(),
        "ancestors": random.integers(0, beams, (images, beams, capacity), np.int32),
        "hypotheses": random.integers(0, vocabulary, (images, beams, capacity), np.int32),
        "lengths": lengths,
        "hypothesis_scores": np.where(lengths > 0, -random.exponential(2, lengths.shape), OUT).astype(np.float32),
        "position": np.array([position], np.int32),
        "finished": random.integers(0, 2, images, np.int32),
        "allowed_from": allowed_from,
        "forced": forced,
        "ends": np.array(ends, np.int32),
        "penalties": np.arange(1, capacity + 1, dtype=np.float32) ** 0.7,
        "hopes": np.arange(1, capacity + 1, dtype=np.float32) ** 0.3,
    }


def expected_of(state, max_length=30, stop_when_full=0):
    """What follows in PyTorch, as arrays."""
    tensors = {name: torch.from_numpy(values) for name, values in state.items()}
    tensors["position"] = int(state["position"][0])
    made = dict(zip(STATE, beam_choice(**tensors, max_length=max_length, stop_when_full=stop_when_full), strict=True))
    made["position"] = torch.tensor([made["position"]], dtype=torch.int32)
    return [values.numpy() for values in made.values()]


# Sums of exponentials in another order: some units in the last place of a logarithm near 10.
def assert_equal(actual, expected):
    for name, values, reference in zip(STATE, actual, expected, strict=True):
        assert values.dtype == reference.dtype
        if values.dtype == np.float32:
            np.testing.assert_allclose(values, reference, rtol=1e-6, atol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(values, reference, err_msg=name)


SIZES = [((1, 1, 2, 1), 0), ((3, 4, 40, 16), 0), ((2, 3, 7, 9), 6), ((4, 2, 100, 8), 7), ((5, 5, 33, 12), 10)]
SIZES += [((2, 4, 50, 8), 9), ((2, 4, 50, 40), 27), ((2, 4, 50, 40), 28)]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize("ends", [(2,), (2, 5, 0)])
@pytest.mark.parametrize(("sizes", "position"), SIZES)
def test_function_is_the_reference(sizes, position, ends, restricted, dtype):
    ends = ends if sizes[2] > len(ends) else (1,)
    state = random_state(sizes, position, dtype, restricted, ends)
    for stop_when_full in (0, 1):
        attributes = {"max_length": 30, "stop_when_full": stop_when_full}
        assert_equal(run_function(PLUGIN, state, outputs=8, **attributes), expected_of(state, **attributes))


def first_state(sizes, dtype=np.float32):
    """Of a search that begins."""
    state = random_state(sizes, 0, dtype)
    state["scores"][:] = OUT
    state["scores"][:, 0] = 0
    state["lengths"][:] = 0
    state["hypothesis_scores"][:] = OUT
    state["finished"][:] = 0
    return state


def test_only_the_first_beam_branches_at_the_beginning():
    state = first_state((2, 3, 20, 8))
    made = dict(zip(STATE, expected_of(state)))
    assert (made["ancestors"][:, :, 0] == 0).all()
    for image in range(2):
        logits = state["logits"][image, 0].copy()
        logits[2] = -100  # an end does not go on
        assert made["sequences"][image, :, 1].tolist() == np.argsort(-logits, kind="stable")[:3].tolist()


def test_equal_beams_come_in_their_order():
    state = first_state((1, 3, 20, 8))
    state["scores"][:] = 0
    state["logits"][:] = state["logits"][:, :1]
    state["logits"][:, :, 7] = 9
    made = dict(zip(STATE, expected_of(state)))
    assert made["ancestors"][0, :, 0].tolist() == [0, 1, 2]
    assert made["sequences"][0, :, 1].tolist() == [7, 7, 7]
    assert_equal(run_function(PLUGIN, state, outputs=8, max_length=30, stop_when_full=0), expected_of(state))


def test_images_that_have_finished_keep_their_hypotheses():
    state = random_state((6, 3, 40, 8), 3, np.float32)
    state["logits"][:, :, 2] = 20  # all end, and well
    state["finished"][:] = [0, 1, 0, 1, 1, 0]
    made = dict(zip(STATE, expected_of(state)))
    for image, finished in enumerate(state["finished"]):
        for name in ("hypotheses", "lengths", "hypothesis_scores"):
            assert np.array_equal(made[name][image], state[name][image]) == finished


def test_pattern_replaces_those_of_trocr():
    (match,) = assert_replaces_in_trocr(PLUGIN, "step", 3)
    assert [tensor.name for tensor in match.inputs[:9]] == ["logits", *STATE]
    assert [tensor.name for tensor in match.outputs] == [f"next_{name}" for name in STATE]
    allowed_from, forced, ends, *_ = (tensor.values.tolist() for tensor in match.inputs[9:])
    assert (allowed_from, forced, ends) == ([0], [-1], [2])
    assert set(match.attributes) == {"max_length", "stop_when_full"}


@pytest.mark.parametrize(
    ("settings", "restricted", "forced"),
    [
        (dict(RESTRICTED.__dict__, num_beams=4, early_stopping=True), True, True),
        (dict(start=0, eos=(), pad=1, max_length=40, suppress=(3, 4), num_beams=2, length_penalty=0.0), True, False),
        (
            dict(start=0, eos=(2,), pad=0, max_length=40, forced_eos=(2, 7), num_beams=3, length_penalty=-1.5),
            False,
            True,
        ),
        (dict(start=0, eos=(2, 4, 6), pad=0, max_length=40, num_beams=5, early_stopping="never"), False, False),
    ],
)
def test_pattern_takes_settings(settings, restricted, forced):
    from models.trocr.network import parts_of, random_weights

    generation = Generation(**settings)
    (step,) = (one for one in parts_of(random_weights(tiny_model(50)), generation) if one.part.name == "step")
    graph = gs.import_onnx(export(step))
    (match,) = PLUGIN.pattern.matches(graph)
    allowed_from, table, ends, penalties, hopes = (tensor.values for tensor in match.inputs[9:])
    assert allowed_from.shape == ((50,) if restricted else (1,))
    assert table.shape == ((128,) if forced else (1,))
    assert ends.tolist() == list(generation.eos or (-1,))
    np.testing.assert_allclose(penalties, np.arange(1, 129.0) ** generation.length_penalty, rtol=1e-6)
    if generation.early_stopping == "never":
        assert set(hopes.tolist()) == {39.0}
    else:
        assert hopes.tolist() == penalties.tolist()
    assert match.attributes == {"max_length": 40, "stop_when_full": int(generation.early_stopping is True)}
    session = grafted(graph, PLUGIN, [match])
    inputs = step.example({"batch": 3, "length": 40}, np.random.default_rng(0))
    for position in (0, 1, 3, 4, 36, 37):  # behind it all have ended, 10⁹ hides their scores, and PyTorch takes any
        inputs["position"][:] = position
        with torch.inference_mode():
            expected = step.module(*(torch.from_numpy(values) for values in inputs.values()))
        assert_equal(session.run(None, inputs)[1:9], [values.numpy() for values in expected[1:9]])


@pytest.mark.parametrize("change", ["candidates", "beams", "smallest", "ends"])
def test_pattern_refuses_other_searches(change):
    graph = gs.import_onnx(trocr_part("step", 3)[1])
    tops = [node for node in graph.nodes if node.op == "TopK"]
    if change == "smallest":
        tops[0].attrs["largest"] = 0
    elif change == "candidates":
        tops[0].inputs[1] = gs.Constant("fewer", np.array([5]))
    elif change == "beams":
        tops[1].inputs[1] = gs.Constant("fewer", np.array([2]))
    else:
        (equal,) = (node for node in graph.nodes if node.op == "Equal" and "ends" in node.inputs[1].name)
        equal.inputs[1] = gs.Constant("more", np.array([2, 3], np.int32))
    assert PLUGIN.pattern.matches(graph) == []


def test_scores_are_fp32_in_fp16_graphs():
    import surgeon

    exportable, model = trocr_part("step", 3)
    graph = gs.import_onnx(model)
    (match,) = PLUGIN.pattern.matches(graph)
    node = surgeon.graft(graph, PLUGIN, match)
    graph.cleanup()
    surgeon.to_fp16(graph, exportable.part, [])
    types = [np.dtype(tensor.dtype).name for tensor in (*node.inputs, *node.outputs)]
    floats = {index: dtype for index, dtype in enumerate(types) if dtype.startswith("float")}
    assert floats == {0: "float16", **dict.fromkeys((2, 6, 12, 13, 15, 19), "float32")}


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


def launch(state, max_length=30, stop_when_full=0, in_place=()):
    """The kernels' eight outputs, which are the inputs that they continue where these are `in_place`; they write
    nothing behind them or behind their workspace."""
    on_gpu = {name: torch.from_numpy(values).cuda() for name, values in state.items()}
    guarded = {
        name: torch.full((on_gpu[name].numel() + 64,), -7, dtype=on_gpu[name].dtype, device="cuda") for name in STATE
    }
    outputs = {name: guarded[name][: on_gpu[name].numel()].view(on_gpu[name].shape) for name in STATE}
    for name in in_place:
        outputs[name].copy_(on_gpu[name])
        on_gpu[name] = outputs[name]
    (images, beams, vocabulary), capacity = state["logits"].shape, state["sequences"].shape[2]
    counts = [len(state[name]) for name in ("allowed_from", "forced", "ends", "penalties")]
    words = workspace_bytes(images * beams, vocabulary) // 8
    workspace = torch.full((words + 64,), -7, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()  # constants are read without waiting for the kernels that make them here
    kernels.launch(
        *("beam_choice", on_gpu["logits"].dtype, *on_gpu.values(), *outputs.values(), workspace),
        *(images, beams, vocabulary, capacity, *counts, max_length, stop_when_full),
    )
    for name in STATE:
        assert (guarded[name][on_gpu[name].numel() :] == -7).all()
        if name not in in_place:
            np.testing.assert_array_equal(on_gpu[name].cpu().numpy(), state[name])
    assert (workspace[words:] == -7).all()
    return [values.cpu().numpy() for values in outputs.values()]


def workspace_bytes(rows, vocabulary):
    function = kernels.library().beam_choice_workspace_bytes
    function.restype = ctypes.c_int64
    return function(ctypes.c_int64(rows), ctypes.c_int64(vocabulary))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("in_place", [STATE, STATE[4:], ()])
@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize(
    ("sizes", "position"),
    [*SIZES, ((1, 4, 2048, 12), 7), ((9, 3, 2049, 12), 10), ((17, 4, 255, 65), 40)]
    + [((1, 4, 50265, 64), 17), ((8, 4, 50265, 24), 2), ((1, 32, 3001, 100), 60), ((2, 3, 64044, 700), 300)],
)
def test_kernel_is_the_reference(sizes, position, restricted, in_place, dtype):
    few = sizes[2] < 10000  # where many are equal, all of the best are
    state = random_state(sizes, position, dtype, restricted, few=few)
    first = launch(state, in_place=in_place)
    assert_equal(first, expected_of(state))
    for actual, again in zip(first, launch(state, in_place=in_place)):
        np.testing.assert_array_equal(actual, again)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("stop_when_full", [0, 1])
@pytest.mark.parametrize("beams", [1, 2, 3, 4, 8, 16, 25, 32])
@pytest.mark.parametrize("ends", [(2,), (2, 5, 0), tuple(range(3, 30, 2))])
def test_kernel_takes_any_number_of_beams_and_ends(ends, beams, stop_when_full, dtype):
    for vocabulary in (40, 700, 5000):
        state = random_state((3, beams, vocabulary, 20), 11, dtype, ends=ends, few=False)
        state["logits"][1, :, list(ends)] += 10
        if (1 + len(ends)) * beams > 128:
            with pytest.raises(RuntimeError):
                launch(state)
            continue
        assert_equal(launch(state, 30, stop_when_full), expected_of(state, 30, stop_when_full))
        assert_equal(launch(state, 13, stop_when_full), expected_of(state, 13, stop_when_full))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_kernel_begins_a_search(dtype):
    for sizes in ((3, 4, 1000, 16), (1, 7, 300, 8)):
        assert_equal(launch(first_state(sizes, dtype), in_place=STATE), expected_of(first_state(sizes, dtype)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("places", [(0, 1, 2, 3), (31, 32, 255, 256), (2047, 2048, 4095, 4999), (4, 260, 516, 772)])
def test_kernel_finds_the_best_wherever_they_are(places, dtype):
    """Next to each other, in one segment, and each in its own; also equal ones."""
    state = random_state((2, 2, 5000, 8), 3, dtype)
    state["finished"][:] = 0
    state["scores"][:] = [0, -0.5]
    state["logits"][:] = -10
    state["logits"][0, 0, list(places)] = [5, 7, 6, 8]
    state["logits"][1, :, list(places)] = 5
    assert_equal(launch(state), expected_of(state))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_kernel_takes_the_first_of_equal_ones(dtype):
    state = random_state((2, 4, 3000, 8), 3, dtype)
    state["logits"][:] = 1.5
    state["scores"][1] = -1
    assert_equal(launch(state), expected_of(state))


@pytest.mark.gpu
def test_kernel_takes_what_nothing_is_allowed_for():
    state = random_state((2, 3, 300, 8), 3, np.float32)
    state["allowed_from"] = np.full(300, NEVER, np.int32)
    assert_equal(launch(state), expected_of(state))
    state.update(allowed_from=np.zeros(1, np.int32), forced=np.array([300], np.int32))
    assert_equal(launch(state), expected_of(state))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_kernel_survives_numbers_that_are_none(dtype):
    """It makes no sense of them, and reads and writes nothing outside."""
    for bad in (np.nan, np.inf, -np.inf):
        state = random_state((3, 4, 3000, 8), 3, dtype, few=False)
        state["logits"][0, 1, 77] = bad
        state["logits"][1] = bad
        made = dict(zip(STATE, launch(state)))
        assert ((made["sequences"] >= 0) & (made["sequences"] < 3000)).all()
        assert ((made["ancestors"] >= 0) & (made["ancestors"] < 4)).all()
        expected = dict(zip(STATE, expected_of(state)))
        for name in STATE[:6]:  # the images do not touch each other
            np.testing.assert_allclose(made[name][2], expected[name][2], rtol=1e-6, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("stop_when_full", [0, 1])
def test_kernel_searches_step_by_step_in_place(stop_when_full, dtype):
    random = np.random.default_rng(1)
    state = first_state((5, 4, 3000, 30), dtype)
    state["ends"] = np.array([4, 11], np.int32)
    for _ in range(32):  # two more than there is room for
        state["logits"] = (2 * random.standard_normal((5, 4, 3000))).astype(dtype)
        state["logits"][random.integers(0, 5), random.integers(0, 4), 11] = 10
        expected = expected_of(state, 28, stop_when_full)
        actual = launch(state, 28, stop_when_full, in_place=STATE)
        assert_equal(actual, expected)
        state.update(zip(STATE, actual))
    assert state["finished"].any()
    assert state["position"].tolist() == [32]


@pytest.mark.gpu
def test_kernel_refuses_other_restrictions_and_too_few_tokens():
    state = random_state((2, 3, 9, 8), 2, np.float32)
    with pytest.raises(RuntimeError):
        launch({**state, "allowed_from": np.zeros(2, np.int32)})
    with pytest.raises(RuntimeError):
        launch({**state, "ends": np.arange(9, dtype=np.int32)})
