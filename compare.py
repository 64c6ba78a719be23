"""Step 5: compare accuracy and speed of every executor with PyTorch.

    python compare.py restormer
    python compare.py trocr --precision fp16 --executors pytorch patched
    python compare.py trocr --images lines/ --labels labels.tsv           a data set of one's own, see below
    python compare.py trocr --images line.png --executors pytorch         the original model on one image
    python compare.py restormer --baseline build-plain --trt-python python3.9
    python compare.py restormer --write-samples samples/                  store the built-in samples as files, and stop
    python compare.py restormer --find-drift                              search for nodes that FP16 ruins, and stop
    python compare.py restormer --ablation --precision fp16               time each plugin by itself, and stop

Each executor runs in a process of its own, on the same inputs:

    pytorch        the model as its authors run it; in FP32 it is the reference
    torch.compile  the same parts, compiled; where sizes are timed, for each one by itself
    onnxruntime    the exported graphs, on the CPU
    patched        the patched graphs in ONNX Runtime, per precision, on the CPU
    tensorrt       the engines, per precision; with --baseline also those of a build folder made without plugins
                   (`surgeon.py MODEL --without all --build-dir FOLDER`, then build_engine.py)

Where a GPU is, PyTorch runs on it, in each precision, and parts and whole calls are also timed at several sizes.
TensorRT may live in another interpreter: --trt-python, or the environment variable TRT_PYTHON.

A data set is a folder of images and a labels file, whose lines are `image<TAB>truth` or {"image": file, "text": text}
for TrOCR, {"image": file, "clean": file} for Restormer, with file names relative to the folder.  It passes through
memory piece by piece and is timed in one pass; the built-in samples are timed in several.

--find-drift runs the patched graphs tensor by tensor, see models/drift.py, and leaves build/<model>/drift.md, where the
error of each tensor is, and keep-fp32.txt, which `surgeon.py --keep-fp32` takes.  Where TensorRT is, it also builds
engines whose outputs are all tensors, and ends with what engines with these nodes in FP32 make of the bars.

--ablation builds every plugin's subgraph twice as a small engine, as the plugin and as TensorRT's own layers, also for
plugins that are off by default, at every size that the parts are timed at.  It leaves build/<model>/ablation.md and
ablation.json.  Names of plugins and --sizes make it quicker: `--ablation depthwise_conv pixel_shuffle --sizes 1`; what
an earlier run has measured with the same library, TensorRT and GPU stays in the table.

Leaves build/<model>/report.md, report.json and report.png, and the pictures that report.md shows in report/.  Exit
status 1 when a bar is missed or an executor fails.
"""

from __future__ import annotations

import argparse
import os
import pickle
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, FrozenSet, List, Optional, Tuple

import numpy as np
from tqdm import tqdm

import plugins
from build_engine import gpu_name
from infer_trt import OnnxRuntimeExecutor, TensorRTExecutor
from models import ablation, drift, engines
from models.ablation import random_inputs
from models.chain import PRECISIONS, BuildFolder, parser, replacing, run_script
from models.engines import last_words, started
from models.report import LISTED, REFERENCE, latency, number, show, write_report
from models.spec import (
    AnySample,
    Bar,
    Executor,
    LoadedModel,
    ModelSpec,
    Part,
    StoredSample,
    Unusable,
    loop_of_runs,
)

if TYPE_CHECKING:
    import onnx
    import torch

    from surgeon import Grafted

TORCH_KINDS = ("pytorch", "torch.compile")
GPU_KINDS = (*TORCH_KINDS, "tensorrt")
KINDS = (*TORCH_KINDS, "onnxruntime", "patched", "tensorrt")
BASELINE = " without plugins"
STATISTICS: Dict[str, Callable[[np.ndarray], Any]] = {
    "max": np.max,
    "mean": np.mean,
    "median": np.median,
    "p99": lambda errors: np.percentile(errors, 99),
}
REPEATS = 5  # timed runs of a part, and of the built-in samples
WARM_UPS = 3
PART_ERROR = "part max abs"  # the metric of a bar on all parts
MOST_TRIALS = 50  # runs of the whole model to make a set of nodes smaller
PICTURES = "report"  # folder beside report.md
DONE = "samples done:"  # how a worker's lines on progress begin


# ---------------------------------------------------------------------------------------------------------------------
# Workers: one process per executor
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """What all workers are to do: each sample's result is kept, and `passes` over all of them are timed."""

    samples: Sequence[AnySample]
    passes: int


@dataclass
class Measurement:
    """What a worker hands back, beside the end results.

    parts       part → output → array, on the part inputs that the reference recorded; without those that follow from
                choices, of which another one is no error of rounding
    part_ms     part → latencies in ms, transfers included
    total_ms    latencies in ms of all samples together, from loaded image to result; one for each pass
    sized       a part at some size → output → array, on random inputs: what users see, else the part's first output
    timed_ms    what was timed beside the samples (a part at some size, a whole call) → latencies in ms
    layer_ms    (part at some size, plugin, module of the network) → time in ms of the layers of an engine that do this
                plugin's work
    environment the versions that took part
    """

    parts: Dict[str, Dict[str, np.ndarray]]
    part_ms: Dict[str, List[float]]
    total_ms: List[float]
    sized: Dict[str, Dict[str, np.ndarray]]
    timed_ms: Dict[str, List[float]]
    layer_ms: Dict[Tuple[str, str, str], float]
    environment: Dict[str, str]


