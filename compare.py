"""Step 5: compare accuracy and speed of every executor with PyTorch.

    python compare.py restormer
    python compare.py trocr --precision fp16 --executors pytorch patched
    python compare.py trocr --images lines/ --labels labels.tsv
    python compare.py restormer --write-samples samples/     store the built-in samples as files, and stop

Each executor runs in a process of its own, on the same inputs:

    pytorch        the model as its authors run it; the reference
    torch.compile  the same parts, compiled
    onnxruntime    the exported graphs
    patched        the patched graphs in ONNX Runtime, per precision
    tensorrt       the engines, per precision

PyTorch and ONNX Runtime run on the CPU, TensorRT on the GPU.

Leaves build/<model>/report.md, report.json and report.png.  Exit status 1 when a bar is missed or an executor fails.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple

import numpy as np

from infer_trt import OnnxRuntimeExecutor, TensorRTExecutor, tensorrt_obstacle
from models.chain import PRECISIONS, BuildFolder, parser, replacing, run_script
from models.spec import Bar, Executor, LoadedModel, Part, Sample, Unusable

if TYPE_CHECKING:
    from torch import nn

REFERENCE = "pytorch"
KINDS = (REFERENCE, "torch.compile", "onnxruntime", "patched", "tensorrt")
STATISTICS: Dict[str, Callable[[np.ndarray], Any]] = {
    "max": np.max,
    "mean": np.mean,
    "median": np.median,
    "p99": lambda errors: np.percentile(errors, 99),
}
REPEATS = 5  # timed runs of a part and of the whole


# ---------------------------------------------------------------------------------------------------------------------
# Workers: one process per executor
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Measurement:
    """What a worker hands back.

    parts       part → output → array, on the part inputs that the reference recorded
    part_ms     part → latencies in ms
    results     the end results, one per sample
    total_ms    latencies in ms of the whole batch of samples, from loaded image to result
    environment the versions that took part
    """

    parts: Dict[str, Dict[str, np.ndarray]]
    part_ms: Dict[str, List[float]]
    results: List[Any]
    total_ms: List[float]
    environment: Dict[str, str]


class TorchExecutor:
    """Runs the parts' PyTorch modules.  While `recording`, it keeps the inputs of one call of each part: the last whose
    number is a power of two, which lies in the second half."""

    def __init__(self, loaded: LoadedModel, wrap: Callable[[nn.Module], Any] = lambda module: module) -> None:
        self.parts = {exportable.part.name: exportable.part for exportable in loaded.parts}
        self.modules = {exportable.part.name: wrap(exportable.module) for exportable in loaded.parts}
        self.recording = False
        self.recorded: Dict[str, Dict[str, np.ndarray]] = {}
        self.calls: Counter[str] = Counter()

    def run(self, part: str, inputs: Mapping[str, np.ndarray]) -> Dict[str, np.ndarray]:
        import torch

        if self.recording:
            self.calls[part] += 1
            if self.calls[part] & (self.calls[part] - 1) == 0:
                self.recorded[part] = dict(inputs)
        spec = self.parts[part]
        with torch.inference_mode():
            outputs = self.modules[part](*(torch.from_numpy(inputs[tensor.name]) for tensor in spec.inputs))
        values = outputs if isinstance(outputs, tuple) else (outputs,)
        return {tensor.name: value.numpy() for tensor, value in zip(spec.outputs, values)}

    def zeros(self, part: str, name: str, dims: Mapping[str, int]) -> np.ndarray:
        tensor = next(tensor for tensor in self.parts[part].inputs if tensor.name == name)
        return np.zeros(tensor.sizes(dims), np.float32)

    def rows(self, value: np.ndarray, indices: np.ndarray) -> np.ndarray:
        return value[indices]


def work(folder: BuildFolder, label: str, shared: Path) -> None:
    """Runs one executor on the shared inputs and leaves its Measurement in `shared`."""
    kind, _, precision = label.partition(" ")
    spec, manifest = folder.spec, folder.manifest()
    settings = manifest["settings"]
    items = pickle.loads((shared / "items.pickle").read_bytes())
    environment = {"Python": platform.python_version(), "numpy": np.__version__}
    executor: Executor
    original: Optional[Callable[[Sequence[Any]], List[Any]]] = None

    if kind in (REFERENCE, "torch.compile"):
        import torch

        environment["PyTorch"] = torch.__version__
        loaded = spec.load(manifest["weights_argument"])
        executor = TorchExecutor(loaded, torch.compile if kind == "torch.compile" else lambda module: module)
        if kind == REFERENCE:
            original = loaded.original
            executor.recording = True
            spec.run(executor, settings, folder.path, items[: spec.batch_size])
            executor.recording = False
            (shared / "part_inputs.pickle").write_bytes(pickle.dumps(executor.recorded, protocol=4))
    elif kind == "tensorrt":
        executor = TensorRTExecutor(folder, precision)
        environment["TensorRT"] = manifest["engines"][precision][folder.parts()[0].name]["tensorrt"]
    else:
        import onnxruntime

        environment["ONNX Runtime"] = onnxruntime.__version__
        executor = OnnxRuntimeExecutor(folder, precision if kind == "patched" else "")

    parts, part_ms = {}, {}
    for name, inputs in pickle.loads((shared / "part_inputs.pickle").read_bytes()).items():
        part = next(part for part in folder.parts() if part.name == name)
        outputs, part_ms[name] = timed(partial(executor.run, name, inputs))
        parts[name] = {tensor.name: as_numpy(outputs[tensor.name]) for tensor in part.outputs}
    run_batch = original or partial(spec.run, executor, settings, folder.path)
    results, total_ms = timed(partial(in_batches, run_batch, items, spec.batch_size))
    measurement = Measurement(parts, part_ms, results, total_ms, environment)
    (shared / f"{label}.pickle").write_bytes(pickle.dumps(measurement, protocol=4))


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
    """An output on the host, whichever executor it comes from, in FP32."""
    return (value if isinstance(value, np.ndarray) else value.to_host()).astype(np.float32)


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
    row: Dict[str, Any] = {
        "environment": measured.environment,
        "errors": errors,
        "part_ms": {name: latency(values) for name, values in measured.part_ms.items()},
        "ms_per_item": latency(measured.total_ms, len(samples)),
        "score": spec.score(measured.results, [sample.truth for sample in samples]),
        "bars": [],
    }
    if label == REFERENCE:
        return row
    row["difference"] = spec.difference(reference.results, measured.results)
    metrics = {"part max abs": float(np.max([group["abs max"] for group in errors.values()])), **row["difference"]}
    precision = label.partition(" ")[2] or "fp32"
    row["bars"] = [judge(bar, metrics[bar.metric]) for bar in spec.bars[precision]]
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


def run_worker(folder: BuildFolder, label: str, shared: Path) -> Optional[str]:
    """Runs `label` in a process of its own; returns why it failed, or None."""
    command = [sys.executable, __file__, folder.spec.name, "--build-dir", str(folder.path.parent)]
    done = subprocess.run(
        [*command, "--worker", label, str(shared)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"ended with status {done.returncode}"


def labels_of(kinds: Sequence[str], precisions: Sequence[str]) -> List[str]:
    """The executors to run, the reference first: those with graphs of their own once per precision."""
    labels = [REFERENCE]
    for kind in kinds:
        if kind in ("patched", "tensorrt"):
            labels.extend(f"{kind} {precision}" for precision in precisions)
        elif kind != REFERENCE:
            labels.append(kind)
    return labels


def compare(folder: BuildFolder, labels: Sequence[str], samples: Sequence[Sample]) -> Dict[str, Any]:
    """Runs every executor and returns the report."""
    manifest = folder.manifest()
    rows: Dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        shared = Path(name)
        (shared / "items.pickle").write_bytes(pickle.dumps([sample.item for sample in samples], protocol=4))
        reference: Optional[Measurement] = None
        for label in labels:
            print(f"running {label} …", flush=True)
            problem = run_worker(folder, label, shared)
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
    lines += ["Each part gets the inputs that it had in a call late in the PyTorch run.  Relative errors are to the"]
    lines += ["reference's magnitude, but to no less than 0.1 % of its largest.", ""]
    statistics = [f"{kind} {name}" for kind in ("abs", "rel") for name in STATISTICS]
    lines += table(
        ["output", "executor", *statistics],
        [
            [group, label, *(number(row["errors"][group][name]) for name in statistics)]
            for group in rows[REFERENCE]["errors"]
            for label, row in rows.items()
            if label != REFERENCE
        ],
    )
    lines += [
        "## Latency",
        "",
        "Median (20th to 80th percentile) in ms, transfers included.  Whole: per sample.  PyTorch and ONNX",
    ]
    lines += ["Runtime run on the CPU, TensorRT on the GPU.", ""]
    names = list(next(iter(rows.values()))["part_ms"])
    lines += table(
        ["executor", "whole", *names],
        [
            [label, spread(row["ms_per_item"]), *(spread(row["part_ms"][name]) for name in names)]
            for label, row in rows.items()
        ],
    )
    lines += ["![Latency and error](report.png)", ""]
    return "\n".join(lines)


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


def plot(report: Mapping[str, Any], path: Path) -> None:
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
    groups = list(rows[REFERENCE]["errors"])
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
        plot(report, temporary)
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
    labels = labels_of(options.executors or runnable(), options.precision)
    for part in folder.parts():
        for label in labels:
            kind, _, precision = label.partition(" ")
            if kind == "patched":
                folder.require(folder.onnx(part.name, precision), "surgeon.py", "--precision", precision)
            elif kind == "tensorrt":
                folder.require(folder.engine(part.name, precision), "build_engine.py", "--precision", precision)
    report = compare(folder, labels, samples)
    path = write_report(folder, report)
    show(report, spec.title)
    print(path)
    return 0 if report["passed"] else 1


def runnable() -> List[str]:
    """What compares well on this machine: torch.compile and TensorRT only with a GPU."""
    return [REFERENCE, "onnxruntime", "patched"] if tensorrt_obstacle() else list(KINDS)


if __name__ == "__main__":
    run_script(main)
