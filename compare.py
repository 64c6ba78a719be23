"""Step 5: compare accuracy and speed of every executor with PyTorch.

    python compare.py restormer
    python compare.py trocr --precision fp16 --executors pytorch patched
    python compare.py trocr --images lines/ --labels labels.tsv
    python compare.py restormer --baseline build-plain --trt-python python3.9
    python compare.py restormer --write-samples samples/     store the built-in samples as files, and stop

Each executor runs in a process of its own, on the same inputs:

    pytorch        the model as its authors run it; in FP32 it is the reference
    torch.compile  the same parts, compiled
    onnxruntime    the exported graphs, on the CPU
    patched        the patched graphs in ONNX Runtime, per precision, on the CPU
    tensorrt       the engines, per precision; with --baseline also those of a build folder made without plugins
                   (`surgeon.py MODEL --without all --build-dir FOLDER`, then build_engine.py)

Where a GPU is, PyTorch runs on it, in each precision, and parts and whole calls are also timed at several sizes.
TensorRT may live in another interpreter: --trt-python, or the environment variable TRT_PYTHON.

Leaves build/<model>/report.md, report.json and report.png.  Exit status 1 when a bar is missed or an executor fails.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple

import numpy as np

from build_engine import gpu_name
from infer_trt import OnnxRuntimeExecutor, TensorRTExecutor
from models.chain import PRECISIONS, BuildFolder, parser, replacing, run_script
from models.spec import Bar, Executor, LoadedModel, Part, Sample, Unusable

if TYPE_CHECKING:
    import torch

REFERENCE = "pytorch"
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
REPEATS = 5  # timed runs of a part and of the whole
WARM_UPS = 3


# ---------------------------------------------------------------------------------------------------------------------
# Workers: one process per executor
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Measurement:
    """What a worker hands back.

    parts       part → output → array, on the part inputs that the reference recorded
    part_ms     part → latencies in ms, transfers included
    results     the end results, one per sample
    total_ms    latencies in ms of the whole batch of samples, from loaded image to result
    sized       a part at some size → output → array, on random inputs: what users see, else the part's first output
    timed_ms    what was timed beside the samples (a part at some size, a whole call) → latencies in ms
    layer_ms    (part, plugin, module of the network) → time in ms of the layers of an engine that do this plugin's work
    environment the versions that took part
    """

    parts: Dict[str, Dict[str, np.ndarray]]
    part_ms: Dict[str, List[float]]
    results: List[Any]
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
        self.modules: Dict[str, Any] = {exportable.part.name: exportable.module for exportable in loaded.parts}
        if compiled:
            mode = "reduce-overhead" if self.device == "cuda" else "default"
            self.modules = {name: torch.compile(module, mode=mode) for name, module in self.modules.items()}
        self.compiled = compiled
        self.recording = False
        self.recorded: Dict[str, Dict[str, np.ndarray]] = {}
        self.calls: Counter[str] = Counter()

    def tensors(self, part: str, inputs: Mapping[str, Any]) -> List[torch.Tensor]:
        """The inputs of a part on the device; floating-point ones in the module's type."""
        tensors = [self.torch.as_tensor(inputs[tensor.name]).to(self.device) for tensor in self.parts[part].inputs]
        return [tensor.to(self.dtype) if tensor.is_floating_point() else tensor for tensor in tensors]

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

    def limits(self, part: str) -> Mapping[str, Tuple[int, int]]:
        return self.parts[part].limits()

    def latencies(self, part: str, inputs: Mapping[str, Any], repeats: int) -> List[float]:
        tensors, measured = self.tensors(part, inputs), []
        with self.torch.inference_mode():
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
    """Runs one executor on the shared inputs and leaves its Measurement in `shared`."""
    kind, precision = kind_and_precision(label)
    spec, manifest = folder.spec, folder.manifest()
    settings = manifest["settings"]
    items = pickle.loads((shared / "items.pickle").read_bytes())
    environment = {"Python": platform.python_version(), "numpy": np.__version__}
    executor: Executor
    whole: Mapping[str, Callable[[], Any]]

    if kind in TORCH_KINDS:
        import torch

        environment["PyTorch"] = torch.__version__
        loaded = spec.load(manifest["weights_argument"])
        torch_executor = TorchExecutor(loaded, precision, compiled=kind == "torch.compile")
        executor = torch_executor
        if label == REFERENCE:
            torch_executor.recording = True
            spec.run(executor, settings, folder.path, items[: spec.batch_size])
            torch_executor.recording = False
            (shared / "part_inputs.pickle").write_bytes(pickle.dumps(torch_executor.recorded, protocol=4))
        if kind == "pytorch":
            run_batch = loaded.original or partial(spec.run, executor, settings, folder.path)
            whole = loaded.workloads()
    elif kind == "tensorrt":
        executor = TensorRTExecutor(folder, precision)
        environment["TensorRT"] = manifest["engines"][precision][folder.parts()[0].name]["tensorrt"]
    else:
        import onnxruntime

        environment["ONNX Runtime"] = onnxruntime.__version__
        executor = OnnxRuntimeExecutor(folder, precision if kind == "patched" else "")
    if kind != "pytorch":
        run_batch = partial(spec.run, executor, settings, folder.path)
        whole = {name: partial(call, executor) for name, call in spec.workloads(settings).items()}

    parts, part_ms = {}, {}
    for name, inputs in pickle.loads((shared / "part_inputs.pickle").read_bytes()).items():
        part = next(part for part in folder.parts() if part.name == name)
        outputs, part_ms[name] = timed(partial(executor.run, name, inputs))
        parts[name] = {tensor.name: as_numpy(outputs[tensor.name]) for tensor in part.outputs}
    results, total_ms = timed(partial(in_batches, run_batch, items, spec.batch_size))
    sized: Dict[str, Dict[str, np.ndarray]] = {}
    timed_ms: Dict[str, List[float]] = {}
    if gpu_name() is not None and kind in GPU_KINDS:
        for name, call in whole.items():
            call()  # twice: the second call finds in other places what the first has made
            timed_ms[name] = timed(call)[1]
        for part in folder.parts():
            for name, inputs in random_inputs(part, executor.limits(part.name)):
                outputs = executor.run(part.name, inputs)
                seen = [tensor.name for tensor in part.outputs if not tensor.internal] or [part.outputs[0].name]
                sized[name] = {output: as_numpy(outputs[output]) for output in seen}
                timed_ms[name] = executor.latencies(part.name, inputs, 4 * REPEATS)
    layer_ms: Dict[Tuple[str, str, str], float] = {}
    if isinstance(executor, TensorRTExecutor):
        for part in folder.parts():
            owners = manifest["patched"][precision][part.name]["owners"]
            _, inputs = next(random_inputs(part, executor.limits(part.name)))
            times = executor.layer_times(part.name, inputs, 4 * REPEATS)
            layer_ms.update({(part.name, *key): value for key, value in by_plugin(times, owners).items()})
    measurement = Measurement(parts, part_ms, results, total_ms, sized, timed_ms, layer_ms, environment)
    (shared / f"{label}.pickle").write_bytes(pickle.dumps(measurement, protocol=4))


