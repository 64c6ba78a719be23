"""compare.py --ablation: plugins timed one by one; see models/ablation.py for what is compared with what."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np
from tqdm import tqdm

import plugins
from comparison import engines
from comparison.machine import machine, tensorrt_absent
from models import ablation
from models.chain import BuildFolder
from models.spec import Part, Unusable


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
            parts[name] = part = ablation.alone(name, graph, kind.sizes)
            used = []
            if name == "plugin":
                surgeon.graft(graph, plugins.find(kind.plugin), match)
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
