"""Step 4: run a model on images.

    python infer_trt.py restormer photo.jpg folder/ -o restored/
    python infer_trt.py trocr line.png lines/ -o lines.jsonl
    python infer_trt.py trocr lines/ --precision fp16 --executor onnxruntime

INPUT is image files or folders of them.  Restormer writes OUT/<stem>.png; TrOCR prints `<path>TAB<text>` and, with -o,
writes one JSON object a line.  Needs no PyTorch: build/<model>/ holds all that execution takes.  `auto` runs TensorRT
engines where they can run, and says so when it falls back to ONNX Runtime on the patched graphs.  After more than one
image, the last line on stderr says how many a second that was, and what the time went into.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Deque, Dict, Generator, List, Optional, Tuple

import numpy as np
from tqdm import tqdm

import plugins
from build_engine import find_tensorrt, gpu_name, identity
from models.chain import PRECISIONS, BuildFolder, parser, run_script
from models.spec import Executor, ModelSpec, Unusable, loop_of_runs

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm", ".pgm"}
EXECUTORS = ("auto", "tensorrt", "onnxruntime")
READERS = min(8, os.cpu_count() or 1)  # threads; Pillow and numpy let each other work
LOADING = "loading the model"
READ_AHEAD = 3  # batches; more would only take memory


class OnnxRuntimeExecutor:
    """Runs the parts' ONNX graphs on the CPU.  Internal values are numpy arrays in the graph's precision.

    precision    "fp32" or "fp16" for the patched graphs, "" for the exported ones
    """

    def __init__(self, folder: BuildFolder, precision: str) -> None:
        import onnxruntime

        self.parts = {part.name: part for part in folder.parts()}
        step = ("surgeon.py", "--precision", precision) if precision else ("export_onnx.py",)
        paths = {name: folder.require(folder.onnx(name, precision), *step) for name in self.parts}
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.internal_dtype = np.dtype(np.float16 if precision == "fp16" else np.float32)
        self.sessions = {}
        for name, path in paths.items():
            try:
                self.sessions[name] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            except Exception as problem:  # ONNX Runtime's error types are private
                raise Unusable(f"{path} cannot be loaded: run `{folder.command(*step)}` again") from problem

    def run(self, part: str, inputs: Mapping[str, np.ndarray]) -> Dict[str, np.ndarray]:
        spec = self.parts[part]
        typed = {
            tensor.name: inputs[tensor.name].astype(self.internal_dtype, copy=False)
            if tensor.internal
            else inputs[tensor.name]
            for tensor in spec.inputs
        }
        names = [tensor.name for tensor in spec.outputs]
        return dict(zip(names, self.sessions[part].run(names, typed)))

    def loop(
        self, part: str, inputs: Mapping[str, Any], carried: Mapping[str, str], times: int, until: Optional[str] = None
    ) -> Dict[str, Any]:
        return loop_of_runs(self, part, inputs, carried, times, until)

    def limits(self, part: str) -> Mapping[str, Tuple[int, int]]:
        return self.parts[part].limits()

    def latencies(self, part: str, inputs: Mapping[str, np.ndarray], repeats: int) -> List[float]:
        measured = []
        for _ in range(1 + repeats):
            started = time.perf_counter()
            self.run(part, inputs)
            measured.append((time.perf_counter() - started) * 1e3)
        return measured[1:]

    def zeros(self, part: str, name: str, dims: Mapping[str, int]) -> np.ndarray:
        tensor = next(tensor for tensor in self.parts[part].inputs if tensor.name == name)
        return np.zeros(tensor.sizes(dims), self.internal_dtype)

    def rows(self, value: np.ndarray, indices: np.ndarray) -> np.ndarray:
        return value[indices]

    def synchronize(self) -> None:
        pass


@dataclass(frozen=True)
class DeviceArray:
    """An array in the GPU's memory."""

    memory: Any
    shape: Tuple[int, ...]
    dtype: np.dtype

    @staticmethod
    def empty(shape: Sequence[int], dtype: np.dtype) -> DeviceArray:
        from pycuda import driver

        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return DeviceArray(driver.mem_alloc(max(size, 1)), tuple(shape), dtype)

    @property
    def address(self) -> int:
        return int(self.memory)

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    def rows(self, begin: int, end: int) -> DeviceArray:
        """A view of rows, which does not keep the memory."""
        return DeviceArray(self.address + begin * self.row_bytes, (end - begin, *self.shape[1:]), self.dtype)

    def to_host(self) -> np.ndarray:
        from pycuda import driver

        host = np.empty(self.shape, self.dtype)
        driver.memcpy_dtoh(host, self.memory)
        return host