def by_plugin(times: Mapping[str, float], owners: Mapping[str, str]) -> Dict[Tuple[str, str], float]:
    """(plugin, module of the network) → time in ms of the layers that do its work.

    times   layer → ms; an engine's layer is called after the nodes that it computes, or that it reformats for
    owners  node → plugin; nodes are called after the modules that they come from
    """
    sums: Dict[Tuple[str, str], float] = {}
    for layer, ms in times.items():
        node = next((word for word in re.split(r"[\s{}\[\]()|+,]+|\.\.\.", layer) if word in owners), None)
        found = (owners[node], node.partition(".")[0].partition("/")[0]) if node else ("other layers", "")
        sums[found] = sums.get(found, 0.0) + ms
    return sums


def random_inputs(part: Part, limits: Mapping[str, Tuple[int, int]]) -> Iterator[Tuple[str, Dict[str, np.ndarray]]]:
    """Name and inputs of a part at each of the sizes that it is timed at, as far as they lie within `limits`."""
    random = np.random.default_rng(0)
    for sizes in part.time_at:
        if any(not low <= sizes[name] <= high for name, (low, high) in limits.items()):
            continue
        listed = ", ".join(f"{name} {value}" for name, value in sizes.items() if name != "input_ids")
        values = random.random(1_000_003, dtype=np.float32)  # repeated: gigabytes of random numbers take their time
        yield (
            f"{part.name}, {listed}",
            {
                tensor.name: np.full(tensor.sizes(sizes), sizes[tensor.name], tensor.dtype)
                if tensor.name in sizes
                else np.resize(values, tensor.sizes(sizes))
                for tensor in part.inputs
            },
        )


