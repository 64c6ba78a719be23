"""Engines that compare.py makes for itself, in the interpreter that has TensorRT.

compare.py leaves graphs in a scratch build folder, and a worker, `compare.py --engine-worker TASK`, builds and runs
them: it says "ready", and answers each line of its stdin, a precision, with a line of JSON.  It keeps to what
build_engine.py and infer_trt.py import.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Callable, Dict, List, Optional, Tuple

import numpy as np

import plugins
from build_engine import COMPUTE_CAPABILITIES, TensorRT, build, find_tensorrt, identity
from infer_trt import Call, DeviceArray, TensorRTExecutor
from models.ablation import random_inputs
from models.chain import BuildFolder
from models.report import latency
from models.spec import Executor, ModelSpec, Part, Unusable

COMPARE = Path(__file__).parents[1] / "compare.py"
READY = "ready"  # what a worker says that waits for graphs
ROW = "measured:"  # how its answers begin
LOGGED = "[TRT] [E] "  # how errors begin in TensorRT's log
OUTPUTS, ITEMS, RESULTS = "outputs.npz", "items.pickle", "results.pickle"  # files in the scratch folder
RUNS = 10  # of an engine in one CUDA graph: its launch takes as long as a small kernel
LAUNCHES = 20  # of the graph that are timed
COMPARED = 1 << 24  # values of a large image that are compared


# ---------------------------------------------------------------------------------------------------------------------
# Workers, as compare.py sees them
# ---------------------------------------------------------------------------------------------------------------------


def started(folder: BuildFolder, python: str, errors: IO[str], *arguments: str) -> subprocess.Popen[str]:
    """compare.py as a worker on a build folder."""
    return subprocess.Popen(
        [python, str(COMPARE), folder.spec.name, "--build-dir", str(folder.path.parent), *arguments],
        # packages of this interpreter are none of another's
        env={**os.environ, "PYTHONPATH": ""} if python != sys.executable else None,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        errors="replace",
    )


def last_words(process: subprocess.Popen[str], errors: IO[str]) -> str:
    """Why a worker failed."""
    errors.seek(0)
    lines = [line for line in errors.read().splitlines() if line.strip()]
    return lines[-1] if lines else f"ended with status {process.returncode}"


class Workers:
    """A worker in a process of its own; one that dies over its graphs makes way for another.

    folder  where both sides expect the graphs
    task    one of TASKS
    """

    def __init__(self, folder: BuildFolder, python: str, task: str) -> None:
        self.folder, self.python, self.task = folder, python, task
        self.process: Optional[subprocess.Popen[str]] = None
        self.errors = (folder.path / "errors").open("w+", errors="replace")

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.end()
        self.errors.close()

    def ask(self, precision: str) -> Dict[str, Any]:
        """What a worker answers, or {"failed": why}."""
        if self.process is None:
            self.errors.seek(0)
            self.errors.truncate()
            self.process = started(self.folder, self.python, self.errors, "--engine-worker", self.task)
            if answer_of(self.process, READY)[0] is None:
                raise Unusable(f"TensorRT cannot begin: {self.end()}")
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has no answer then
            print(precision, file=self.process.stdin, flush=True)
        answer, logged = answer_of(self.process, ROW)
        return {"failed": "; ".join([self.end(), *logged[:1]])} if answer is None else json.loads(answer)

    def end(self) -> str:
        """Waits for the process, and returns its last words."""
        assert self.process is not None
        process, self.process = self.process, None
        process.communicate()
        return last_words(process, self.errors)


def answer_of(process: subprocess.Popen[str], begin: str) -> Tuple[Optional[str], List[str]]:
    """The rest of the next line that begins so, None where there is none, and the errors that TensorRT has logged
    before it; what else libraries print passes unseen."""
    assert process.stdout is not None
    logged: List[str] = []
    for line in process.stdout:
        if line.startswith(begin):
            return line[len(begin) :], logged
        if LOGGED in line:
            logged.append(line.partition(LOGGED)[2].strip())
    return None, logged


# ---------------------------------------------------------------------------------------------------------------------
# Workers, from within
# ---------------------------------------------------------------------------------------------------------------------


def serve(folder: BuildFolder, task: str) -> None:
    """Does the task on the graphs that the folder has whenever a line of stdin names their precision."""
    tensorrt = find_tensorrt()
    if task == "time" and tensorrt.builds_without_gpu:
        raise Unusable(f"{tensorrt} runs no plugins")
    plugins.load_library()
    print(READY, flush=True)
    for line in sys.stdin:
        print(ROW, json.dumps(TASKS[task](folder, line.strip(), tensorrt)), flush=True)


def build_all(
    folder: BuildFolder, precision: str, tensorrt: TensorRT, engine: Callable[[Part, Path], bytes]
) -> Dict[str, Any]:
    """Builds every part's engine from its graph, and returns what they depend on."""
    manifest, built_with = folder.manifest(), identity(tensorrt)
    for part in folder.parts():
        folder.engine(part.name, precision).write_bytes(engine(part, folder.onnx(part.name, precision)))
    manifest["engines"] = {precision: {part.name: built_with for part in folder.parts()}}
    folder.write_manifest(manifest)
    return built_with


def run_items(
    spec: ModelSpec, executor: Executor, settings: Mapping[str, Any], assets: Path, items: Sequence[Any]
) -> List[Any]:
    """What the model makes of items, in batches."""
    batches = [items[start : start + spec.batch_size] for start in range(0, len(items), spec.batch_size)]
    return [result for batch in batches for result in spec.results(executor, settings, assets, batch)]


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------