class Call:
    """A part at fixed shapes and addresses: an execution context, the arrays bound to it and, after its first run, a
    CUDA graph of it.

    arrays    tensor name → where it is on the GPU
    staged    tensor name → page-locked host memory, for what passes between host and GPU
    uploaded  an event: the inputs have left that memory
    """

    def __init__(
        self, context: Any, arrays: Mapping[str, DeviceArray], staged: Mapping[str, np.ndarray], uploaded: Any
    ) -> None:
        self.context, self.arrays, self.staged, self.uploaded = context, arrays, staged, uploaded
        self.graph: Any = None
        for name, array in arrays.items():
            context.set_tensor_address(name, array.address)

    def launch(self, stream: Any) -> None:
        """Queues a run.  In the first one TensorRT prepares itself for the shapes, which no graph can hold."""
        if self.graph is None:
            self.enqueue(stream)
            self.graph = self.captured(stream)
        else:
            checked(cuda_runtime().cudaGraphLaunch(self.graph, stream.handle))

    def enqueue(self, stream: Any) -> None:
        if not self.context.execute_async_v3(stream.handle):
            raise RuntimeError("TensorRT failed to run an engine; its log above says why")

    def captured(self, stream: Any) -> Any:
        """A run as a CUDA graph: one launch for all its kernels."""
        runtime = cuda_runtime()
        checked(runtime.cudaStreamBeginCapture(stream.handle, runtime.cudaStreamCaptureMode(1)))  # of this thread
        try:
            self.enqueue(stream)
        finally:
            (graph,) = checked(runtime.cudaStreamEndCapture(stream.handle))
        (executable,) = checked(runtime.cudaGraphInstantiate(graph, 0))
        checked(runtime.cudaGraphDestroy(graph))
        return executable

    def release(self) -> None:
        if self.graph is not None:
            checked(cuda_runtime().cudaGraphExecDestroy(self.graph))


def cuda_runtime() -> ModuleType:
    """cuda-python's bindings of the CUDA runtime; older releases have them in another place."""
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError:
        return importlib.import_module("cuda.cudart")


def checked(result: Tuple[Any, ...]) -> Tuple[Any, ...]:
    """What a function of cuda-python returns behind its error code."""
    error, *values = result
    if int(error) != 0:
        raise RuntimeError(f"CUDA: {error}")
    return tuple(values)


