"""The TensorRT executor's bookkeeping, on a stand-in for the GPU: engines are ONNX Runtime sessions, device memory is
the host's, and a CUDA graph is a list of calls.  What kernels compute is tested in test_engines.py."""

from __future__ import annotations

import ctypes
import json
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import infer_trt
from build_engine import TensorRT, capped, profile_shapes
from infer_trt import OnnxRuntimeExecutor, TensorRTExecutor
from models.chain import BuildFolder
from models.spec import Part
from models.trocr.decoding import Generation
from models.trocr.pipeline import recognise

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
    """Runs at once what is queued, or keeps it while a graph is being captured."""

    recorded: list[Callable[[], None]] | None = None
    handle = 1

    def synchronize(self) -> None:
        pass


class Event:
    def record(self, stream: Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass

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
        if Stream.recorded is None:
            self.compute()
        else:
            Stream.recorded.append(self.compute)
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
        size = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer((ctypes.c_byte * size).from_address(self.addresses[name]), dtype).reshape(shape)


class Engine:
    device_memory_size = 64
    num_optimization_profiles = 2
    part: Part

    def __init__(self, model: bytes) -> None:
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int32)": np.int32}
        tensors = (*self.session.get_inputs(), *self.session.get_outputs())
        self.types = {tensor.name: types[tensor.type] for tensor in tensors}

    def get_tensor_dtype(self, name: str) -> type:
        return self.types[name]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        tensor = next(tensor for tensor in self.part.inputs if tensor.name == name)
        return profile_shapes(self.part, tensor, self.part.profiles()[profile])

    def create_execution_context_without_device_memory(self) -> Context:
        return Context(self)


def capture_begins(stream: int, mode: object) -> tuple[int]:
    Stream.recorded = []
    return (0,)


def capture_ends(stream: int) -> tuple[int, list[Callable[[], None]]]:
    recorded, Stream.recorded = Stream.recorded, None
    assert recorded
    return (0, recorded)


def launch(graph: list[Callable[[], None]], stream: int) -> tuple[int]:
    for call in graph:
        call()
    return (0,)


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
def executor(built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[bool], TensorRTExecutor]:
    """Makes executors of the demo TrOCR in FP16, with kernels that work in place or with TensorRT's own layers."""
    driver = types.ModuleType("pycuda.driver")
    driver.__dict__.update(
        mem_alloc=Memory,
        Stream=Stream,
        Event=Event,
        pagelocked_empty=np.empty,
        memcpy_htod_async=lambda target, source, stream: ctypes.memmove(target, source.ctypes.data, source.nbytes),
        memcpy_dtoh_async=lambda target, source, stream: ctypes.memmove(target.ctypes.data, int(source), target.nbytes),
        memcpy_dtod_async=lambda target, source, size, stream: ctypes.memmove(target, source, size),
        memset_d8_async=lambda target, value, size, stream: ctypes.memset(target, value, size),
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

    tensorrt.__dict__.update(Logger=Logger, Runtime=Runtime, nptype=lambda dtype: dtype)
    monkeypatch.setattr(infer_trt, "find_tensorrt", lambda: TensorRT(tensorrt, "stand-in", builds_without_gpu=False))
    monkeypatch.setattr(infer_trt, "cuda_runtime", lambda: RUNTIME)
    monkeypatch.setattr(infer_trt.plugins, "load_library", lambda: None)

    def make(in_place: bool) -> TensorRTExecutor:
        here = {**HERE, "plugins": "stand-in" if in_place else None}
        monkeypatch.setattr(infer_trt, "identity", lambda tensorrt: here)
        folder = BuildFolder(tmp_path, "trocr")
        manifest = json.loads((built / "trocr" / "manifest.json").read_text())
        manifest["engines"] = {"fp16": {part["name"]: here for part in manifest["parts"]}}
        folder.write_manifest(manifest)
        for part in folder.parts():
            folder.engine(part.name, "fp16").write_bytes((built / "trocr" / f"{part.name}.fp16.onnx").read_bytes())
        made = TensorRTExecutor(folder, "fp16")
        for name, engine in made.engines.items():
            engine.part = made.parts[name]
        return made

    return make


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("beams", [1, 3])
def test_decoding_is_that_of_onnx_runtime_and_allocates_once(built, executor, in_place, beams):
    folder = BuildFolder(built, "trocr")
    settings = folder.manifest()["settings"]
    generation = replace(Generation.from_json(settings["generation"]), max_length=14, num_beams=beams)
    random = np.random.default_rng(0)
    images = settings["images"]
    batches = [
        random.uniform(-1, 1, (rows, 3, images["height"], images["width"])).astype(np.float32) for rows in (3, 1, 3)
    ]
    reference = OnnxRuntimeExecutor(folder, "fp16")
    tested = executor(in_place)
    for batch in batches:
        expected = recognise(reference, settings, generation, batch)
        assert recognise(tested, settings, generation, batch) == expected
    allocations = Memory.allocations
    calls = len(tested.calls)
    recognise(tested, settings, generation, batches[1])
    recognise(tested, settings, generation, batches[0])
    assert (Memory.allocations, len(tested.calls)) == (allocations, calls)


def test_cache_is_updated_where_it_is(executor):
    tested = executor(True)
    (part,) = (part for part in tested.parts.values() if part.name == "step")
    sizes = {"batch": 2, "length": 16}
    inputs = {
        tensor.name: tested.zeros("step", tensor.name, sizes)
        if tensor.internal
        else np.full(tensor.sizes(sizes), 5, np.int32)
        for tensor in part.inputs
    }
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
    assert tested.limits("step")["batch"] == (1, 32)


def test_latencies_are_as_many_as_asked_for(executor):
    tested = executor(True)
    (image,) = tested.parts["encoder"].inputs
    images = np.zeros(image.sizes({"batch": 1}), np.float32)
    assert tested.latencies("encoder", {"pixel_values": images}, 3) == [1.0] * 3
