"""Step 4: run a model on images.

    python infer_trt.py restormer photo.jpg folder/ -o restored/
    python infer_trt.py trocr line.png lines/ -o lines.jsonl
    python infer_trt.py trocr lines/ --precision fp16 --executor onnxruntime

INPUT is image files or folders of them.  Restormer writes OUT/<stem>.png; TrOCR prints `<path>TAB<text>` and, with -o,
writes one JSON object a line.  Needs no PyTorch: build/<model>/ holds all that execution takes.  `auto` runs TensorRT
engines where they can run, and says so when it falls back to ONNX Runtime on the patched graphs.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
from tqdm import tqdm

import plugins
from build_engine import find_tensorrt, gpu_name, identity
from models.chain import PRECISIONS, BuildFolder, parser, run_script
from models.spec import Executor, Unusable

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm", ".pgm"}
EXECUTORS = ("auto", "tensorrt", "onnxruntime")


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

    def zeros(self, part: str, name: str, dims: Mapping[str, int]) -> np.ndarray:
        tensor = next(tensor for tensor in self.parts[part].inputs if tensor.name == name)
        return np.zeros(tensor.sizes(dims), self.internal_dtype)

    def rows(self, value: np.ndarray, indices: np.ndarray) -> np.ndarray:
        return value[indices]


@dataclass(frozen=True)
class DeviceArray:
    """An internal value: memory on the GPU, which returns to its pool when the last user is gone."""

    memory: Any
    shape: Tuple[int, ...]
    dtype: np.dtype

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    def to_host(self) -> np.ndarray:
        from pycuda import driver

        host = np.empty(self.shape, self.dtype)
        driver.memcpy_dtoh(host, self.memory)
        return host


class TensorRTExecutor:
    """Runs the parts' engines on the GPU.  Internal values stay there."""

    def __init__(self, folder: BuildFolder, precision: str) -> None:
        import pycuda.autoprimaryctx  # noqa: F401  (makes the context)
        import pycuda.driver as cuda
        from pycuda.tools import DeviceMemoryPool

        tensorrt = find_tensorrt()
        trt = tensorrt.module
        step = ("build_engine.py", "--precision", precision)
        self.cuda, self.pool, self.stream = cuda, DeviceMemoryPool(), cuda.Stream()
        self.parts = {part.name: part for part in folder.parts()}
        plugins.load_library()
        engines = folder.manifest().get("engines", {}).get(precision, {})
        here = identity(tensorrt)
        self.runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self.engines, self.contexts = {}, {}
        for name in self.parts:
            path = folder.require(folder.engine(name, precision), *step)
            refuse_foreign(path, engines.get(name, {}), here, folder.command(*step))
            engine = self.runtime.deserialize_cuda_engine(path.read_bytes())
            if engine is None:
                raise Unusable(f"{path} does not fit {tensorrt} on this GPU: run `{folder.command(*step)}`")
            self.engines[name], self.contexts[name] = engine, engine.create_execution_context()
        self.dtype_of = trt.nptype

    def run(self, part: str, inputs: Mapping[str, Any]) -> Dict[str, Any]:
        spec, engine, context = self.parts[part], self.engines[part], self.contexts[part]
        bound = {}  # keeps the memory alive until the stream is done
        for tensor in spec.inputs:
            value = inputs[tensor.name]
            if not isinstance(value, DeviceArray):
                value = self.to_device(value, np.dtype(self.dtype_of(engine.get_tensor_dtype(tensor.name))))
            if not context.set_input_shape(tensor.name, value.shape):
                raise Unusable(f"input {tensor.name} of shape {value.shape} is outside what the engine was built for")
            bound[tensor.name] = value
        for tensor in spec.outputs:
            dtype = np.dtype(self.dtype_of(engine.get_tensor_dtype(tensor.name)))
            bound[tensor.name] = self.empty(tuple(context.get_tensor_shape(tensor.name)), dtype)
        for name, value in bound.items():
            context.set_tensor_address(name, int(value.memory))
        if not context.execute_async_v3(self.stream.handle):
            raise RuntimeError(f"TensorRT failed to run {part}")
        outputs: Dict[str, Any] = {}
        for tensor in spec.outputs:
            value = bound[tensor.name]
            if not tensor.internal:
                host = self.cuda.pagelocked_empty(value.shape, value.dtype)
                self.cuda.memcpy_dtoh_async(host, value.memory, self.stream)
                value = host
            outputs[tensor.name] = value
        self.stream.synchronize()
        return outputs

    def zeros(self, part: str, name: str, dims: Mapping[str, int]) -> DeviceArray:
        tensor = next(tensor for tensor in self.parts[part].inputs if tensor.name == name)
        value = self.empty(tensor.sizes(dims), np.dtype(self.dtype_of(self.engines[part].get_tensor_dtype(name))))
        self.cuda.memset_d8_async(int(value.memory), 0, value.row_bytes * value.shape[0], self.stream)
        return value

    def rows(self, value: DeviceArray, indices: np.ndarray) -> DeviceArray:
        gathered = self.empty((len(indices), *value.shape[1:]), value.dtype)
        size = value.row_bytes
        for target, source in enumerate(indices):
            self.cuda.memcpy_dtod_async(
                int(gathered.memory) + target * size, int(value.memory) + int(source) * size, size, self.stream
            )
        self.stream.synchronize()  # `value` may be freed as soon as this returns
        return gathered

    def empty(self, shape: Tuple[int, ...], dtype: np.dtype) -> DeviceArray:
        return DeviceArray(self.pool.allocate(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize), shape, dtype)

    def to_device(self, array: np.ndarray, dtype: np.dtype) -> DeviceArray:
        value = self.empty(array.shape, dtype)
        self.cuda.memcpy_htod(int(value.memory), np.ascontiguousarray(array, dtype))
        return value


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
    with spec.writer(options.out) as writer, tqdm(total=len(paths), unit="image", disable=len(paths) == 1) as progress:
        for start in range(0, len(paths), spec.batch_size):
            batch = paths[start : start + spec.batch_size]
            items = [spec.read(path, settings) for path in batch]
            executor = executor or open_executor(folder, options.precision, options.executor)
            results = spec.run(executor, settings, folder.path, items)
            with tqdm.external_write_mode(file=sys.stdout):
                for path, item, result in zip(batch, items, results):
                    writer.write(path, item, result)
            progress.update(len(batch))
    return 0


if __name__ == "__main__":
    run_script(main)
