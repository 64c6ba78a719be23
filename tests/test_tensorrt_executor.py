"""The TensorRT executor's bookkeeping, on a stand-in for the GPU: engines are ONNX Runtime sessions, device memory is
the host's, and a CUDA graph is a list of calls.  What kernels compute is tested in test_engines.py."""

from __future__ import annotations

import ctypes
import json
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import compare
import infer_trt
import plugins
from build_engine import TensorRT, capped, profile_shapes
from infer_trt import OnnxRuntimeExecutor, TensorRTExecutor
from models import drift, engines
from models.chain import BuildFolder
from models.spec import Part, TensorSpec
from models.trocr.decoding import Generation
from models.trocr.pipeline import recognise
from tests.run_engines import as_numpy

STATE = ("sequences", "position", "finished")
HERE = {"tensorrt": "stand-in", "gpu": "stand-in", "plugins": "stand-in"}


class Memory:
    """Device memory: poisoned, and counted."""

    allocations = 0

    def __init__(self, size: int) -> None:
        Memory.allocations += 1
        self.data = np.full(size, 0xFF, np.uint8)

    def __int__(self) -> int:
        return self.data.ctypes.data


class Stream:
    """Runs nothing before someone waits for it.  What is queued while a graph is captured belongs to the graph."""

    recorded: list[Callable[[], object]] | None = None
    all: list[Stream] = []

    def __init__(self) -> None:
        self.queued: list[Callable[[], object]] = []
        self.handle = len(Stream.all)
        Stream.all.append(self)

    def queue(self, call: Callable[[], object]) -> None:
        (self.queued if Stream.recorded is None else Stream.recorded).append(call)

    def synchronize(self) -> None:
        while self.queued:
            self.queued.pop(0)()

    def wait_for_event(self, event: Event) -> None:
        self.queue(event.last)


