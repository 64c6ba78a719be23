"""compare.py --ablation: kinds of plugin nodes, their graphs by themselves, and the table.  Their engines are tested on
a stand-in in test_tensorrt_executor.py, and here where a GPU is."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import compare
import plugins
from build_engine import COMPUTE_CAPABILITIES, build, find_tensorrt, gpu_name
from models import ablation, drift
from models.chain import BuildFolder
from tests.conftest import MODELS, run_step

SMALL = {"network": {"batch": 2, "height": 64, "width": 48}}
SMALL.update({name: {"batch": 3} for name in ("encoder", "prefill")})
SMALL["step"] = {"batch": 3, "length": 24, "position": 9}


@pytest.fixture
def small(copied: Path) -> Path:
    """A build folder whose parts are timed at one small size."""
    for model in MODELS:
        folder = BuildFolder(copied, model)
        manifest = folder.manifest()
        for part in manifest["parts"]:
            integers = {tensor["name"]: 5 for tensor in part["inputs"] if tensor["dtype"].startswith("int")}
            part["time_at"] = [{**integers, **SMALL[part["name"]]}]
        folder.write_manifest(manifest)
    return copied


def one_of_each(folder: BuildFolder) -> list[ablation.Kind]:
    """The last kind of each plugin in each part."""
    kinds = compare.node_kinds(folder, plugins.names(), None)
    return list({(kind.part.name, kind.plugin): kind for kind in kinds}.values())


@pytest.mark.parametrize("model", MODELS)
def test_shapes_are_those_that_tensors_have(built, model):
    folder = BuildFolder(built, model)
    for part in folder.parts():
        graph = onnx.load(folder.onnx(part.name))
        for inputs in folder.check_inputs(part):
            shapes, values = ablation.static_shapes(graph, {name: array.shape for name, array in inputs.items()})
            types = drift.element_types(graph.graph)
            computed = [name for node in graph.graph.node for name in node.output]
            floats = [name for name in computed if types.get(name) == onnx.TensorProto.FLOAT]
            assert len(floats) > len(part.outputs)
            for name, array in zip(floats, drift.exposing(graph, floats).run(floats, inputs)):
                assert shapes[name] == array.shape, name
            assert set(shapes) >= set(computed)
            assert all(array.size <= ablation.LARGEST_VALUE for array in values.values())


@pytest.mark.parametrize("model", MODELS)
def test_every_node_is_of_one_kind(built, model):
    """Also of plugins that are off by default or that contain others."""
    folder = BuildFolder(built, model)
    kinds = [kind for kind in compare.node_kinds(folder, plugins.names(), None)]
    for part in folder.parts():
        for sizes in part.time_at:
            counts: Counter[str] = Counter()
            for kind in kinds:
                if kind.part == part and kind.sizes == sizes:
                    counts[kind.plugin] += len(kind.matches)
            assert counts == part.plugins
    assert len({json.dumps(kind.described()) for kind in kinds}) == len(kinds)


def test_restormers_norms(built):
    kinds = compare.node_kinds(BuildFolder(built, "restormer"), ["channel_layer_norm"], 1)
    rows = [kind.described() for kind in kinds]
    assert [(row["count"], row["inputs"]) for row in rows] == [
        (4, [[1, 16, 256, 256]]),
        (12, [[1, 32, 128, 128]]),
        (16, [[1, 64, 64, 64]]),
        (4, [[1, 128, 32, 32]]),
        (8, [[1, 32, 256, 256]]),
    ]
    assert rows[0]["size"] == "batch 1, height 256, width 256"
    assert rows[0]["weights"] == [[16], [16]]


def test_rows_come_by_size_and_hold_for_one_library():
    def row(size: str, time: float, library: str) -> dict[str, Any]:
        same = {key: "" for key in ("precision", "attributes", "inputs", "weights", "outputs")}
        return {**same, "part": "step", "plugin": "linear", "size": size, "built_with": library, "layers_us": time}

    earlier = [row("batch 8", 1, "new"), row("batch 16", 1, "old"), row("batch 32", 1, "new")]
    joined = ablation.joined([row("batch 32", 2, "new"), row("batch 1", 2, "new")], earlier)
    assert [(one["size"], one["layers_us"]) for one in joined] == [("batch 1", 2), ("batch 8", 1), ("batch 32", 2)]


@pytest.mark.parametrize("model", MODELS)
def test_nodes_compute_what_the_layers_do(small, tmp_path, model):
    kinds = one_of_each(BuildFolder(small, model))
    assert kinds
    check_nodes(kinds, BuildFolder(tmp_path, model))


def test_nodes_of_beams_compute_what_the_layers_do(built_beams, tmp_path):
    kinds = compare.node_kinds(BuildFolder(built_beams, "trocr"), plugins.names(), 1)
    counts = {"beam_choice": 1, "beam_self_attention": 2, "cross_attention": 2, "token_embedding": 1}
    beams = [kind for kind in kinds if kind.plugin in counts]
    assert [(kind.plugin, len(kind.matches)) for kind in beams] == list(counts.items())
    check_nodes(beams, BuildFolder(tmp_path, "trocr"))


def check_nodes(kinds: Sequence[ablation.Kind], folder: BuildFolder) -> None:
    """A node computes what the layers do, both in the types that they have within a model."""
    folder.path.mkdir()
    for kind in kinds:
        compare.write_node(kind, folder, ["fp32", "fp16"])
        for precision, tolerance, dtype in (("fp32", 2e-5, np.float32), ("fp16", 2e-3, np.float16)):
            results = {}
            for part in folder.parts():
                path = folder.onnx(part.name, precision)
                graph = onnx.load(path).graph
                ((_, inputs),) = ablation.random_inputs(part, {})
                internal = {tensor.name for tensor in (*part.inputs, *part.outputs) if tensor.internal}
                for value in (*graph.input, *graph.output):
                    shape = [axis.dim_value for axis in value.type.tensor_type.shape.dim]
                    assert all(shape), value.name
                    elem_type = value.type.tensor_type.elem_type
                    assert elem_type == {"fp32": 1, "fp16": 10}[precision] or value.name not in internal
                domains = [node.domain for node in graph.node]
                assert domains == [plugins.DOMAIN] if part.name == "plugin" else set(domains) == {""}
                typed = {name: array.astype(dtype) if name in internal else array for name, array in inputs.items()}
                session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
                results[part.name] = [array.astype(np.float32) for array in session.run(None, typed)]
            scale = max(1.0, *(float(np.abs(array).max()) for array in results["layers"]))
            for expected, actual in zip(results["layers"], results["plugin"], strict=True):
                np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale, err_msg=kind.plugin)


def test_layers_have_the_types_that_surgery_without_plugins_gives_them(small, tmp_path):
    """The norm of a fused plugin stays in FP32, its convolution does not."""
    folder = BuildFolder(tmp_path, "restormer")
    folder.path.mkdir()
    plain = BuildFolder(small, "restormer")
    done = run_step("surgeon.py", "restormer", "--precision", "fp16", "--without", "all", "--build-dir", small)
    assert done.returncode == 0, done.stderr
    reference = drift.element_types(onnx.load(plain.onnx("network", "fp16")).graph)
    for kind in one_of_each(plain):
        compare.write_node(kind, folder, ["fp16"])
        graph = onnx.load(folder.onnx("layers", "fp16")).graph
        types = drift.element_types(graph)
        for name in {name for node in graph.node if node.op_type != "Cast" for name in node.output}:
            if name in reference and name in types:
                assert types[name] == reference[name], (kind.plugin, name)


def test_caches_are_updated_in_place(small, tmp_path):
    folder = BuildFolder(tmp_path, "trocr")
    folder.path.mkdir()
    (kind,) = compare.node_kinds(BuildFolder(small, "trocr"), ["cached_self_attention"], None)
    compare.write_node(kind, folder, ["fp16"])
    patched = folder.manifest()["patched"]["fp16"]
    assert patched["layers"]["in_place"] == {}
    assert len(patched["plugin"]["in_place"]) == 2
    (part, _) = folder.parts()
    assert part.time_at == ({"position": 9},)


@pytest.mark.parametrize("model", MODELS)
def test_tensorrt_builds_the_layers(small, tmp_path, model):
    """Static shapes only, nothing that TensorRT cannot read; images may be channel-last."""
    pytest.importorskip("tensorrt_rtx")
    tensorrt = find_tensorrt()
    if not tensorrt.builds_without_gpu:
        pytest.skip("TensorRT-RTX only where it needs no GPU")
    folder = BuildFolder(tmp_path, model)
    folder.path.mkdir()
    for kind in one_of_each(BuildFolder(small, model)):
        compare.write_node(kind, folder, ["fp32", "fp16"])
        for precision in ("fp32", "fp16"):
            part = next(part for part in folder.parts() if part.name == "layers")
            source, timings = folder.onnx("layers", precision), tmp_path / "timings"
            assert build(tensorrt, part, source, precision, COMPUTE_CAPABILITIES, timings, isolated=True)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------

WORKER = f"""#!{sys.executable}
import json, sys
from pathlib import Path
assert sys.argv[-2:] == ["--engine-worker", "time"], sys.argv
folder = Path(sys.argv[sys.argv.index("--build-dir") + 1]) / sys.argv[2]
print("a library says hello")
print("ready", flush=True)
for line in sys.stdin:
    precision = line.strip()
    assert (folder / f"layers.{{precision}}.onnx").is_file()
    if b"CrossAttention" in (folder / f"plugin.{{precision}}.onnx").read_bytes():
        sys.exit("out of luck | really")
    layers = dict.fromkeys(("median", "p20", "p80"), 8.0)
    row = dict(layers_us=layers, plugin_us=dict.fromkeys(layers, 2.0 if precision == "fp16" else 20.0))
    row.update(built_with=dict(tensorrt="TensorRT 0", gpu=None, plugins="1f"), difference=1e-4)
    print("more of that")
    print("measured:", json.dumps(row), flush=True)
