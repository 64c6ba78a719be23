"""compare.py --find-drift: what FP16 loses, and the nodes to keep in FP32; see models/drift.py for how it searches."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, FrozenSet, List, Optional, Tuple

import numpy as np

from comparison import engines
from comparison.machine import tensorrt_absent
from infer_trt import OnnxRuntimeExecutor
from models import drift
from models.chain import BuildFolder, replacing
from models.report import LISTED, number
from models.spec import PART_ERROR, AnySample, Part, Unusable

if TYPE_CHECKING:
    import onnx

    from surgeon import Grafted

MOST_TRIALS = 50  # runs of the whole model to make a set of nodes smaller


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
            output
            for part in parts
            for inputs in self.folder.check_inputs(part)
            for output in executor.run(part.name, inputs).values()
            if output.dtype.kind == "f"
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
        return [bar.judged(metrics[bar.metric]) for bar in self.bars]

    def meets(self, keep: Collection[str]) -> bool:
        return all(bar["met"] for bar in self.judged(keep))

    def errors(self, keep: Collection[str]) -> List[drift.TensorError]:
        """The errors of all tensors on the check inputs, with these nodes in FP32."""
        return [
            error
            for one, exact in zip(self.grafted, self.exact)
            for error in drift.tensor_errors(
                one.part.name, exact, self.model(one, "fp16", keep), self.folder.check_inputs(one.part)
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
                names = [name for node in drift.nodes_of(exact.graph) for name in node.outputs]
                part, marked = drift.marked(one.part, half, names)
                problem = self.run(workers, [drift.sized(part, input_sets, only=True)], [marked])
                if problem is not None:
                    print(f"TensorRT does not run {part.name} with all tensors as outputs: {problem}", flush=True)
                    continue
                with np.load(self.folder.path / engines.OUTPUTS) as outputs:
                    values = partial(values_of, outputs, part.name)
                    found += drift.tensor_errors(part.name, exact, half, input_sets, values)
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
                for values in values_of(stored, part.name, [tensor.name for tensor in part.outputs], index)
                if values.dtype.kind == "f"
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