def in_batches(run: Callable[[Sequence[Any]], List[Any]], items: Sequence[Any], size: int) -> List[Any]:
    return [result for start in range(0, len(items), size) for result in run(items[start : start + size])]


def timed(call: Callable[[], Any]) -> Tuple[Any, List[float]]:
    """The result of a warm-up call, and the latencies in ms of REPEATS further ones."""
    result = call()
    latencies = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
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


def latency(values: Sequence[float], items: int = 1) -> Dict[str, float]:
    """Median, 20th and 80th percentile in ms, per item."""
    low, middle, high = np.percentile(values, [20, 50, 80]) / items
    return {"median": float(middle), "p20": float(low), "p80": float(high)}


def evaluate(
    folder: BuildFolder, label: str, measured: Measurement, reference: Measurement, samples: Sequence[Sample]
) -> Dict[str, Any]:
    """One executor's row of the report."""
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
        "score": spec.score(measured.results, [sample.truth for sample in samples]),
        "bars": [],
    }
    if label == REFERENCE:
        return row
    row["difference"] = spec.difference(reference.results, measured.results)
    metrics = {"part max abs": float(np.max([group["abs max"] for group in errors.values()])), **row["difference"]}
    kind, precision = kind_and_precision(label)
    judged = not (kind in TORCH_KINDS and precision == "fp16") and not label.endswith(BASELINE)  # not our work
    row["bars"] = [judge(bar, metrics[bar.metric]) for bar in spec.bars[precision]] if judged else []
    return row


def output_groups(parts: Sequence[Part]) -> Dict[str, Tuple[str, List[str]]]:
    """Name → part and outputs whose errors are reported together: what users see each for itself, and what only other
    parts see in one."""
    groups = {}
    for part in parts:
        internal = [tensor.name for tensor in part.outputs if tensor.internal]
        for tensor in part.outputs:
            if not tensor.internal or len(internal) == 1:
                groups[f"{part.name}: {tensor.name}"] = (part.name, [tensor.name])
        if len(internal) > 1:
            groups[f"{part.name}: {len(internal)} internal tensors"] = (part.name, internal)
    return groups