class TorchExecutor:
    """Runs the parts' PyTorch modules, on a GPU where one is.  Internal values are tensors where the modules are.

    While `recording`, it keeps the inputs of one call of each part: the last whose number is a power of two, which lies
    in the second half.
    """

    def __init__(self, loaded: LoadedModel, precision: str, compiled: bool) -> None:
        import torch

        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # FP32 is the reference
        self.torch = torch
        self.device = "cuda" if gpu_name() else "cpu"
        self.dtype = torch.float16 if precision == "fp16" else torch.float32
        loaded.to(self.device, self.dtype)
        self.parts = {exportable.part.name: exportable.part for exportable in loaded.parts}
        self.eager: Dict[str, Any] = {exportable.part.name: exportable.module for exportable in loaded.parts}
        self.modules = self.eager
        self.compiled = compiled
        if compiled:
            self.compile()
        self.recording = False
        self.recorded: Dict[str, Dict[str, np.ndarray]] = {}
        self.calls: Counter[str] = Counter()

    def compile(self, each_size: bool = False) -> None:
        """Compiles the parts anew: for each size by itself, or, as PyTorch chooses, from a second one on for any."""
        self.torch.compiler.reset()
        self.torch._dynamo.config.recompile_limit = 64
        mode, dynamic = "reduce-overhead" if self.device == "cuda" else "default", False if each_size else None
        self.modules = {
            name: self.torch.compile(module, mode=mode, dynamic=dynamic) for name, module in self.eager.items()
        }

    def tensors(self, part: str, inputs: Mapping[str, Any]) -> List[torch.Tensor]:
        """The inputs of a part on the device; approximate ones in the module's type."""
        specs = self.parts[part].inputs
        tensors = [self.torch.as_tensor(inputs[spec.name]).to(self.device) for spec in specs]
        return [tensor.to(self.dtype) if spec.is_approximate else tensor for spec, tensor in zip(specs, tensors)]

    def run(self, part: str, inputs: Mapping[str, Any]) -> Dict[str, Any]:
        if self.recording:
            self.calls[part] += 1
            if self.calls[part] & (self.calls[part] - 1) == 0:
                self.recorded[part] = {name: as_numpy(value) for name, value in inputs.items()}
        with self.torch.inference_mode():
            outputs = self.modules[part](*self.tensors(part, inputs))
        values = outputs if isinstance(outputs, tuple) else (outputs,)
        return {
            # a compiled module overwrites what it returned before
            tensor.name: (value.clone() if self.compiled else value) if tensor.internal else as_numpy(value)
            for tensor, value in zip(self.parts[part].outputs, values)
        }

    def loop(
        self, part: str, inputs: Mapping[str, Any], carried: Mapping[str, str], times: int, until: Optional[str] = None
    ) -> Dict[str, Any]:
        return loop_of_runs(self, part, inputs, carried, times, until)

    def limits(self, part: str) -> Mapping[str, Tuple[int, int]]:
        return self.parts[part].limits()

    def latencies(self, part: str, inputs: Mapping[str, Any], repeats: int) -> List[float]:
        measured = []
        with self.torch.inference_mode():
            tensors = self.tensors(part, inputs)  # here, where `run` makes them: others would be compiled for again
            for _ in range(WARM_UPS + repeats):
                self.synchronize()
                started = time.perf_counter()
                self.modules[part](*tensors)
                self.synchronize()
                measured.append((time.perf_counter() - started) * 1e3)
        return measured[WARM_UPS:]

    def synchronize(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def zeros(self, part: str, name: str, dims: Mapping[str, int]) -> torch.Tensor:
        tensor = next(tensor for tensor in self.parts[part].inputs if tensor.name == name)
        return self.torch.zeros(tensor.sizes(dims), dtype=self.dtype, device=self.device)

    def rows(self, value: torch.Tensor, indices: np.ndarray) -> torch.Tensor:
        return value[self.torch.from_numpy(indices).to(self.device)]


def work(folder: BuildFolder, label: str, shared: Path) -> None:
    """Runs one executor on the shared inputs and leaves its results and its Measurement in `shared`."""
    kind, precision = kind_and_precision(label)
    spec, manifest = folder.spec, folder.manifest()
    settings = manifest["settings"]
    task: Task = pickle.loads((shared / "task.pickle").read_bytes())
    environment = {"Python": platform.python_version(), "numpy": np.__version__}
    executor: Executor
    whole: Mapping[str, Callable[[], Any]]

    if kind in TORCH_KINDS:
        import torch

        environment["PyTorch"] = torch.__version__
        loaded = spec.load(manifest["weights_argument"], **manifest.get("load_options", {}))
        torch_executor = TorchExecutor(loaded, precision, compiled=kind == "torch.compile")
        executor = torch_executor
        if label == REFERENCE:
            torch_executor.recording = True
            spec.results(executor, settings, folder.path, [sample.item for sample in task.samples[: spec.batch_size]])
            torch_executor.recording = False
            (shared / "part_inputs.pickle").write_bytes(pickle.dumps(torch_executor.recorded, protocol=4))
        if kind == "pytorch":
            run_batch = loaded.original or partial(spec.results, executor, settings, folder.path)
            whole = loaded.workloads()
    elif kind == "tensorrt":
        tensorrt_executor = TensorRTExecutor(folder, precision)
        executor = tensorrt_executor
        environment[tensorrt_executor.tensorrt.name] = tensorrt_executor.tensorrt.version
    else:
        import onnxruntime

        environment["ONNX Runtime"] = onnxruntime.__version__
        executor = OnnxRuntimeExecutor(folder, precision if kind == "patched" else "")
    if kind != "pytorch":
        run_batch = partial(spec.results, executor, settings, folder.path)
        whole = {name: partial(call, executor) for name, call in spec.workloads(settings).items()}

    parts, part_ms = {}, {}
    for name, inputs in pickle.loads((shared / "part_inputs.pickle").read_bytes()).items():
        part = next(part for part in folder.parts() if part.name == name)
        outputs, part_ms[name] = timed(partial(executor.run, name, inputs), executor.synchronize)
        parts[name] = {tensor.name: as_numpy(outputs[tensor.name]) for tensor in part.outputs if tensor.is_approximate}
    total_ms = run_samples(run_batch, task, spec.batch_size, results_path(shared, label))
    sized: Dict[str, Dict[str, np.ndarray]] = {}
    timed_ms: Dict[str, List[float]] = {}
    if gpu_name() is not None and kind in GPU_KINDS:
        if kind == "torch.compile":
            torch_executor.compile(each_size=True)
        for name, call in whole.items():
            with suppress(Unusable):  # larger than the engines were built for
                call()  # twice: the second call finds in other places what the first has made
                timed_ms[name] = timed(call, executor.synchronize)[1]
        for part in folder.parts():
            for name, inputs in random_inputs(part, executor.limits(part.name)):
                outputs = executor.run(part.name, inputs)
                floats = [tensor for tensor in part.outputs if tensor.is_approximate]
                seen = [tensor.name for tensor in floats if not tensor.internal] or [floats[0].name]
                sized[name] = {output: as_numpy(outputs[output]) for output in seen}
                timed_ms[name] = executor.latencies(part.name, inputs, 4 * REPEATS)
    layer_ms: Dict[Tuple[str, str, str], float] = {}
    if isinstance(executor, TensorRTExecutor):
        for part in folder.parts():
            owners = manifest["patched"][precision][part.name]["owners"]
            for name, inputs in random_inputs(part, executor.limits(part.name)):
                times = executor.layer_times(part.name, inputs, 4 * REPEATS)
                layer_ms.update({(name, *key): value for key, value in by_plugin(times, owners).items()})
    measurement = Measurement(parts, part_ms, total_ms, sized, timed_ms, layer_ms, environment)
    (shared / f"{label}.pickle").write_bytes(pickle.dumps(measurement, protocol=4))


def by_plugin(times: Mapping[str, float], owners: Mapping[str, str]) -> Dict[Tuple[str, str], float]:
    """(plugin, module of the network) → time in ms of the layers that do its work.

    times   layer → ms; an engine's layer is called after the nodes that it computes, or that it reformats for
    owners  node → plugin; nodes that come from a module are called `module.of.module/…`
    """
    sums: Dict[Tuple[str, str], float] = {}
    for layer, ms in times.items():
        node = next((word for word in re.split(r"[\s{}\[\]()|+,]+|\.\.\.", layer) if word in owners), None)
        scope = node.rpartition("/")[0] if node else ""
        found = (owners[node] if node else "other layers", scope.partition(".")[0])
        sums[found] = sums.get(found, 0.0) + ms
    return sums


def run_samples(run: Callable[[Sequence[Any]], List[Any]], task: Task, size: int, results: Path) -> List[float]:
    """Runs all samples in batches of `size` and leaves their results in the file `results`.

    Returns the time in ms of each pass; reading and writing files do not count, nor does a first batch to warm up.
    """
    run([sample.item for sample in task.samples[:size]])
    total_ms = []
    for turn in range(task.passes):
        ms = 0.0
        with results.open("ab") as stored:
            for start in range(0, len(task.samples), size):
                items = [sample.item for sample in task.samples[start : start + size]]
                started = time.perf_counter()
                batch = run(items)
                ms += (time.perf_counter() - started) * 1e3
                if turn == 0:
                    pickle.dump(batch, stored, protocol=4)
                print(DONE, len(items), flush=True)
        total_ms.append(ms)
    return total_ms


def results_path(shared: Path, label: str) -> Path:
    return shared / f"{label}.results"


def results_of(shared: Path, label: str) -> Iterator[Any]:
    """The results that a worker has left, one after the other."""
    with results_path(shared, label).open("rb") as stored:
        while stored.peek(1):
            yield from pickle.load(stored)


def timed(call: Callable[[], Any], wait: Callable[[], None]) -> Tuple[Any, List[float]]:
    """The result of a warm-up call, and the latencies in ms of REPEATS further ones, each until `wait` returns."""
    result = call()
    latencies = []
    for _ in range(REPEATS):
        wait()
        started = time.perf_counter()
        call()
        wait()
        latencies.append((time.perf_counter() - started) * 1e3)
    return result, latencies


def as_numpy(value: Any) -> np.ndarray:
    """A value of any executor on the host; floating-point ones in FP32."""
    if hasattr(value, "to_host"):
        value = value.to_host()
    elif not isinstance(value, np.ndarray):
        value = value.cpu().numpy()
    return value.astype(np.float32) if value.dtype.kind == "f" else value


# ---------------------------------------------------------------------------------------------------------------------
# Comparison
# ---------------------------------------------------------------------------------------------------------------------


def error_statistics(reference: np.ndarray, values: np.ndarray) -> Dict[str, float]:
    """Absolute and relative error: max, mean, median, 99th percentile.

    Relative to the reference's magnitude, but to no less than 0.1 % of its largest, so that zeros do not divide.
    """
    absolute = np.abs(values.astype(np.float64) - reference)
    magnitude = np.abs(reference)
    smallest = max(1e-3 * float(magnitude.max()), float(np.finfo(np.float32).tiny))
    relative = absolute / np.maximum(magnitude, smallest)
    return {
        f"{kind} {name}": float(function(errors))
        for kind, errors in (("abs", absolute), ("rel", relative))
        for name, function in STATISTICS.items()
    }


def evaluate(
    folder: BuildFolder,
    label: str,
    measured: Measurement,
    reference: Measurement,
    samples: Sequence[AnySample],
    scores: Sequence[Mapping[str, float]],
    shared: Path,
) -> Dict[str, Any]:
    """One executor's row of the report; `scores` are its results' numbers against the truth, or none."""
    spec = folder.spec
    errors = {
        name: error_statistics(*(concatenated(run.parts[part], outputs) for run in (reference, measured)))
        for name, (part, outputs) in output_groups(folder.parts()).items()
    }
    errors.update(
        (f"{name}: {output}", error_statistics(reference.sized[name][output], values))
        for name, outputs in measured.sized.items()
        for output, values in outputs.items()
    )
    row: Dict[str, Any] = {
        "environment": measured.environment,
        "errors": errors,
        "part_ms": {name: latency(values) for name, values in measured.part_ms.items()},
        "ms_per_item": latency(measured.total_ms, len(samples)),
        "timed_ms": {name: latency(values) for name, values in measured.timed_ms.items()},
        "layer_ms": [[*key, value] for key, value in measured.layer_ms.items()],
        "score": spec.score.total(scores) if scores else {},
        "difference": {},
        "differences": [],
        "bars": [],
    }
    if label == REFERENCE:
        return row
    row["difference"], row["differences"] = compared(spec, samples, shared, label)
    metrics = {PART_ERROR: float(np.max([group["abs max"] for group in errors.values()])), **row["difference"]}
    kind, precision = kind_and_precision(label)
    judged = not (kind in TORCH_KINDS and precision == "fp16") and not label.endswith(BASELINE)  # not our work
    row["bars"] = [judge(bar, metrics[bar.metric]) for bar in spec.bars[precision]] if judged else []
    return row


def scores_of(spec: ModelSpec, samples: Sequence[AnySample], results: Iterable[Any]) -> List[Dict[str, float]]:
    """Each result's numbers against the truth; none where nobody knows the truth."""
    if samples[0].truth is None:
        return []
    pairs = progress(zip(samples, results), len(samples), "scoring")
    return [spec.score.one(result, sample.truth) for sample, result in pairs]


def compared(
    spec: ModelSpec, samples: Sequence[AnySample], shared: Path, label: str
) -> Tuple[Dict[str, float], List[Dict[str, Any]]]:
    """The difference of all results from the reference's, and those that users would notice one by one."""
    numbers, noticed = [], []
    triples = zip(samples, results_of(shared, REFERENCE), results_of(shared, label))
    for sample, expected, result in progress(triples, len(samples), "comparing"):
        numbers.append(spec.difference.one(expected, result))
        metrics = spec.difference.total(numbers[-1:])
        if metrics.pop("differing outputs"):
            texts = {"reference": spec.describe(expected), "result": spec.describe(result)}
            noticed.append({"sample": sample.name, **texts, **metrics})
    return spec.difference.total(numbers), noticed


def progress(values: Iterable[Any], total: int, what: str) -> Iterable[Any]:
    """The values, with a progress bar where a terminal shows it."""
    return tqdm(values, what, total, unit="image", disable=None, leave=False)


def input_score(spec: ModelSpec, samples: Sequence[AnySample]) -> Dict[str, float]:
    """The score of the inputs as they are; none where the model makes something else of them, or without truth."""
    untouched = spec.untouched
    if untouched is None or samples[0].truth is None:
        return {}
    return spec.score.total(scores_of(spec, samples, (untouched(sample.item) for sample in samples)))


def worst_first(spec: ModelSpec, scores: Sequence[Mapping[str, float]]) -> List[int]:
    """The indices of the samples by their scores; NaN is worst."""
    badness = [spec.badness(spec.score.total([one])) for one in scores]
    return sorted(range(len(scores)), key=lambda index: (not np.isnan(badness[index]), -badness[index]))


def side_by_side(
    folder: BuildFolder, samples: Sequence[AnySample], scores: Sequence[Mapping[str, float]]
) -> Dict[int, Dict[str, Any]]:
    """By their indices, the samples that report.md shows: the worst by the reference's `scores`, or else the first."""
    spec = folder.spec
    shutil.rmtree(folder.path / PICTURES, ignore_errors=True)
    chosen = worst_first(spec, scores) if scores else list(range(len(samples)))
    shown = {}
    for index in chosen[:LISTED]:
        sample = samples[index]
        cells = {}
        if spec.untouched:
            cells["input"] = cell(folder, index, "input", spec.untouched(sample.item))
        if scores:
            cells["truth"] = cell(folder, index, "truth", sample.truth)
        score = spec.score.total([scores[index]]) if scores else {}
        shown[index] = {"name": sample.name, "score": score, "cells": cells}
    return shown


def cell(folder: BuildFolder, index: int, column: str, value: Any) -> Any:
    """What report.md shows of a truth or result: {"picture": file beside report.md}, or the line that describes it."""
    spec = folder.spec
    if spec.picture is None:
        return spec.describe(value)
    name = f"{PICTURES}/{index + 1}-{column.replace(' ', '-')}.png"
    spec.picture(value, folder.path / name)
    return {"picture": name}


def output_groups(parts: Sequence[Part]) -> Dict[str, Tuple[str, List[str]]]:
    """Name → part and outputs whose errors are reported together: what users see each for itself, and what only other
    parts see in one."""
    groups = {}
    for part in parts:
        floats = [tensor for tensor in part.outputs if tensor.is_approximate]
        internal = [tensor.name for tensor in floats if tensor.internal]
        for tensor in floats:
            if not tensor.internal or len(internal) == 1:
                groups[f"{part.name}: {tensor.name}"] = (part.name, [tensor.name])
        if len(internal) > 1:
            groups[f"{part.name}: {len(internal)} internal tensors"] = (part.name, internal)
    return groups


def concatenated(outputs: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    return np.concatenate([outputs[name].ravel() for name in names])


def judge(bar: Bar, value: float) -> Dict[str, Any]:
    return {"metric": bar.metric, "limit": bar.limit, "at_least": bar.at_least, "value": value, "met": bar.met(value)}


def run_worker(folder: BuildFolder, label: str, shared: Path, python: str, count: int) -> Optional[str]:
    """Runs `label` in a process of its own, which will report on `count` images; returns why it failed, or None."""
    with (shared / "errors").open("w+", errors="replace") as errors:
        process = started(folder, python, errors, "--worker", label, str(shared))
        with process, tqdm(total=count, desc=label, unit="image", disable=None, leave=False) as shown:
            assert process.stdout is not None
            for line in process.stdout:  # what libraries print passes unseen
                if line.startswith(DONE):
                    shown.update(int(line[len(DONE) :]))
        return None if process.returncode == 0 else last_words(process, errors)


def labels_of(
    kinds: Sequence[str], precisions: Sequence[str], on_gpu: bool, baseline: Optional[BuildFolder]
) -> List[str]:
    """The executors to run, the reference first.  A label is a kind and a precision; PyTorch's FP32 goes without."""
    labels = [REFERENCE]
    for kind in kinds:
        if kind == "onnxruntime":
            labels.append(kind)
        elif kind not in TORCH_KINDS:
            labels.extend(f"{kind} {precision}" for precision in precisions)
        elif on_gpu:
            labels.extend(kind if precision == "fp32" else f"{kind} {precision}" for precision in precisions)
        else:
            labels.append(kind)
    if baseline:
        parts = baseline.parts()
        built = [key for key in precisions if all(baseline.engine(part.name, key).is_file() for part in parts)]
        if not built:
            raise Unusable(f"{baseline.path} has no engines: run `{baseline.command('build_engine.py')}` first")
        labels.extend(f"tensorrt {precision}{BASELINE}" for precision in built)
    return list(dict.fromkeys(labels))


def kind_and_precision(label: str) -> Tuple[str, str]:
    kind, _, precision = label.removesuffix(BASELINE).partition(" ")
    return kind, precision or "fp32"


def compare(
    folder: BuildFolder,
    baseline: Optional[BuildFolder],
    labels: Sequence[str],
    samples: Sequence[AnySample],
    data: str,
    trt: str,
) -> Dict[str, Any]:
    """Runs every executor, those of TensorRT with the interpreter `trt`, and returns the report; `data` says in it
    where the samples come from."""
    spec, manifest = folder.spec, folder.manifest()
    rows: Dict[str, Any] = {}
    task = Task(samples, passes=1 if isinstance(samples[0], StoredSample) else REPEATS)
    with tempfile.TemporaryDirectory(dir=folder.path) as name:  # results of a data set may not fit into /tmp
        shared = Path(name)
        (shared / "task.pickle").write_bytes(pickle.dumps(task, protocol=4))
        reference: Optional[Measurement] = None
        for label in labels:
            compiles = kind_and_precision(label)[0] == "torch.compile"
            hint = " (it compiles, which takes minutes for large models)" if compiles else ""
            print(f"running {label} …{hint}", flush=True)
            source = baseline if baseline and label.endswith(BASELINE) else folder
            python = trt if kind_and_precision(label)[0] == "tensorrt" else sys.executable
            problem = run_worker(source, label, shared, python, len(samples) * task.passes)
            if problem is not None and label == REFERENCE:
                raise Unusable(f"the reference does not run: {problem}")
            if problem is not None:
                rows[label] = {"failed": problem}
                continue
            measured = pickle.loads((shared / f"{label}.pickle").read_bytes())
            scores = scores_of(spec, samples, results_of(shared, label))
            if reference is None:
                reference = measured
                shown = side_by_side(folder, samples, scores)
            rows[label] = evaluate(folder, label, measured, reference, samples, scores, shared)
            for index, result in enumerate(results_of(shared, label)):
                if index in shown:
                    shown[index]["cells"][label] = cell(folder, index, label, result)
            if label != REFERENCE:
                results_path(shared, label).unlink()
    return {
        "model": spec.name,
        "weights": manifest["weights"],
        "samples": len(samples),
        "data": data,
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "patched": manifest.get("patched", {}),
        "engines": manifest.get("engines", {}),
        "input": input_score(spec, samples),
        "executors": rows,
        "side_by_side": list(shown.values()),
        "passed": all("failed" not in row and all(bar["met"] for bar in row["bars"]) for row in rows.values()),
    }


def machine() -> str:
    """The processor, and the GPU that is used where one is there."""
    cpu = platform.processor() or platform.machine()
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    except OSError:
        pass
    return "; ".join([f"{cpu}, {os.cpu_count()} cores", gpu()])


def gpu() -> str:
    """The first GPU that CUDA_VISIBLE_DEVICES leaves, with its driver's version where nvidia-smi tells."""
    name = gpu_name()
    if name is None:
        return "no GPU"
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        versions = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        versions = []
    return ", driver ".join([name, *versions[:1]])  # all GPUs have one driver


# ---------------------------------------------------------------------------------------------------------------------
# What FP16 loses
# ---------------------------------------------------------------------------------------------------------------------


class Fp16Trials:
    """FP16 graphs with some nodes kept in FP32, measured on the CPU against the same graphs in FP32.

    scratch     a folder for graphs to run
    candidates  the nodes that compute in FP16 unless they are kept in FP32
    """

    def __init__(self, folder: BuildFolder, samples: Sequence[AnySample], scratch: Path) -> None:
        import surgeon

        self.folder, self.surgeon = folder, surgeon
        self.bars = folder.spec.bars["fp16"]
        self.items = [sample.item for sample in samples] if any(bar.metric != PART_ERROR for bar in self.bars) else []
        for part in folder.parts():
            folder.require(folder.onnx(part.name, "fp16"), "surgeon.py", "--precision", "fp16")
        manifest = folder.manifest()
        self.grafted = [
            surgeon.grafted(folder, part, manifest["patched"]["fp16"][part.name]["without"]) for part in folder.parts()
        ]
        self.candidates = [name for one in self.grafted for name in drift.half_nodes(self.model(one, "fp16").graph)]
        self.scratch = BuildFolder(scratch, folder.spec.name)
        self.scratch.write_manifest(manifest)
        self.exact = [self.model(one, "fp32") for one in self.grafted]
        self.expected = self.run(self.exact)
        self.known: Dict[FrozenSet[str], List[Dict[str, Any]]] = {}  # nodes in FP32 → bars

    def model(self, grafted: Grafted, precision: str, keep: Collection[str] = ()) -> onnx.ModelProto:
        return self.surgeon.finish(grafted.typed(precision, keep), grafted.counts)

    def run(self, models: Sequence[onnx.ModelProto]) -> Tuple[List[np.ndarray], List[Any]]:
        """The outputs of all parts on their check inputs, and the samples' results; `models` take and give FP32."""
        parts, settings = self.folder.parts(), self.folder.manifest()["settings"]
        for part, model in zip(parts, models):
            self.scratch.onnx(part.name, "fp32").write_bytes(model.SerializeToString())
        executor = OnnxRuntimeExecutor(self.scratch, "fp32")
        outputs = [
            made[tensor.name]
            for part in parts
            for made in (executor.run(part.name, inputs) for inputs in self.folder.check_inputs(part))
            for tensor in part.outputs
            if tensor.is_approximate
        ]
        return outputs, engines.run_items(self.folder.spec, executor, settings, self.folder.path, self.items)

    def judged(self, keep: Collection[str]) -> List[Dict[str, Any]]:
        """The bars of FP16 with these nodes in FP32."""
        key = frozenset(keep)
        if key not in self.known:
            models = [drift.rounded(self.model(one, "fp16", keep)) for one in self.grafted]
            self.known[key] = self.verdict(*self.run(models))
            print(f"  {len(keep)} nodes in FP32: {described(self.known[key])}", flush=True)
        return self.known[key]

    def verdict(self, outputs: Sequence[np.ndarray], results: Sequence[Any]) -> List[Dict[str, Any]]:
        """The bars of what FP16 made of the check inputs and the samples."""
        errors = [np.abs(output - expected).max() for output, expected in zip(outputs, self.expected[0])]
        metrics = {PART_ERROR: float(np.max(errors))}
        if results:
            metrics.update(self.folder.spec.difference(self.expected[1], results))
        return [judge(bar, metrics[bar.metric]) for bar in self.bars]

    def meets(self, keep: Collection[str]) -> bool:
        return all(bar["met"] for bar in self.judged(keep))

    def errors(self, keep: Collection[str]) -> List[drift.TensorError]:
        """The errors of all tensors on the check inputs, with these nodes in FP32."""
        return [
            error
            for one, exact in zip(self.grafted, self.exact)
            for error in drift.tensor_errors(
                one.part.name,
                exact,
                self.model(one, "fp16", keep),
                self.folder.check_inputs(one.part),
                chosen=one.part.chosen,
            )
        ]


class Fp16Engines:
    """The same graphs as engines, built and run by the interpreter `python`.

    built_with  what the latest engines depend on, None where there is none
    """

    def __init__(self, trials: Fp16Trials, scratch: Path, python: str) -> None:
        self.trials, self.python = trials, python
        self.folder = BuildFolder(scratch, trials.folder.spec.name)
        self.folder.path.mkdir(parents=True)
        self.built_with: Optional[Dict[str, Optional[str]]] = None

    def errors(self) -> List[drift.TensorError]:
        """The errors of all tensors of the parts that TensorRT can build and run so."""
        found: List[drift.TensorError] = []
        with engines.Workers(self.folder, self.python, "run") as workers:
            for one, exact in zip(self.trials.grafted, self.trials.exact):
                half, input_sets = self.trials.model(one, "fp16"), self.trials.folder.check_inputs(one.part)
                names = [name for node in drift.nodes_of(exact.graph, one.part.chosen) for name in node.outputs]
                part, marked = drift.marked(one.part, half, names)
                problem = self.run(workers, [drift.sized(part, input_sets, only=True)], [marked])
                if problem is not None:
                    print(f"TensorRT does not run {part.name} with all tensors as outputs: {problem}", flush=True)
                    continue
                with np.load(self.folder.path / engines.OUTPUTS) as outputs:
                    values = partial(values_of, outputs, part.name)
                    found += drift.tensor_errors(part.name, exact, half, input_sets, values, one.part.chosen)
        return found

    def judged(self, keep: Collection[str]) -> List[Dict[str, Any]]:
        """The bars of engines with these nodes in FP32, for all sizes that build_engine.py's take."""
        trials = self.trials
        parts = [drift.sized(one.part, trials.folder.check_inputs(one.part), only=False) for one in trials.grafted]
        if trials.items:
            given = pickle.dumps((str(trials.folder.path.resolve()), trials.items), protocol=4)
            (self.folder.path / engines.ITEMS).write_bytes(given)
        with engines.Workers(self.folder, self.python, "run") as workers:
            problem = self.run(workers, parts, [trials.model(one, "fp16", keep) for one in trials.grafted])
        if problem is not None:
            raise Unusable(problem)
        with np.load(self.folder.path / engines.OUTPUTS) as stored:
            outputs = [
                values.astype(np.float32)
                for part in parts
                for index in range(len(trials.folder.check_inputs(part)))
                for values in values_of(
                    stored, part.name, [tensor.name for tensor in part.outputs if tensor.is_approximate], index
                )
            ]
        results = self.folder.path / engines.RESULTS
        return trials.verdict(outputs, pickle.loads(results.read_bytes()) if trials.items else [])

    def run(self, workers: engines.Workers, parts: Sequence[Part], models: Sequence[onnx.ModelProto]) -> Optional[str]:
        """Has the parts' engines built and run; returns what hinders that, or None."""
        for part, model in zip(parts, models):
            self.folder.onnx(part.name, "fp16").write_bytes(model.SerializeToString())
            self.folder.write_check_inputs(part, self.trials.folder.check_inputs(part))
        manifest = self.trials.folder.manifest()
        self.folder.write_manifest(
            {
                "parts": [part.to_json() for part in parts],
                "settings": manifest["settings"],
                # caches are copied instead of updated in place: inputs stay as they were given
                "patched": {"fp16": {part.name: {"in_place": {}} for part in parts}},
            }
        )
        answer = workers.ask("fp16")
        self.built_with = answer.get("built_with", self.built_with)
        return answer.get("failed")


def values_of(stored: Mapping[str, np.ndarray], part: str, names: Sequence[str], index: int) -> List[np.ndarray]:
    """Tensors of a part's run on the input set of that index."""
    return [stored[f"{part}/{index}/{name}"] for name in names]


def described(bars: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(
        f"{bar['metric']} {number(bar['value'])} ({'met' if bar['met'] else 'missed'}:"
        f" {'≥' if bar['at_least'] else '≤'} {number(bar['limit'])})"
        for bar in bars
    )


def print_jumps(where: str, measured: Sequence[drift.TensorError]) -> None:
    jumps = [one for one in measured if one.jumps]
    print(f"{where}: the error jumps at {len(jumps)} of {len(measured)} tensors{', first at' if jumps else ''}")
    for one in jumps[:LISTED]:
        print(f"  {one.part}: {one.node.op} {one.node.name}: {number(one.before)} → {number(one.error)}", flush=True)


def find_drift(folder: BuildFolder, samples: Sequence[AnySample], trt: str) -> int:
    """Prints where FP16 loses precision and which nodes should stay in FP32; leaves drift.md and keep-fp32.txt."""
    obstacle = tensorrt_absent(trt)
    with tempfile.TemporaryDirectory(dir=folder.path) as name:
        trials = Fp16Trials(folder, samples, Path(name))
        in_tensorrt = Fp16Engines(trials, Path(name) / "engines", trt)
        measured = trials.errors(())
        table, target = folder.path / "drift.md", folder.path / "keep-fp32.txt"
        write_text(table, drift.markdown(measured, folder.spec.title))
        print_jumps(str(table), measured)
        if obstacle is None:
            print("building engines with all tensors as outputs", flush=True)
            try:
                theirs = in_tensorrt.errors()
            except Unusable as problem:
                obstacle = str(problem)
        if obstacle is not None:
            print(f"without TensorRT: {obstacle}")
        elif in_tensorrt.built_with is not None:
            write_text(table, drift.markdown(measured, folder.spec.title, theirs, in_tensorrt.built_with))
            print_jumps(f"{in_tensorrt.built_with['tensorrt']}", theirs)
        print("searching for nodes to keep in FP32")
        found = drift.grow(trials.errors, trials.meets, trials.candidates)
        if found is None:
            print("there is no such set: FP32 misses the bars, too")
            return 1
        keep, complete = drift.shrink(found, trials.meets, MOST_TRIALS)
        bars = {len(nodes): described(trials.judged(nodes)) for nodes in ([], keep)}
        command = folder.command("surgeon.py", "--precision", "fp16", "--keep-fp32", str(target))
        lines = [f"# Nodes that stay in FP32 when `{command}` makes the FP16 graphs."]
        lines += [f"# With {count} nodes in FP32: {metrics}" for count, metrics in bars.items()]
        if not complete:
            lines.append(f"# The search ended after {MOST_TRIALS} trials: fewer nodes may do.")
        write_text(target, "\n".join([*lines, *keep]) + "\n")
        print(f"{target}: {len(keep)} of {len(trials.candidates)} nodes must stay in FP32")
        for node in keep:
            print(f"  {node}", flush=True)
        if obstacle is None:
            print("building the engines of that", flush=True)
            try:
                verdict = described(in_tensorrt.judged(keep))
            except Unusable as problem:
                verdict = f"failed: {problem}"
            print(f"TensorRT with {len(keep)} nodes in FP32: {verdict}")
    return 0


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Single plugins
# ---------------------------------------------------------------------------------------------------------------------


def write_node(kind: ablation.Kind, folder: BuildFolder, precisions: Sequence[str]) -> None:
    """Makes the folder one whose parts are the kind's first node, as `plugin`, and its subgraph as TensorRT's `layers`.

    Integers that a kernel would count up in place stay: run after run does the same.
    """
    import onnx

    import surgeon

    parts: Dict[str, Part] = {}
    patched: Dict[str, Dict[str, Any]] = {precision: {} for precision in precisions}
    for precision in precisions:
        for name in ("layers", "plugin"):
            graph, match = kind.isolated()
            plugin, used = plugins.find(kind.plugin), []
            fp32 = [match.inputs[index].name for index in plugin.fp32_inputs]
            fp32 += [match.outputs[made].name for made, taken in plugin.in_place.items() if taken in plugin.fp32_inputs]
            parts[name] = part = ablation.alone(name, graph, kind.sizes, fp32)
            if name == "plugin":
                surgeon.graft(graph, plugin, match)
                graph.cleanup()
                used = [kind.plugin]
            if precision == "fp16":
                surgeon.to_fp16(graph, part, [node for node in graph.nodes if node.name in kind.in_fp32])
            onnx.save(surgeon.finish(graph, used), folder.onnx(name, precision))
            floats = {tensor.name for tensor in part.inputs if tensor.internal}
            in_place = {made: taken for made, taken in surgeon.in_place(graph).items() if taken in floats}
            patched[precision][name] = {"in_place": in_place}
    folder.write_manifest({"parts": [part.to_json() for part in parts.values()], "settings": {}, "patched": patched})


def node_kinds(folder: BuildFolder, wanted: Collection[str], sizes: Optional[int]) -> List[ablation.Kind]:
    """All kinds of nodes of the plugins `wanted`, at the first `sizes` sizes of each part."""
    import onnx

    import surgeon

    found: List[ablation.Kind] = []
    for part in folder.parts():
        plain = surgeon.grafted(folder, part, plugins.names())
        matches = surgeon.find_matches(plain.graph, part, folder.onnx(part.name))
        chosen = {name: matches[name] for name in matches if name in wanted}
        if chosen:
            model = onnx.load(folder.onnx(part.name))
            for one in part.time_at[:sizes]:
                found += ablation.kinds(part, model, chosen, plain.left, one)
    return found


def ablate(
    folder: BuildFolder, wanted: Collection[str], precisions: Sequence[str], sizes: Optional[int], trt: str
) -> int:
    """Times plugins one by one against TensorRT's own layers; leaves ablation.md and ablation.json."""
    if sizes is not None and sizes < 1:
        raise Unusable("--sizes begins at 1")
    parts = folder.parts()
    patched = [key for key in precisions if all(folder.onnx(part.name, key).is_file() for part in parts)]
    if not patched:
        folder.require(folder.onnx(parts[0].name, precisions[0]), "surgeon.py", "--precision", precisions[0])
    obstacle = tensorrt_absent(trt)
    if obstacle is not None:
        raise Unusable(f"--ablation needs TensorRT on a GPU: {obstacle}")
    if plugins.library_path() is None:
        raise Unusable("--ablation needs the plugin library: build it as plugins/CMakeLists.txt says")
    kinds = node_kinds(folder, wanted, sizes)
    if not kinds:
        raise Unusable(f"{folder.spec.name} has nothing for {', '.join(sorted(wanted))} to replace")
    rows: List[Dict[str, Any]] = []
    earlier = ablation.rows_before(folder)
    report: Dict[str, Any] = {
        "model": folder.spec.name,
        "weights": folder.manifest()["weights"],
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
    with tempfile.TemporaryDirectory(dir=folder.path) as name:
        scratch = BuildFolder(Path(name), folder.spec.name)
        scratch.path.mkdir()
        with engines.Workers(scratch, trt, "time") as workers:
            for kind in tqdm(kinds, "nodes", unit="node", disable=None, leave=False):
                write_node(kind, scratch, patched)
                for precision in patched:
                    rows.append({**kind.described(), "precision": precision, **workers.ask(precision)})
                    tqdm.write(" | ".join([precision, *ablation.cells(rows[-1])]))
                report["rows"] = ablation.joined(rows, earlier)
                path = ablation.write(folder, report)  # each time: what is measured stays when the rest is too much
    print(path)
    return 1 if any("failed" in row or not np.isfinite(row["difference"]) for row in rows) else 0


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="(fp32 fp16)")
    arguments.add_argument("--executors", nargs="+", choices=KINDS, help="default: all that can run here")
    arguments.add_argument("--images", type=Path, metavar="PATH", help="own data, or one image, instead of the samples")
    arguments.add_argument("--labels", type=Path, metavar="FILE", help="the truth for --images, a line for each image")
    arguments.add_argument("--baseline", type=Path, metavar="FOLDER", help="the --build-dir of engines without plugins")
    arguments.add_argument(
        "--trt-python",
        default=os.environ.get("TRT_PYTHON", sys.executable),
        metavar="PYTHON",
        help="the interpreter that has TensorRT and pycuda (TRT_PYTHON, or this one)",
    )
    arguments.add_argument("--write-samples", type=Path, metavar="FOLDER", help="store the built-in samples, and stop")
    arguments.add_argument(
        "--find-drift", action="store_true", help="search for nodes that should not be computed in FP16, and stop"
    )
    arguments.add_argument(
        "--ablation",
        nargs="*",
        metavar="PLUGIN",
        help="time plugins (all) by themselves against TensorRT's own layers, and stop",
    )
    arguments.add_argument("--sizes", type=int, metavar="N", help="--ablation at the first N sizes of each part (all)")
    arguments.add_argument("--worker", nargs=2, metavar=("LABEL", "FOLDER"), help=argparse.SUPPRESS)
    arguments.add_argument("--engine-worker", choices=engines.TASKS, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    folder = BuildFolder(options.build_dir, options.model)
    if options.worker:
        work(folder, options.worker[0], Path(options.worker[1]))
        return 0
    if options.engine_worker:
        engines.serve(folder, options.engine_worker)
        return 0
    spec, settings = folder.spec, folder.manifest()["settings"]
    if options.write_samples:
        spec.write_samples(settings, options.write_samples)
        return 0
    if options.ablation is not None:
        wanted = [plugins.find(name).name for name in options.ablation] or plugins.names()
        return ablate(folder, wanted, options.precision, options.sizes, options.trt_python)
    samples, data = samples_of(spec, settings, options.images, options.labels)
    if options.find_drift:
        return find_drift(folder, samples, options.trt_python)
    baseline = BuildFolder(options.baseline, options.model) if options.baseline else None
    on_gpu = gpu_name() is not None
    kinds = options.executors or runnable(on_gpu, options.trt_python)
    labels = labels_of(kinds, options.precision, on_gpu, baseline)
    for label in labels:
        kind, precision = kind_and_precision(label)
        source = baseline if baseline and label.endswith(BASELINE) else folder
        for part in folder.parts():
            if kind == "patched":
                folder.require(folder.onnx(part.name, precision), "surgeon.py", "--precision", precision)
            elif kind == "tensorrt":
                source.require(source.engine(part.name, precision), "build_engine.py", "--precision", precision)
    report = compare(folder, baseline, labels, samples, data, options.trt_python)
    path = write_report(folder, report, list(output_groups(folder.parts())))
    show(report, folder)
    print(path)
    return 0 if report["passed"] else 1


def samples_of(
    spec: ModelSpec, settings: Mapping[str, Any], images: Optional[Path], labels: Optional[Path]
) -> Tuple[Sequence[AnySample], str]:
    """The samples asked for and where they come from."""
    if images is None and labels is None:
        return spec.samples(settings), "built in"
    if images is not None and not images.exists():
        raise Unusable(f"{images}: no such file or folder")
    if images is not None and images.is_file() and labels is None:
        read = partial(spec.read, images, settings)
        read()  # what is no image is refused before anything runs
        return [StoredSample(images.name, read)], f"{images}"
    if images is None or labels is None or images.is_file():
        raise Unusable("--images FOLDER and --labels FILE belong together; one image goes without --labels")
    return spec.labelled(settings, images, labels), f"{labels}"


def runnable(on_gpu: bool, trt_python: str) -> List[str]:
    """What compares well on this machine: torch.compile and TensorRT only with a GPU."""
    if not on_gpu:
        return ["pytorch", "onnxruntime", "patched"]
    return [kind for kind in KINDS if kind != "tensorrt" or tensorrt_obstacle(trt_python) is None]


def tensorrt_absent(python: str) -> Optional[str]:
    """Why TensorRT is not at hand with that interpreter, or None if it is."""
    return "no GPU" if gpu_name() is None else tensorrt_obstacle(python)


def tensorrt_obstacle(python: str) -> Optional[str]:
    """Why TensorRT cannot run here with that interpreter, or None if it can."""
    check = "import sys, infer_trt; sys.exit(infer_trt.tensorrt_obstacle())"
    try:
        done = subprocess.run([python, "-c", check], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError as problem:
        return f"{python}: {problem.strerror}"
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it crashes"])[-1]


if __name__ == "__main__":
    run_script(main)