class TensorRTExecutor:
    """Runs the parts' engines on the GPU.  Internal values stay there.

    Shapes and addresses that come again find their context, arrays and CUDA graph ready: nothing is allocated then.
    """

    KEPT_CALLS = 32  # behind these, the least recently used one makes way
    LOOK_EVERY = 2  # runs of a loop between two looks at whether it should end; some 1.5 times as many come too late
    WARM_UPS = 5
    PIECE_BYTES = 1 << 20  # of an input on its way to the GPU
    RUN_BYTES = 16 << 20  # of inputs from the host: what is more, a part takes in several runs

    def __init__(self, folder: BuildFolder, precision: str) -> None:
        import pycuda.autoprimaryctx  # noqa: F401  (makes the context)
        import pycuda.driver as cuda

        self.tensorrt = find_tensorrt()
        trt = self.tensorrt.module
        step = ("build_engine.py", "--precision", precision)
        self.cuda, self.stream, self.uploads = cuda, cuda.Stream(), cuda.Stream()
        self.arrived, self.consumed = cuda.Event(), cuda.Event()  # what `uploads` brings, for `stream`
        self.parts = {part.name: part for part in folder.parts()}
        plugins.load_library()
        manifest, here = folder.manifest(), identity(self.tensorrt)
        built = manifest.get("engines", {}).get(precision, {})
        self.runtime = self.tensorrt.started("Runtime", trt.Logger(trt.Logger.ERROR))
        self.engines: Dict[str, Any] = {}
        for name in self.parts:
            path = folder.require(folder.engine(name, precision), *step)
            refuse_foreign(path, built.get(name, {}), here, folder.command(*step))
            self.engines[name] = self.runtime.deserialize_cuda_engine(path.read_bytes())
            if self.engines[name] is None:
                raise Unusable(f"{path} does not fit {self.tensorrt} on this GPU: run `{folder.command(*step)}`")
        self.dtypes = {
            (part, tensor.name): np.dtype(trt.nptype(engine.get_tensor_dtype(tensor.name)))
            for part, engine in self.engines.items()
            for tensor in (*self.parts[part].inputs, *self.parts[part].outputs)
        }
        # part → output → input whose memory it takes, which our kernels allow and TensorRT's may not
        patched = manifest["patched"][precision]
        self.in_place = {name: patched[name]["in_place"] if here["plugins"] else {} for name in self.parts}
        self.scratch_bytes = max(1, *(self.tensorrt.scratch_bytes(engine) for engine in self.engines.values()))
        try:
            self.scratch = cuda.mem_alloc(self.scratch_bytes)
        except cuda.MemoryError as problem:
            raise Unusable(
                f"the engines need {self.scratch_bytes / 1e9:.1f} GB of GPU memory for the largest inputs that they "
                f"take: build them for smaller ones, for example `{folder.command(*step, '--largest', 'batch=1')}`"
            ) from problem
        self.calls: OrderedDict[Any, Call] = OrderedDict()
        self.zeroed: Dict[Any, DeviceArray] = {}
        self.produced: Dict[Any, List[DeviceArray]] = {}
        self.gathered: Dict[Any, DeviceArray] = {}
        self.resident: Dict[Any, Tuple[DeviceArray, np.ndarray]] = {}
        self.looks: Dict[Any, List[Tuple[np.ndarray, Any]]] = {}
        self.copiers = ThreadPoolExecutor(READERS)

    def run(self, part: str, inputs: Mapping[str, Any]) -> Dict[str, Any]:
        """Waits for the GPU only where there are outputs to bring to the host."""
        runs = self.divided(part, inputs)
        if len(runs) > 1:
            return self.run_divided(part, inputs, runs)
        call, _ = self.uploaded(part, inputs)
        call.launch(self.stream)
        outputs = [tensor.name for tensor in self.parts[part].outputs]
        fetched = [name for name in outputs if name in call.staged]
        for name in fetched:
            self.cuda.memcpy_dtoh_async(call.staged[name], call.arrays[name].memory, self.stream)
        if fetched:
            self.stream.synchronize()
        return {name: call.staged[name].copy() if name in fetched else call.arrays[name] for name in outputs}

    def divided(self, part: str, inputs: Mapping[str, Any]) -> List[Tuple[int, int]]:
        """The rows (first, behind the last) of each run that `inputs` take: more than one run for a large batch that
        comes from the host and whose results stay on the GPU."""
        spec = self.parts[part]
        given = [inputs[tensor.name] for tensor in spec.inputs]
        batch = given[0].shape[0]
        if (
            any(isinstance(value, DeviceArray) for value in given)
            or not all(tensor.internal for tensor in spec.outputs)
            or not all(tensor.shape[0] == "batch" for tensor in (*spec.inputs, *spec.outputs))
        ):
            return [(0, batch)]
        runs = -(-sum(value.nbytes for value in given) // self.RUN_BYTES)
        runs = max(1, min(runs, batch // self.limits(part)["batch"][0]))
        bounds = [batch * run // runs for run in range(runs + 1)]
        return list(zip(bounds, bounds[1:]))

    def run_divided(
        self, part: str, inputs: Mapping[str, np.ndarray], runs: Sequence[Tuple[int, int]]
    ) -> Dict[str, DeviceArray]:
        """Rows are computed while the next ones are on their way to the GPU."""
        spec = self.parts[part]
        given = {tensor.name: inputs[tensor.name] for tensor in spec.inputs}
        places = {name: self.place(part, name, value.shape) for name, value in given.items()}
        sizes = spec.sizes_of({name: value.shape for name, value in given.items()})
        outputs = {
            tensor.name: self.output((part, tensor.name, tensor.sizes(sizes)), self.dtypes[part, tensor.name], ())
            for tensor in spec.outputs
        }
        self.uploads.synchronize()  # so that the page-locked memory is free
        self.uploads.wait_for_event(self.consumed)  # and the places on the GPU
        for begin, end in runs:
            for name, (array, staged) in places.items():
                self.copy_to_gpu(array.rows(begin, end), staged[begin:end], given[name][begin:end], self.uploads)
            self.arrived.record(self.uploads)
            self.stream.wait_for_event(self.arrived)
            rows = {name: array.rows(begin, end) for name, (array, _) in places.items()}
            self.call(part, rows, into={name: array.rows(begin, end) for name, array in outputs.items()}).launch(
                self.stream
            )
        self.consumed.record(self.stream)
        return outputs

    def synchronize(self) -> None:
        self.stream.synchronize()

    def loop(
        self, part: str, inputs: Mapping[str, Any], carried: Mapping[str, str], times: int, until: Optional[str] = None
    ) -> Dict[str, Any]:
        """All runs are queued without waiting for one.  Whether to go on is read from a copy that was queued a look
        before: the GPU is by then busy with later runs."""
        given = {tensor.name: self.on_gpu(part, tensor.name, inputs[tensor.name]) for tensor in self.parts[part].inputs}
        last: Optional[Tuple[np.ndarray, Any]] = None
        for turn, call in zip(range(1, 1 + times), self.chain(part, given, carried)):
            call.launch(self.stream)
            if until is None or turn % self.LOOK_EVERY:
                continue
            flags, copied = look = self.look(call.arrays[until], turn // self.LOOK_EVERY)
            self.cuda.memcpy_dtoh_async(flags, call.arrays[until].memory, self.stream)
            copied.record(self.stream)
            if last is not None:
                last[1].synchronize()
                if last[0].all():
                    break
            last = look
        self.stream.synchronize()
        internal = {tensor.name for tensor in self.parts[part].outputs if tensor.internal}
        return {name: call.arrays[name] if name in internal else call.arrays[name].to_host() for name in carried}

    def chain(self, part: str, given: Mapping[str, DeviceArray], carried: Mapping[str, str]) -> Iterator[Call]:
        """The calls of a loop without end.  Memory that outputs take changes between two places at most, so calls soon
        repeat: all of them are ready before the first is returned."""
        calls: List[Call] = []
        call = self.call(part, given, kept=True)
        while call not in calls:
            calls.append(call)
            given = {**given, **{source: call.arrays[output] for output, source in carried.items()}}
            call = self.call(part, given, kept=True)
        yield from calls
        yield from itertools.cycle(calls[calls.index(call) :])

    def on_gpu(self, part: str, name: str, value: Any) -> DeviceArray:
        """An input of a loop, which may overwrite it."""
        if isinstance(value, DeviceArray):
            return value
        array, staged = self.place(part, name, value.shape)
        self.copy_to_gpu(array, staged, value, self.stream)  # the last loop has waited for the GPU
        return array

    def place(self, part: str, name: str, shape: Tuple[int, ...]) -> Tuple[DeviceArray, np.ndarray]:
        """An input's own memory on the GPU, and page-locked memory on the way there."""
        key, dtype = (part, name, shape), self.dtypes[part, name]
        if key not in self.resident:
            self.resident[key] = DeviceArray.empty(shape, dtype), self.cuda.pagelocked_empty(shape, dtype)
        return self.resident[key]

    def look(self, flags: DeviceArray, turn: int) -> Tuple[np.ndarray, Any]:
        """Page-locked memory for a copy of the flags, and an event to mark it with: one of two pairs, in turns."""
        if flags.shape not in self.looks:
            self.looks[flags.shape] = [
                (self.cuda.pagelocked_empty(flags.shape, flags.dtype), self.cuda.Event()) for _ in range(2)
            ]
        return self.looks[flags.shape][turn % 2]

    def limits(self, part: str) -> Mapping[str, Tuple[int, int]]:
        smallest, largest = (self.profile_sizes(part, 0, which) for which in (0, 2))
        return {name: (smallest[name], largest[name]) for name in smallest}

    def profile_sizes(self, part: str, profile: int, which: int) -> Dict[str, int]:
        """The smallest (0), the tuned (1) or the largest (2) sizes of the dims in a profile of an engine."""
        spec, engine = self.parts[part], self.engines[part]
        return spec.sizes_of(
            {tensor.name: engine.get_tensor_profile_shape(tensor.name, profile)[which] for tensor in spec.inputs}
        )

    def latencies(self, part: str, inputs: Mapping[str, Any], repeats: int) -> List[float]:
        call, given = self.uploaded(part, inputs)
        # what a run overwrites in place; a cache may stay as it is left
        restored = {tensor.name for tensor in self.parts[part].inputs if not tensor.internal}
        restored &= set(self.in_place[part].values())
        begin, end = self.cuda.Event(), self.cuda.Event()
        measured = []
        for _ in range(self.WARM_UPS + repeats):
            self.upload(call, {name: given[name] for name in restored})
            self.stream.synchronize()
            begin.record(self.stream)
            call.launch(self.stream)
            end.record(self.stream)
            end.synchronize()
            measured.append(end.time_since(begin))
        return measured[self.WARM_UPS :]

    def layer_times(self, part: str, inputs: Mapping[str, Any], repeats: int) -> Dict[str, float]:
        """Layer → median time in ms.  Layers are timed one by one: their sum exceeds the latency of the part."""

        class Profiler(self.tensorrt.module.IProfiler):  # type: ignore[name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.times: Dict[str, List[float]] = {}

            def report_layer_time(self, layer: str, ms: float) -> None:
                self.times.setdefault(layer, []).append(ms)

        given = {tensor.name: inputs[tensor.name] for tensor in self.parts[part].inputs}
        call, profiler = self.prepared(part, given), Profiler()
        self.upload(call, given)
        call.enqueue(self.stream)
        self.stream.synchronize()
        call.context.profiler = profiler
        for _ in range(repeats):
            self.upload(call, given)
            call.enqueue(self.stream)
            self.stream.synchronize()
        return {layer: float(np.median(times)) for layer, times in profiler.times.items()}

    def uploaded(self, part: str, inputs: Mapping[str, Any]) -> Tuple[Call, Mapping[str, Any]]:
        """The call for these inputs, with those that come from the host on their way; and the inputs that it takes."""
        given = {tensor.name: inputs[tensor.name] for tensor in self.parts[part].inputs}
        call = self.call(part, given)
        self.upload(call, given)
        return call, given

    def call(
        self, part: str, given: Mapping[str, Any], kept: bool = False, into: Mapping[str, DeviceArray] = {}
    ) -> Call:
        """The call for these inputs; one whose outputs are all `kept` on the GPU, or only the internal ones, `into` the
        given arrays where there are such."""
        addresses = (value.address if isinstance(value, DeviceArray) else None for value in given.values())
        key = (part, kept, *addresses, *(value.shape for value in given.values()))
        if key not in self.calls:
            self.calls[key] = self.prepared(part, given, kept, into)
            if len(self.calls) > self.KEPT_CALLS:
                self.stream.synchronize()  # it may be running
                self.calls.popitem(last=False)[1].release()
        self.calls.move_to_end(key)
        return self.calls[key]

    def upload(self, call: Call, given: Mapping[str, Any]) -> None:
        call.uploaded.synchronize()
        for name, value in given.items():
            if not isinstance(value, DeviceArray):
                self.copy_to_gpu(call.arrays[name], call.staged[name], value, self.stream)
        call.uploaded.record(self.stream)

    def copy_to_gpu(self, array: DeviceArray, staged: np.ndarray, value: np.ndarray, stream: Any) -> None:
        """Queues the copy of a host array by way of `staged`.  Threads bring it there in pieces, each of which is on
        its way to the GPU while they are at the next ones: a batch of images is 56 MB."""
        staged, value = staged.reshape(-1), value.reshape(-1)
        size = self.PIECE_BYTES // staged.itemsize
        pieces = [slice(start, start + size) for start in range(0, staged.size, size)]

        def copy(piece: slice) -> None:
            staged[piece] = value[piece]

        copied = map(copy, pieces) if len(pieces) == 1 else self.copiers.map(copy, pieces)
        for piece, _ in zip(pieces, copied):
            address = array.address + piece.start * staged.itemsize
            self.cuda.memcpy_htod_async(address, staged[piece], stream)

    def prepared(
        self, part: str, given: Mapping[str, Any], kept: bool = False, into: Mapping[str, DeviceArray] = {}
    ) -> Call:
        """A context for inputs of these shapes, with arrays for all that is not yet on the GPU."""
        spec = self.parts[part]
        context = self.tensorrt.context(self.engines[part], int(self.scratch), self.scratch_bytes)
        sizes = spec.sizes_of({name: value.shape for name, value in given.items()})
        profiles = range(self.engines[part].num_optimization_profiles)
        chosen = nearest([self.profile_sizes(part, profile, 1) for profile in profiles], sizes)
        context.set_optimization_profile_async(chosen, self.stream.handle)
        arrays: Dict[str, DeviceArray] = {}
        staged: Dict[str, np.ndarray] = {}
        for tensor in spec.inputs:
            value, dtype = given[tensor.name], self.dtypes[part, tensor.name]
            if not context.set_input_shape(tensor.name, value.shape):
                raise Unusable(f"input {tensor.name} of shape {value.shape} is outside what the engine was built for")
            if isinstance(value, DeviceArray):
                arrays[tensor.name] = value
            else:
                arrays[tensor.name] = DeviceArray.empty(value.shape, dtype)
                staged[tensor.name] = self.cuda.pagelocked_empty(value.shape, dtype)
        taken = {array.address for array in arrays.values()}
        for tensor in spec.outputs:
            shape, dtype = tuple(context.get_tensor_shape(tensor.name)), self.dtypes[part, tensor.name]
            if tensor.name in into:
                arrays[tensor.name] = into[tensor.name]
            elif tensor.name in self.in_place[part]:
                arrays[tensor.name] = arrays[self.in_place[part][tensor.name]]
            elif tensor.internal or kept:
                arrays[tensor.name] = self.output((part, tensor.name, shape), dtype, taken)
            else:
                arrays[tensor.name] = DeviceArray.empty(shape, dtype)
            if not (tensor.internal or kept):
                staged[tensor.name] = self.cuda.pagelocked_empty(shape, dtype)
        return Call(context, arrays, staged, self.cuda.Event())

    def output(self, key: Tuple[str, str, Tuple[int, ...]], dtype: np.dtype, taken: Collection[int]) -> DeviceArray:
        """The array for an internal output: the same one each time, or its twin where that one is an input."""
        twins = self.produced.setdefault(key, [])
        for array in twins:
            if array.address not in taken:
                return array
        twins.append(DeviceArray.empty(key[-1], dtype))
        return twins[-1]

    def zeros(self, part: str, name: str, dims: Mapping[str, int]) -> DeviceArray:
        tensor = next(tensor for tensor in self.parts[part].inputs if tensor.name == name)
        key = part, name, tensor.sizes(dims)
        if key not in self.zeroed:
            self.zeroed[key] = DeviceArray.empty(tensor.sizes(dims), self.dtypes[part, name])
        value = self.zeroed[key]
        self.cuda.memset_d8_async(value.address, 0, value.row_bytes * value.shape[0], self.stream)
        return value

    def rows(self, value: DeviceArray, indices: np.ndarray) -> DeviceArray:
        key = value.address, value.shape, len(indices)
        if key not in self.gathered:
            self.gathered[key] = DeviceArray.empty((len(indices), *value.shape[1:]), value.dtype)
            if len(indices) == value.shape[0]:  # rows of rows return to the first array: two addresses are enough
                self.gathered[self.gathered[key].address, value.shape, len(indices)] = value
        target, size = self.gathered[key], value.row_bytes
        for row, source in enumerate(indices):
            self.cuda.memcpy_dtod_async(
                target.address + row * size, value.address + int(source) * size, size, self.stream
            )
        return target


def nearest(profiles: Sequence[Mapping[str, int]], sizes: Mapping[str, int]) -> int:
    """The index of the profile whose sizes are closest, by the ratios."""
    distances = [sum(abs(np.log(sizes[name] / tuned)) for name, tuned in profile.items()) for profile in profiles]
    return int(np.argmin(distances))


def refuse_foreign(engine: Path, built: Mapping[str, Any], here: Mapping[str, Any], command: str) -> None:
    """Raises Unusable if an engine was built for something else than `build_engine.identity` finds here."""
    for key, value in here.items():
        if built.get(key) != value:
            what = f"{key} {built.get(key) or 'none'}, here is {value or 'none'}"
            raise Unusable(f"{engine} was built for {what}: run `{command}` again")


def tensorrt_obstacle() -> Optional[str]:
    """Why engines cannot run here, or None if they can."""
    if gpu_name() is None:
        return "no GPU"
    try:
        find_tensorrt()
    except Unusable:
        return "this Python has no TensorRT"
    if importlib.util.find_spec("pycuda") is None:
        return "this Python has no pycuda"
    return None


def open_executor(folder: BuildFolder, precision: str, wanted: str) -> Executor:
    """The executor asked for; `auto` takes TensorRT if it can run here and says on stderr when it does not."""
    if wanted == "onnxruntime":
        return OnnxRuntimeExecutor(folder, precision)
    obstacle = tensorrt_obstacle()
    if obstacle is None:
        return TensorRTExecutor(folder, precision)
    if wanted == "tensorrt":
        raise Unusable(f"TensorRT cannot run here: {obstacle}; use --executor onnxruntime")
    print(f"TensorRT cannot run here ({obstacle}): using ONNX Runtime on the patched graphs", file=sys.stderr)
    return OnnxRuntimeExecutor(folder, precision)


def collect(paths: Sequence[Path], folder: BuildFolder, settings: Mapping[str, Any]) -> List[Path]:
    """The files given and the images of the folders given, sorted within a folder."""
    found: List[Path] = []
    for path in paths:
        if path.is_dir():
            images = sorted(
                file
                for file in path.iterdir()
                if file.suffix.lower() in IMAGE_SUFFIXES and folder.spec.is_input(file, settings)
            )
            if not images:
                raise Unusable(f"{path} holds no images")
            found.extend(images)
        elif path.exists():
            found.append(path)
        else:
            raise Unusable(f"{path}: no such file or folder")
    return found


@dataclass(frozen=True)
class Batch:
    """Images that run at once: their files, what these hold, and that as the model takes it.

    reading_s  seconds that threads have computed for this
    """

    paths: Sequence[Path]
    items: Sequence[Any]
    prepared: Any
    reading_s: float


def read_ahead(spec: ModelSpec, settings: Mapping[str, Any], paths: Sequence[Path]) -> Generator[Batch, None, None]:
    """The images in batches, in order.  A file that cannot be read raises Unusable in its batch's turn.

    Threads read and prepare the next batches while one is in use; none before the first has been asked for again.
    """
    batches = (paths[start : start + spec.batch_size] for start in range(0, len(paths), spec.batch_size))
    pool = ThreadPoolExecutor(READERS)

    def begun(batch: Sequence[Path]) -> Future[Batch]:
        reads = [pool.submit(computed, spec.read, path, settings) for path in batch]
        return pool.submit(assembled, batch, reads)  # tasks begin in order: all that it waits for have begun

    def assembled(batch: Sequence[Path], reads: Sequence[Future[Tuple[Any, float]]]) -> Batch:
        items, seconds = zip(*(read.result() for read in reads))
        prepared, last = computed(spec.prepare, items, settings)
        return Batch(batch, items, prepared, sum(seconds) + last)

    ahead: Deque[Future[Batch]] = deque()
    try:
        yield from (begun(batch).result() for batch in itertools.islice(batches, 1))
        while True:
            ahead.extend(begun(batch) for batch in itertools.islice(batches, READ_AHEAD + 1 - len(ahead)))
            if not ahead:
                return
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def computed(call: Callable[..., Any], *arguments: Any) -> Tuple[Any, float]:
    """The result of a call, and the seconds that this thread has computed for it."""
    started = time.thread_time()
    return call(*arguments), time.thread_time() - started


class Stopwatch:
    """Seconds by what they were spent on, beside writing and what little else there is."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds = {LOADING: 0.0, "waiting for images": 0.0, "execution": 0.0}

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - started

    def summary(self, images: int, reading_s: float) -> str:
        """How quick it was, and what took the time; loading apart, which does not depend on the number of images."""
        total = time.perf_counter() - self.started - self.seconds[LOADING]
        spent = {what: seconds for what, seconds in self.seconds.items() if what != LOADING}
        spent["writing"] = total - sum(spent.values())

        def share(seconds: float) -> str:
            return f"{seconds:.1f} s ({100 * seconds / total:.0f} %)"

        shares = ", ".join(f"{what} {share(seconds)}" for what, seconds in spent.items())
        return (
            f"{images} images in {total:.1f} s, {images / total:.3g} a second: {shares}; meanwhile threads computed"
            f" {share(reading_s)} to read and prepare them; {LOADING} took {self.seconds[LOADING]:.1f} s before"
        )


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="image files or folders of them")
    arguments.add_argument("-o", "--out", type=Path, help="restormer: a folder; trocr: a file of JSON lines")
    arguments.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the engine or graph (fp32)")
    arguments.add_argument("--executor", choices=EXECUTORS, default="auto", help="what runs the model (auto)")
    options = arguments.parse_args()
    folder = BuildFolder(options.build_dir, options.model)
    spec, settings = folder.spec, folder.manifest()["settings"]
    paths = collect(options.inputs, folder, settings)
    executor: Optional[Executor] = None
    watch, reading_s = Stopwatch(), 0.0
    progress = tqdm(total=len(paths), unit="image", disable=len(paths) == 1)
    with spec.writer(options.out) as writer, closing(read_ahead(spec, settings, paths)) as batches, progress:
        while True:
            with watch.on("waiting for images"):
                batch = next(batches, None)
            if batch is None:
                break
            if executor is None:
                with watch.on(LOADING):
                    executor = open_executor(folder, options.precision, options.executor)
            with watch.on("execution"):
                results = spec.run(executor, settings, folder.path, batch.prepared)
            with tqdm.external_write_mode(file=sys.stdout):
                for path, item, result in zip(batch.paths, batch.items, results):
                    writer.write(path, item, result)
            progress.update(len(batch.paths))
            reading_s += batch.reading_s
    if len(paths) > 1:
        print(watch.summary(len(paths), reading_s), file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_script(main)