def concatenated(outputs: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    return np.concatenate([outputs[name].ravel() for name in names])


def judge(bar: Bar, value: float) -> Dict[str, Any]:
    return {"metric": bar.metric, "limit": bar.limit, "at_least": bar.at_least, "value": value, "met": bar.met(value)}


def run_worker(folder: BuildFolder, label: str, shared: Path, python: str) -> Optional[str]:
    """Runs `label` in a process of its own; returns why it failed, or None."""
    command = [python, __file__, folder.spec.name, "--build-dir", str(folder.path.parent)]
    # packages of this interpreter are none of another's
    environment = {**os.environ, "PYTHONPATH": ""} if python != sys.executable else None
    done = subprocess.run(
        [*command, "--worker", label, str(shared)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"ended with status {done.returncode}"


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
    folder: BuildFolder, baseline: Optional[BuildFolder], labels: Sequence[str], samples: Sequence[Sample], trt: str
) -> Dict[str, Any]:
    """Runs every executor, those of TensorRT with the interpreter `trt`, and returns the report."""
    manifest = folder.manifest()
    rows: Dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        shared = Path(name)
        (shared / "items.pickle").write_bytes(pickle.dumps([sample.item for sample in samples], protocol=4))
        reference: Optional[Measurement] = None
        for label in labels:
            print(f"running {label} …", flush=True)
            source = baseline if baseline and label.endswith(BASELINE) else folder
            python = trt if kind_and_precision(label)[0] == "tensorrt" else sys.executable
            problem = run_worker(source, label, shared, python)
            if problem is not None and label == REFERENCE:
                raise Unusable(f"the reference does not run: {problem}")
            if problem is not None:
                rows[label] = {"failed": problem}
                continue
            measured = pickle.loads((shared / f"{label}.pickle").read_bytes())
            reference = reference or measured
            rows[label] = evaluate(folder, label, measured, reference, samples)
    return {
        "model": folder.spec.name,
        "weights": manifest["weights"],
        "samples": len(samples),
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "patched": manifest.get("patched", {}),
        "engines": manifest.get("engines", {}),
        "executors": rows,
        "passed": all("failed" not in row and all(bar["met"] for bar in row["bars"]) for row in rows.values()),
    }


def machine() -> str:
    """The processor, and the GPU where one is there."""
    cpu = platform.processor() or platform.machine()
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    except OSError:
        pass
    parts = [f"{cpu}, {os.cpu_count()} cores"]
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        parts.append(subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip())
    except (OSError, subprocess.CalledProcessError):
        parts.append("no GPU")
    return "; ".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------------------


def markdown(report: Mapping[str, Any], title: str) -> str:
    """The report as Markdown."""
    rows = {label: row for label, row in report["executors"].items() if "failed" not in row}
    failed = {label: row["failed"] for label, row in report["executors"].items() if "failed" in row}
    lines = [f"# {title}: comparison with PyTorch", ""]
    lines += [f"- Weights: {report['weights']}", f"- Samples: {report['samples']}", f"- Machine: {report['machine']}"]
    versions = sorted({f"{name} {version}" for row in rows.values() for name, version in row["environment"].items()})
    lines += [f"- Versions: {', '.join(versions)}", f"- Date: {report['date']}", ""]
    header, *summary_rows = summary(report)
    lines += table(header, summary_rows)

    lines += ["## Bars", ""]
    bars = [
        [
            label,
            bar["metric"],
            number(bar["value"]),
            f"{'≥' if bar['at_least'] else '≤'} {number(bar['limit'])}",
            "met" if bar["met"] else "**missed**",
        ]
        for label, row in rows.items()
        for bar in row["bars"]
    ]
    lines += table(["executor", "metric", "value", "bar", ""], bars)
    lines += [f"- {label} failed: {problem}" for label, problem in failed.items()] + ([""] if failed else [])

    lines += ["## Result", "", "Scores against the truth, differences against PyTorch, over all samples.", ""]
    metrics = list(dict.fromkeys(key for row in rows.values() for key in (*row["score"], *row.get("difference", {}))))
    lines += table(
        ["executor", *metrics],
        [
            [label, *(number({**row["score"], **row.get("difference", {})}.get(metric)) for metric in metrics)]
            for label, row in rows.items()
        ],
    )
    lines += ["## Error of each part", ""]
    lines += ["Each part gets the inputs that it had in a call late in the PyTorch run; where a size is named, random"]
    lines += ["ones.  Relative errors are to the reference's magnitude, but to no less than 0.1 % of its largest.", ""]
    statistics = [f"{kind} {name}" for kind in ("abs", "rel") for name in STATISTICS]
    lines += table(
        ["output", "executor", *statistics],
        [
            [group, label, *(number(row["errors"][group][name]) for name in statistics)]
            for group in rows[REFERENCE]["errors"]
            for label, row in rows.items()
            if label != REFERENCE and group in row["errors"]
        ],
    )
    lines += ["## Latency", "", "Median (20th to 80th percentile) in ms, transfers included.  Whole: per sample.", ""]
    names = list(next(iter(rows.values()))["part_ms"])
    lines += table(
        ["executor", "whole", *names],
        [
            [label, spread(row["ms_per_item"]), *(spread(row["part_ms"][name]) for name in names)]
            for label, row in rows.items()
        ],
    )
    timed_rows = {label: row["timed_ms"] for label, row in rows.items() if row["timed_ms"]}
    if timed_rows:
        lines += ["## Latency by size", ""]
        lines += [
            "Median (20th to 80th percentile) in ms on the GPU.  Whole calls include transfers, parts do not.",
            "",
        ]
        lines += table(
            ["", *timed_rows],
            [
                [name, *(spread(row[name]) if name in row else "" for row in timed_rows.values())]
                for name in dict.fromkeys(name for row in timed_rows.values() for name in row)
            ],
        )
    lines += layer_table(rows)
    lines += ["![Latency and error](report.png)", ""]
    return "\n".join(lines)


def layer_table(rows: Mapping[str, Mapping[str, Any]]) -> List[str]:
    """What each plugin costs beside the layers that it replaces."""
    by_label = {
        label: {tuple(key): ms for *key, ms in row["layer_ms"]} for label, row in rows.items() if row["layer_ms"]
    }
    if not by_label:
        return []
    keys = sorted({key for times in by_label.values() for key in times})
    lines = ["## Layer times", ""]
    lines += ["Medians in ms of the layers that do a plugin's work, reformats for them included, at the size that is"]
    lines += ["timed first.  Layers are timed one by one, so that their sum exceeds the latency.", ""]
    return lines + table(
        ["part", "plugin", "module", *by_label],
        [[*key, *(number(times.get(key)) for times in by_label.values())] for key in keys],
    )


def summary(report: Mapping[str, Any]) -> List[List[str]]:
    """A header and a row for each executor: speed, scores, largest error, verdict."""
    rows = report["executors"]
    scores = list(rows[REFERENCE]["score"])
    lines = [["executor", "ms per sample", *scores, "largest error", "bars"]]
    for label, row in rows.items():
        if "failed" in row:
            lines.append([label, "", *("" for _ in scores), "", "failed"])
            continue
        values = [number(row["ms_per_item"]["median"]), *(number(row["score"][name]) for name in scores)]
        if label == REFERENCE:
            lines.append([label, *values, "", "reference"])
        else:
            error = number(max(group["abs max"] for group in row["errors"].values()))
            lines.append([label, *values, error, "met" if all(bar["met"] for bar in row["bars"]) else "missed"])
    return lines


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> List[str]:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return [*lines, ""]


def number(value: Optional[float]) -> str:
    return "" if value is None else f"{value:.4g}"


def spread(values: Mapping[str, float]) -> str:
    return f"{values['median']:.4g} ({values['p20']:.4g}–{values['p80']:.4g})"


def plot(report: Mapping[str, Any], parts: Sequence[Part], path: Path) -> None:
    """Latency per sample and the largest errors, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {label: row for label, row in report["executors"].items() if "failed" not in row}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 0.6 * len(rows) + 2), layout="constrained")
    left.barh(list(rows), [row["ms_per_item"]["median"] for row in rows.values()], color="#4c72b0")
    left.bar_label(left.containers[0], fmt="%.4g", padding=3)
    left.set(title="Latency per sample", xlabel="ms")
    left.margins(x=0.25)
    left.invert_yaxis()
    compared = [label for label in rows if label != REFERENCE]
    groups = list(output_groups(parts))
    height = 0.8 / len(groups)
    for index, group in enumerate(groups):
        positions = np.arange(len(compared)) + (index - (len(groups) - 1) / 2) * height
        # an error of zero has no place on a logarithmic axis
        errors = [max(rows[label]["errors"][group]["abs max"], 1e-9) for label in compared]
        right.barh(positions, errors, height, label=group)
    right.set(title="Largest absolute error against PyTorch", xscale="log", yticks=range(len(compared)))
    right.set_yticklabels(compared)
    right.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=len(groups))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def show(report: Mapping[str, Any], title: str) -> None:
    """Prints the summary as a table."""
    from rich.console import Console
    from rich.table import Table

    header, *rows = summary(report)
    shown = Table(title=f"{title}: {report['weights']}")
    for name in header:
        shown.add_column(name, justify="left" if name == "executor" else "right")
    colours = {"met": "green", "missed": "red", "failed": "red", "reference": "default"}
    for *cells, verdict in rows:
        shown.add_row(*cells, f"[{colours[verdict]}]{verdict}[/]")
    Console().print(shown)


def write_report(folder: BuildFolder, report: Mapping[str, Any]) -> Path:
    with replacing(folder.path / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    with replacing(folder.path / "report.png") as temporary:
        plot(report, folder.parts(), temporary)
    path = folder.path / "report.md"
    with replacing(path) as temporary:
        temporary.write_text(markdown(report, folder.spec.title), encoding="utf-8")
    return path


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="(fp32 fp16)")
    arguments.add_argument("--executors", nargs="+", choices=KINDS, help="default: all that can run here")
    arguments.add_argument("--images", type=Path, metavar="FOLDER", help="own data instead of the built-in samples")
    arguments.add_argument("--labels", type=Path, metavar="FILE", help="the truth for --images: tab-separated pairs")
    arguments.add_argument("--baseline", type=Path, metavar="FOLDER", help="the --build-dir of engines without plugins")
    arguments.add_argument(
        "--trt-python",
        default=os.environ.get("TRT_PYTHON", sys.executable),
        metavar="PYTHON",
        help="the interpreter that has TensorRT and pycuda (TRT_PYTHON, or this one)",
    )
    arguments.add_argument("--write-samples", type=Path, metavar="FOLDER", help="store the built-in samples, and stop")
    arguments.add_argument("--worker", nargs=2, metavar=("LABEL", "FOLDER"), help=argparse.SUPPRESS)
    options = arguments.parse_args()
    folder = BuildFolder(options.build_dir, options.model)
    if options.worker:
        work(folder, options.worker[0], Path(options.worker[1]))
        return 0
    spec, settings = folder.spec, folder.manifest()["settings"]
    if options.write_samples:
        spec.write_samples(settings, options.write_samples)
        return 0
    if (options.images is None) != (options.labels is None):
        raise Unusable("--images and --labels belong together: give both or none")
    samples = spec.labelled(settings, options.images, options.labels) if options.images else spec.samples(settings)
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
    report = compare(folder, baseline, labels, samples, options.trt_python)
    path = write_report(folder, report)
    show(report, spec.title)
    print(path)
    return 0 if report["passed"] else 1


def runnable(on_gpu: bool, trt_python: str) -> List[str]:
    """What compares well on this machine: torch.compile and TensorRT only with a GPU."""
    if not on_gpu:
        return ["pytorch", "onnxruntime", "patched"]
    check = "import sys, infer_trt; sys.exit(infer_trt.tensorrt_obstacle() is not None)"
    has_tensorrt = subprocess.run([trt_python, "-c", check], cwd=Path(__file__).parent, capture_output=True)
    return [kind for kind in KINDS if kind != "tensorrt" or has_tensorrt.returncode == 0]


if __name__ == "__main__":
    run_script(main)