"""


def ablated(folder: BuildFolder, worker: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> int:
    """`compare.py --ablation` where a script is what a TensorRT interpreter would be."""
    python = folder.path / "python"
    python.write_text(worker)
    python.chmod(0o755)
    monkeypatch.setattr(compare, "gpu_name", lambda: "a GPU")
    monkeypatch.setattr(compare, "tensorrt_obstacle", lambda python: None)
    monkeypatch.setattr(compare.plugins, "library_path", lambda: python)
    wanted = options.get("wanted", plugins.names())
    return compare.ablate(folder, wanted, options.get("precisions", ["fp32", "fp16"]), 1, str(python))


def test_a_worker_that_dies_is_one_row(small, monkeypatch, capsys):
    folder = BuildFolder(small, "trocr")
    assert ablated(folder, WORKER, monkeypatch) == 1
    report = json.loads((folder.path / "ablation.json").read_text())
    assert {row["plugin"] for row in report["rows"] if "failed" in row} == {"cross_attention"}
    lines = (folder.path / "ablation.md").read_text().splitlines()
    assert "- Version: TensorRT 0" in lines
    rows = [line for line in lines if "cross_attention" in line]
    assert len(rows) == 2  # one in each precision
    assert all(line.endswith("**failed**: out of luck / really |") for line in rows)
    losing = lines[lines.index("## FP32") : lines.index("## FP16")]
    assert sum("**plugin loses**" in line for line in losing) == sum("**plugin loses**" in line for line in lines) > 4
    (row,) = (line for line in lines if "encoder_attention" in line and "| 4 |" in line)  # 8 µs over 2 µs
    assert row == (
        "| encoder | batch 3 | encoder_attention "
        "| 3×193×192, 3×193×192, 3×193×192 → 3×193×192 | 7 | 8 | 2 | 4 | 0.0001 |  |"
    )
    assert str(folder.path / "ablation.md") in capsys.readouterr().out
    assert not [path for path in folder.path.iterdir() if path.is_dir()]  # no graphs are left behind


def test_some_plugins_in_one_precision(small, monkeypatch):
    folder = BuildFolder(small, "trocr")
    folder.onnx("step", "fp32").unlink()
    assert ablated(folder, WORKER, monkeypatch, wanted=["encoder_attention"]) == 0
    rows = json.loads((folder.path / "ablation.json").read_text())["rows"]
    assert [(row["plugin"], row["precision"]) for row in rows] == [("encoder_attention", "fp16")]


def test_rows_of_earlier_runs_stay_while_they_hold(small, monkeypatch):
    """Another plugin is measured, then the same with another library."""
    folder = BuildFolder(small, "trocr")

    def measured(wanted: str, worker: str = WORKER) -> list[tuple[str, str]]:
        assert ablated(folder, worker, monkeypatch, wanted=[wanted], precisions=["fp16"]) == 0
        rows = json.loads((folder.path / "ablation.json").read_text())["rows"]
        return [(row["plugin"], row["built_with"]["plugins"]) for row in rows]

    assert measured("encoder_attention") == [("encoder_attention", "1f")]
    assert measured("cached_self_attention") == [("encoder_attention", "1f"), ("cached_self_attention", "1f")]
    assert measured("encoder_attention") == [("encoder_attention", "1f"), ("cached_self_attention", "1f")]
    assert measured("encoder_attention", WORKER.replace("1f", "2f")) == [("encoder_attention", "2f")]


def test_a_worker_that_cannot_begin(small, monkeypatch):
    folder = BuildFolder(small, "trocr")
    with pytest.raises(compare.Unusable, match="TensorRT cannot begin: no pycuda"):
        ablated(folder, f"#!{sys.executable}\nimport sys\nsys.exit('no pycuda')", monkeypatch)
    with pytest.raises(compare.Unusable, match="trocr has nothing for pixel_shuffle to replace"):
        ablated(folder, WORKER, monkeypatch, wanted=["pixel_shuffle"])


def test_options(refused, built):
    command = ("compare.py", "trocr", "--build-dir", built, "--ablation")
    assert "unknown plugin 'relu'" in refused(*command, "relu")
    assert "--sizes" in refused(*command, "--sizes", "0")
    if gpu_name() is None:
        assert "--ablation needs TensorRT on a GPU: no GPU" in refused(*command)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(gpu_name() is None, reason="no GPU")
@pytest.mark.parametrize("model", MODELS)
def test_every_plugin_is_measured(small, model):
    python = os.environ.get("TRT_PYTHON", sys.executable)
    done = run_step("compare.py", model, "--ablation", "--build-dir", small, "--trt-python", python)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((small / model / "ablation.json").read_text())["rows"]
    assert {(row["plugin"], row["precision"]) for row in rows} == {
        (plugin, precision)
        for part in BuildFolder(small, model).parts()
        for plugin in part.plugins
        for precision in ("fp32", "fp16")
    }
    for row in rows:
        assert row["difference"] < 1e-2, row
        assert 0 < row["plugin_us"]["p20"] <= row["plugin_us"]["p80"]