class Event:
    """Knows how to wait for what it was last recorded behind."""

    def __init__(self) -> None:
        self.last: Callable[[], None] = lambda: None

    def record(self, stream: Stream) -> None:
        passed: list[bool] = []

        def wait() -> None:
            while not passed:
                stream.queued.pop(0)()

        stream.queue(lambda: passed.append(True))
        self.last = wait

    def synchronize(self) -> None:
        self.last()

    def time_since(self, other: Event) -> float:
        return 1.0


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profile: int | None = None
        self.device_memory = 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        inputs = {key: np.zeros(shape, self.engine.types[key]) for key, shape in self.shapes.items()}
        return self.engine.session.run([name], inputs)[0].shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        Stream.all[stream].queue(self.compute)
        return True

    def compute(self) -> None:
        assert self.profile in range(self.engine.num_optimization_profiles)
        assert self.device_memory
        inputs = {name: self.at(name, shape).copy() for name, shape in self.shapes.items()}
        names = [output.name for output in self.engine.session.get_outputs()]
        for name, values in zip(names, self.engine.session.run(names, inputs)):
            self.at(name, values.shape)[...] = values

    def at(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        dtype = np.dtype(self.engine.types[name])
        stored = self.engine.stored(name, shape)
        size = int(np.prod(stored)) * dtype.itemsize
        array = np.frombuffer((ctypes.c_byte * size).from_address(self.addresses[name]), dtype).reshape(stored)
        return array if stored == shape else array[..., : shape[1]].transpose(0, 3, 1, 2)


class Engine:
    device_memory_size = 64
    num_optimization_profiles = 2
    channel_last = False  # 4-D tensors in FP16, padded to 8 channels
    part: Part

    def __init__(self, model: bytes) -> None:
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int32)": np.int32}
        tensors = (*self.session.get_inputs(), *self.session.get_outputs())
        self.types = {tensor.name: types[tensor.type] for tensor in tensors}
        self.ranks = {tensor.name: len(tensor.shape) for tensor in tensors}

    def get_tensor_dtype(self, name: str) -> type:
        return self.types[name]

    def get_tensor_format(self, name: str) -> str:
        return "HWC8" if self.channel_last and self.ranks[name] == 4 and self.types[name] is np.float16 else "linear"

    def stored(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.get_tensor_format(name) == "linear":
            return shape
        batch, channels, height, width = shape
        return batch, height, width, (channels + 7) // 8 * 8

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        tensor = next(tensor for tensor in self.part.inputs if tensor.name == name)
        return profile_shapes(self.part, tensor, self.part.profiles()[profile])

    def create_execution_context_without_device_memory(self) -> Context:
        return Context(self)


def capture_begins(stream: int, mode: object) -> tuple[int]:
    Stream.recorded = []
    return (0,)


def capture_ends(stream: int) -> tuple[int, list[Callable[[], object]]]:
    recorded, Stream.recorded = Stream.recorded, None
    assert recorded
    return (0, recorded)


def launch(graph: list[Callable[[], object]], stream: int) -> tuple[int]:
    for call in graph:
        Stream.all[stream].queue(call)
    return (0,)


def to_gpu(target: int, source: np.ndarray) -> None:
    ctypes.memmove(target, source.ctypes.data, source.nbytes)


def to_host(target: np.ndarray, source: Memory) -> None:
    ctypes.memmove(target.ctypes.data, int(source), target.nbytes)


def to_host_once_ready(target: np.ndarray, source: Memory) -> None:
    for stream in Stream.all:
        stream.synchronize()
    to_host(target, source)


def queued(call: Callable[..., object]) -> Callable[..., None]:
    """A function that queues `call`; its last argument is the stream."""
    return lambda *arguments: arguments[-1].queue(partial(call, *arguments[:-1]))


RUNTIME = types.SimpleNamespace(
    cudaStreamCaptureMode=int,
    cudaStreamBeginCapture=capture_begins,
    cudaStreamEndCapture=capture_ends,
    cudaGraphInstantiate=lambda graph, flags: (0, graph),
    cudaGraphDestroy=lambda graph: (0,),
    cudaGraphExecDestroy=lambda graph: (0,),
    cudaGraphLaunch=launch,
)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> TensorRT:
    """Lets modules that import pycuda and ask for TensorRT get what is here."""
    driver = types.ModuleType("pycuda.driver")
    driver.__dict__.update(
        mem_alloc=Memory,
        Stream=Stream,
        Event=Event,
        pagelocked_empty=np.empty,
        memcpy_htod=to_gpu,
        memcpy_dtoh=to_host_once_ready,
        memcpy_htod_async=queued(to_gpu),
        memcpy_dtoh_async=queued(to_host),
        memcpy_dtod_async=queued(ctypes.memmove),
        memset_d8_async=queued(ctypes.memset),
    )
    package = types.ModuleType("pycuda")
    package.__dict__.update(driver=driver, autoprimaryctx=types.ModuleType("pycuda.autoprimaryctx"))
    for name, module in (("pycuda", package), ("pycuda.driver", driver), ("pycuda.autoprimaryctx", package)):
        monkeypatch.setitem(sys.modules, name, module)
    tensorrt = types.ModuleType("tensorrt")

    class Logger:
        ERROR = 0

        def __init__(self, severity: int) -> None:
            pass

    class Runtime:
        def __init__(self, logger: Logger) -> None:
            pass

        def deserialize_cuda_engine(self, model: bytes) -> Engine:
            return Engine(model)

    formats = types.SimpleNamespace(LINEAR="linear", HWC8="HWC8")
    tensorrt.__dict__.update(
        Logger=Logger, Runtime=Runtime, nptype=lambda dtype: dtype, TensorFormat=formats, __version__="0"
    )
    found = TensorRT(tensorrt, "stand-in", builds_without_gpu=False)
    monkeypatch.setattr(infer_trt, "find_tensorrt", lambda: found)
    monkeypatch.setattr(infer_trt, "cuda_runtime", lambda: RUNTIME)
    monkeypatch.setattr(Stream, "all", [])
    monkeypatch.setattr(TensorRTExecutor, "PIECE_BYTES", 4096)  # images come in several
    monkeypatch.setattr(infer_trt.plugins, "load_library", lambda: None)
    return found


@pytest.fixture
def executor(
    built: Path, stand_in: TensorRT, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[bool], TensorRTExecutor]:
    """Makes executors of the demo TrOCR in FP16, with kernels that work in place (on the caches, or on the state of a
    search as well) or with TensorRT's own layers."""

    def make(in_place: bool, state: bool = False, built: Path = built) -> TensorRTExecutor:
        here = {**HERE, "plugins": "stand-in" if in_place else None}
        monkeypatch.setattr(infer_trt, "identity", lambda tensorrt: here)
        folder = BuildFolder(tmp_path, "trocr")
        manifest = json.loads((built / "trocr" / "manifest.json").read_text())
        manifest["engines"] = {"fp16": {part["name"]: here for part in manifest["parts"]}}
        if not state:
            step = manifest["patched"]["fp16"]["step"]
            step["in_place"] = {key: value for key, value in step["in_place"].items() if key.startswith("present")}
        folder.write_manifest(manifest)
        for part in folder.parts():
            folder.engine(part.name, "fp16").write_bytes((built / "trocr" / f"{part.name}.fp16.onnx").read_bytes())
        made = TensorRTExecutor(folder, "fp16")
        for name, engine in made.engines.items():
            engine.part = made.parts[name]
        return made

    return make


@pytest.mark.parametrize(("in_place", "state"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("search", ["greedy", "beams", "beams on the host"])
def test_decoding_is_that_of_onnx_runtime_and_allocates_once(built, built_beams, executor, in_place, state, search):
    source = built_beams if search == "beams" else built
    folder = BuildFolder(source, "trocr")
    settings = folder.manifest()["settings"]
    generation = Generation.from_json(settings["generation"])
    assert generation.step_beams == (3 if search == "beams" else 1)
    if search == "greedy":
        generation = replace(generation, max_length=14)
    elif search == "beams on the host":
        generation = replace(generation, max_length=14, num_beams=3, no_repeat_ngram_size=2)
    random = np.random.default_rng(0)
    images = settings["images"]
    batches = [
        random.uniform(-1, 1, (rows, 3, images["height"], images["width"])).astype(np.float32) for rows in (3, 1, 3)
    ]
    reference = OnnxRuntimeExecutor(folder, "fp16")
    tested = executor(in_place, state, source)
    for batch in batches:
        expected = recognise(reference, settings, generation, batch)
        assert recognise(tested, settings, generation, batch) == expected
    allocations = Memory.allocations
    calls = len(tested.calls)
    recognise(tested, settings, generation, batches[1])
    recognise(tested, settings, generation, batches[0])
    assert (Memory.allocations, len(tested.calls)) == (allocations, calls)
    if (
        search != "beams on the host"
    ):  # sizes of two batches: a loop in place is always the same call, any other soon returns to one
        assert sum(key[0] == "step" for key in tested.calls) == 2 * (1 if state else 3)


def step_inputs(tested: TensorRTExecutor, **state: int) -> dict[str, Any]:
    """For two rows and 16 positions."""
    sizes = {"batch": 2, "length": 16}
    return {
        tensor.name: tested.zeros("step", tensor.name, sizes)
        if tensor.internal
        else np.full(tensor.sizes(sizes), state[tensor.name], np.int32)
        for tensor in tested.parts["step"].inputs
    }


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize(("until", "runs"), [("next_finished", 2 * TensorRTExecutor.LOOK_EVERY), (None, 12)])
def test_loops_stop_once_all_rows_have_ended(executor, monkeypatch, state, until, runs):
    tested = executor(True, state)
    carried = {f"next_{name}": name for name in STATE}
    outputs = tested.loop("step", step_inputs(tested, sequences=7, position=0, finished=1), carried, 12, until)
    assert outputs["next_position"].tolist() == [runs]
    assert outputs["next_finished"].tolist() == [1, 1]
    assert outputs["next_sequences"].tolist() == [[7] + [1] * runs + [7] * (15 - runs)] * 2  # padding
    assert not any(call.staged for call in tested.calls.values())  # the logits stay where they are


@pytest.mark.parametrize("times", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("state", [True, False])
def test_loops_are_runs_one_after_the_other(executor, built, times, state):
    tested, reference = executor(True, state), OnnxRuntimeExecutor(BuildFolder(built, "trocr"), "fp16")
    results = []
    for one in (tested, reference):
        carried = {f"next_{name}": name for name in STATE}
        carried.update((f"present_{kind}_{i}", f"self_{kind}_{i}") for kind in ("key", "value") for i in range(2))
        inputs = step_inputs(tested, sequences=7, position=0, finished=0)
        if one is reference:
            inputs = {name: as_numpy(value) for name, value in inputs.items()}
        outputs = one.loop("step", inputs, carried, times, "next_finished")
        results.append({name: as_numpy(outputs[name]) for name in carried})
    for name, values in results[0].items():
        np.testing.assert_array_equal(values, results[1][name])
    assert results[0]["next_position"].tolist() == [times]


def test_runs_do_not_wait_for_one_another(executor):
    """Inputs may change as soon as a run is queued, and what it needs may have to make way for the next one."""
    tested, random = executor(True), np.random.default_rng(0)
    batches = [random.uniform(-1, 1, (rows, 3, 64, 768)).astype(np.float32) for rows in (1, 2, 1, 3)]
    expected = [as_numpy(tested.run("encoder", {"pixel_values": batch})["encoder_hidden"]) for batch in batches]
    for kept in (len(batches), 1):
        tested.KEPT_CALLS = kept
        found = []
        for batch in batches:
            changing = batch.copy()
            found.append(tested.run("encoder", {"pixel_values": changing})["encoder_hidden"])
            changing[...] = np.nan
        assert any(stream.queued for stream in Stream.all)
        for values, array in list(zip(expected, found))[1:]:  # the third one's output replaces the first one's
            np.testing.assert_array_equal(values, as_numpy(array))


def test_large_batches_take_several_runs_that_do_not_overtake_one_another(executor, monkeypatch):
    tested, random = executor(True), np.random.default_rng(0)
    batches = [random.uniform(-1, 1, (3, 3, 64, 768)).astype(np.float32) for _ in range(3)]
    expected = [as_numpy(tested.run("encoder", {"pixel_values": batch})["encoder_hidden"]) for batch in batches]
    monkeypatch.setattr(tested, "RUN_BYTES", batches[0][:2].nbytes)
    assert tested.divided("encoder", {"pixel_values": batches[0]}) == [(0, 1), (1, 3)]
    found = []
    for count, batch in enumerate(batches, start=1):
        hidden = tested.run("encoder", {"pixel_values": batch})["encoder_hidden"]
        found.append(tested.rows(hidden, np.arange(count)))  # each in an array of its own
    for values, array in zip(expected, found):
        np.testing.assert_allclose(values[: array.shape[0]], as_numpy(array), atol=1e-2)


def test_measured_runs_are_alike(executor):
    """Though each moves on what is updated in place."""
    tested = executor(True, True)
    tested.latencies("step", step_inputs(tested, sequences=7, position=3, finished=0), 2)
    (call,) = tested.calls.values()
    assert call.arrays["next_position"].to_host().tolist() == [4]


def test_cache_is_updated_where_it_is(executor):
    tested = executor(True)
    inputs = step_inputs(tested, sequences=5, position=5, finished=0)
    outputs = tested.run("step", inputs)
    assert outputs["present_key_0"] is inputs["self_key_0"]
    cache = np.empty(inputs["self_key_0"].shape, inputs["self_key_0"].dtype)
    ctypes.memmove(cache.ctypes.data, inputs["self_key_0"].address, cache.nbytes)
    assert cache[:, :, 5].any()
    assert not cache[:, :, 6:].any()


def test_least_recently_used_calls_make_way(executor, monkeypatch):
    monkeypatch.setattr(TensorRTExecutor, "KEPT_CALLS", 2)
    tested = executor(True)
    (image,) = tested.parts["encoder"].inputs
    for rows in (1, 2, 3, 1):
        hidden = tested.run("encoder", {"pixel_values": np.zeros(image.sizes({"batch": rows}), np.float32)})
        assert hidden["encoder_hidden"].shape[0] == rows
    assert [key[-1][0] for key in tested.calls] == [3, 1]


def test_limits_are_the_engines(executor):
    tested = executor(True)
    tested.engines["encoder"].part = capped(tested.parts["encoder"], {"batch": 4})
    assert tested.limits("encoder") == {"batch": (1, 4)}
    assert tested.limits("step")["batch"] == (1, 64)


def test_latencies_are_as_many_as_asked_for(executor):
    tested = executor(True)
    (image,) = tested.parts["encoder"].inputs
    images = np.zeros(image.sizes({"batch": 1}), np.float32)
    assert tested.latencies("encoder", {"pixel_values": images}, 3) == [1.0] * 3


# ---------------------------------------------------------------------------------------------------------------------
# Single nodes: compare.py --ablation
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def measure_node(stand_in: TensorRT, monkeypatch: pytest.MonkeyPatch) -> Callable[[BuildFolder], dict[str, Any]]:
    """`engines.measure_node` in FP16, with graphs for engines."""
    for module in (engines, infer_trt):
        monkeypatch.setattr(module, "identity", lambda tensorrt: HERE)
    monkeypatch.setattr(engines, "build", lambda tensorrt, part, source, *_, isolated: source.read_bytes())
    return lambda folder: engines.measure_node(folder, "fp16", stand_in)


@pytest.mark.parametrize("channel_last", [False, True])
@pytest.mark.parametrize("channels", [3, 16])
def test_images_lie_as_the_engine_wants_them(measure_node, monkeypatch, tmp_path, channel_last, channels):
    monkeypatch.setattr(Engine, "channel_last", channel_last)
    shape = (2, channels, 5, 7)
    image, result = (TensorSpec(name, "float16", shape, internal=True) for name in "xy")
    parts = [Part(name, (image,), (result,), (), time_at=({},)) for name in ("layers", "plugin")]
    folder = BuildFolder(tmp_path, "restormer")
    folder.write_manifest(
        {
            "parts": [part.to_json() for part in parts],
            "patched": {"fp16": {part.name: {"in_place": {}} for part in parts}},
        }
    )
    slopes = np.linspace(1, 2, channels, dtype=np.float16)[:, None, None]
    for part, factor in zip(parts, (slopes, slopes * np.float16(0.75))):
        node = helper.make_node("Mul", ["x", "factor"], ["y"])
        ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, shape) for name in "xy"]
        graph = helper.make_graph([node], part.name, ends[:1], ends[1:], [numpy_helper.from_array(factor, "factor")])
        opsets = [helper.make_opsetid("", 17)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), folder.onnx(part.name, "fp16"))
    row = measure_node(folder)
    assert row["difference"] == pytest.approx(0.25, rel=1e-3)
    assert row["layers_us"] == row["plugin_us"] == dict.fromkeys(("median", "p20", "p80"), 1e3 / engines.RUNS)


def test_single_nodes_agree_with_the_layers_that_they_replace(built, measure_node, tmp_path):
    folder = BuildFolder(tmp_path, "trocr")
    folder.path.mkdir()
    kinds = compare.node_kinds(BuildFolder(built, "trocr"), plugins.names(), 1)
    for kind in kinds:
        compare.write_node(kind, folder, ["fp16"])
        assert measure_node(folder)["difference"] < 2e-3
    assert {kind.part.name for kind in kinds} == {"encoder", "prefill", "step"}


# ---------------------------------------------------------------------------------------------------------------------
# Engines whose outputs are all tensors: compare.py --find-drift
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plugin_library", [None, "stand-in"])
def test_all_tensors_come_back(built, stand_in, monkeypatch, tmp_path, plugin_library):
    """Also where a kernel could work in place: what it is given stays as it was."""
    for module in (engines, infer_trt):
        monkeypatch.setattr(module, "identity", lambda tensorrt: {**HERE, "plugins": plugin_library})
    monkeypatch.setattr(engines, "build", lambda tensorrt, part, source, *_: source.read_bytes())
    monkeypatch.setattr(Engine, "num_optimization_profiles", 1)
    monkeypatch.setattr(TensorRTExecutor, "KEPT_CALLS", 1)
    source, folder = BuildFolder(built, "trocr"), BuildFolder(tmp_path, "trocr")
    folder.path.mkdir()
    for part in source.parts():
        graph, sets = onnx.load(source.onnx(part.name, "fp16")), source.check_inputs(part)
        names = [name for node in graph.graph.node for name in node.output if "float16" not in name]
        types = drift.element_types(graph.graph)
        names = [name for name in names if types.get(name) in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)]
        marked, graph = drift.marked(part, graph, names)
        marked = drift.sized(marked, sets, only=True)
        assert len(marked.profiles()) == 1
        monkeypatch.setattr(Engine, "part", marked, raising=False)
        onnx.save(graph, folder.onnx(part.name, "fp16"))
        folder.write_check_inputs(part, sets)
        patched = {"fp16": {part.name: {"in_place": {}}}}
        folder.write_manifest({"parts": [marked.to_json()], "settings": {}, "patched": patched})
        assert engines.run_all(folder, "fp16", stand_in)["built_with"]["tensorrt"] == "stand-in"
        reference = OnnxRuntimeExecutor(folder, "fp16")
        with np.load(folder.path / engines.OUTPUTS) as outputs:
            for index, inputs in enumerate(sets):
                for name, expected in reference.run(part.name, inputs).items():
                    values = outputs[f"{part.name}/{index}/{name}"]
                    assert values.dtype == expected.dtype
                    np.testing.assert_array_equal(values, expected)
            assert len(outputs.files) == len(sets) * len(marked.outputs) >= len(sets) * len(names)