def run_all(folder: BuildFolder, precision: str, tensorrt: TensorRT) -> Dict[str, Any]:
    """Leaves in OUTPUTS all parts' outputs on their check inputs, as `part/index of the set/output`, and in RESULTS
    what the model makes of the items that compare.py may have left in ITEMS, with the folder of its assets."""

    def engine(part: Part, source: Path) -> bytes:
        return build(tensorrt, part, source, precision, COMPUTE_CAPABILITIES, folder.path / "timings")

    built_with = build_all(folder, precision, tensorrt, engine)
    executor = TensorRTExecutor(folder, precision)
    outputs: Dict[str, Any] = {}
    for part in folder.parts():
        for index, inputs in enumerate(folder.check_inputs(part)):
            for name, value in executor.run(part.name, inputs).items():
                on_host = value.to_host() if isinstance(value, DeviceArray) else value
                outputs[f"{part.name}/{index}/{name}"] = on_host
    np.savez(folder.path / OUTPUTS, **outputs)
    if (folder.path / ITEMS).is_file():
        assets, items = pickle.loads((folder.path / ITEMS).read_bytes())
        results = run_items(folder.spec, executor, folder.manifest()["settings"], Path(assets), items)
        (folder.path / RESULTS).write_bytes(pickle.dumps(results, protocol=4))
    for call in executor.calls.values():
        call.release()
    return {"built_with": built_with}


# ---------------------------------------------------------------------------------------------------------------------
# Single nodes
# ---------------------------------------------------------------------------------------------------------------------


class Series(Call):
    """A call that runs RUNS times in a row."""

    def enqueue(self, stream: Any) -> None:
        for _ in range(RUNS):
            super().enqueue(stream)


class SingleNodes(TensorRTExecutor):
    """Runs engines of static shapes, whose images may be channel-last (HWC8) in memory: all inputs and outputs stay on
    the GPU."""

    def prepared(
        self, part: str, given: Mapping[str, Any], kept: bool = False, into: Mapping[str, DeviceArray] = {}
    ) -> Call:
        call = super().prepared(part, given, True, into)
        return Series(call.context, call.arrays, call.staged, call.uploaded)

    def profile_sizes(self, part: str, profile: int, which: int) -> Dict[str, int]:
        return {}

    def output(self, key: Tuple[str, str, Tuple[int, ...]], dtype: np.dtype, taken: Collection[int]) -> DeviceArray:
        part, name, shape = key
        return replace(DeviceArray.empty(self.stored_shape(part, name, shape), dtype), shape=shape)

    def channel_last(self, part: str, name: str) -> bool:
        return self.engines[part].get_tensor_format(name) == self.tensorrt.module.TensorFormat.HWC8

    def stored_shape(self, part: str, name: str, shape: Tuple[int, ...]) -> Tuple[int, ...]:
        """HWC8 pads pixels to a multiple of 8 channels."""
        if not self.channel_last(part, name):
            return shape
        batch, channels, height, width = shape
        return batch, height, width, -(-channels // 8) * 8

    def upload_array(self, part: str, name: str, values: np.ndarray) -> DeviceArray:
        dtype = self.dtypes[part, name]
        stored = np.zeros(self.stored_shape(part, name, values.shape), dtype)
        if self.channel_last(part, name):
            stored[..., : values.shape[1]] = values.transpose(0, 2, 3, 1)
        else:
            stored[...] = values
        array = DeviceArray.empty(stored.shape, dtype)
        self.cuda.memcpy_htod(array.address, stored)
        return replace(array, shape=values.shape)

    def download(self, part: str, name: str, array: DeviceArray) -> np.ndarray:
        """An output in FP32; of a large image only every n-th row."""
        stored = replace(array, shape=self.stored_shape(part, name, array.shape)).to_host()
        rows = slice(None, None, 1 + stored.size // COMPARED)
        if self.channel_last(part, name):
            stored = stored[:, rows, :, : array.shape[1]].transpose(0, 3, 1, 2)
        elif stored.ndim == 4:
            stored = stored[:, :, rows]
        return stored.astype(np.float32)


def measure_node(folder: BuildFolder, precision: str, tensorrt: TensorRT) -> Dict[str, Any]:
    """The latencies in µs of the parts `layers` and `plugin`, and the largest difference of their outputs as a share of
    the largest value."""

    def engine(part: Part, source: Path) -> bytes:
        return build(tensorrt, part, source, precision, COMPUTE_CAPABILITIES, folder.path / "timings", isolated=True)

    row: Dict[str, Any] = {"built_with": build_all(folder, precision, tensorrt, engine)}
    executor = SingleNodes(folder, precision)
    results: Dict[str, List[np.ndarray]] = {}
    for part in folder.parts():
        ((_, values),) = random_inputs(part, {})
        inputs = {name: executor.upload_array(part.name, name, array) for name, array in values.items()}
        outputs = executor.run(part.name, inputs)
        results[part.name] = [executor.download(part.name, name, array) for name, array in outputs.items()]
        milliseconds = executor.latencies(part.name, inputs, LAUNCHES)
        row[f"{part.name}_us"] = latency([1e3 * ms for ms in milliseconds], RUNS)
    for call in executor.calls.values():
        call.release()
    errors = [np.abs(plugin - layers).max() for layers, plugin in zip(results["layers"], results["plugin"])]
    largest = np.max([np.abs(layers).max() for layers in results["layers"]])
    return {**row, "difference": float(np.max(errors) / max(largest, np.finfo(np.float32).tiny))}  # keeps NaN


TASKS: Dict[str, Callable[[BuildFolder, str, TensorRT], Dict[str, Any]]] = {"time": measure_node, "run": run_all}
