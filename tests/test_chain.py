"""All five scripts on both demo models, as users run them; and what users get wrong."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

import plugins
import surgeon
from export_onnx import check
from infer_trt import refuse_foreign
from models.chain import BuildFolder
from models.restormer.checkpoint import load
from models.spec import Unusable
from tests.conftest import MODELS, ROOT, run_step

PARTS = {"restormer": ["network"], "trocr": ["encoder", "prefill", "step"]}
PLAIN = {"Conv", "Add", "Concat", "Cast"}  # what Restormer's patterns leave


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def succeeds(*arguments: object) -> str:
    done = run_step(*arguments)
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# The steps
# ---------------------------------------------------------------------------------------------------------------------


def test_export_that_differs_from_pytorch_fails(built):
    """The check compares with the module, at each of the sizes: here it is another one's graph, or NaN."""
    (exportable,) = load("demo").parts
    path = built / "restormer" / "network.onnx"
    inputs = [exportable.example(dims, np.random.default_rng(0)) for dims in exportable.check_at]
    assert check(exportable, path, inputs)[1]
    with torch.no_grad():
        exportable.module.output.weight *= 1.01
    error, passed = check(exportable, path, inputs)
    assert error > 1e-3
    assert not passed
    with torch.no_grad():
        exportable.module.output.weight[0] = np.nan
    assert not check(exportable, path, inputs)[1]


@pytest.mark.parametrize("model", MODELS)
def test_export_leaves_what_every_tensorrt_reads(built, model):
    manifest = json.loads((built / model / "manifest.json").read_text())
    assert "demo weights, trained by this project" in manifest["weights"]
    assert [part["name"] for part in manifest["parts"]] == PARTS[model]
    for part in manifest["parts"]:
        graph = onnx.load(built / model / f"{part['name']}.onnx")
        assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", 17)]
        for tensor, value in zip(part["inputs"], graph.graph.input, strict=True):
            assert tensor["name"] == value.name
            axes = [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
            assert [str(axis).split("*")[-1] for axis in axes] == [str(size) for size in tensor["shape"]]
        assert str(ROOT) not in str(graph.SerializeToString()[:100_000])  # the exporter notes source paths


def test_surgery_at_a_size_that_no_step_has_seen(built):
    image = np.random.default_rng(7).random((2, 3, 104, 88), dtype=np.float32)
    exported, fp32, fp16 = (
        session(built / "restormer" / f"network{suffix}.onnx").run(None, {"image": image})[0]
        for suffix in ("", ".fp32", ".fp16")
    )
    np.testing.assert_allclose(fp32, exported, rtol=0, atol=1e-5)
    assert 0 < np.abs(fp16 - exported).max() < 5e-3


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_patterns_become_plugin_nodes(built, precision):
    graph = onnx.load(built / "restormer" / f"network.{precision}.onnx").graph
    nodes = [node for node in graph.node if node.domain == "trt_graft"]
    counts = {
        "fp32": {"ChannelLayerNorm": 44, "TransposedAttention": 22},  # TensorRT is faster at all else
        "fp16": {"TransposedAttentionBlock": 22, "GatedFeedForward": 22, "PixelUnshuffle": 3, "PixelShuffle": 3},
    }
    assert Counter(node.op_type for node in nodes) == counts[precision]
    for node in nodes:  # how TensorRT's parser finds a plugin
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert attributes["plugin_version"] == b"1"
        assert attributes["plugin_namespace"] == b"trt_graft"
    if precision == "fp16":
        assert {node.op_type for node in graph.node if node not in nodes} == PLAIN


def test_nothing_of_the_patterns_is_left(built):
    """Nor any computation of shapes."""
    folder = BuildFolder(built, "restormer")
    (part,) = folder.parts()
    larger = [name for name in plugins.names() if plugins.find(name).reach]
    graph = surgeon.grafted(folder, part, [*larger, "pointwise_conv_residual"]).graph
    counts = Counter(node.op for node in graph.nodes)
    assert {op: count for op, count in counts.items() if op not in PLAIN} == {
        "ChannelLayerNorm": 44,
        "TransposedAttention": 22,
        "DepthwiseConv": 22,
        "GatedDepthwiseConv": 22,
        "PixelUnshuffle": 3,
        "PixelShuffle": 3,
    }


def test_fp16_graph_takes_and_gives_what_the_model_does(built):
    """Only what passes between the parts changes its type."""
    half, single, integer = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT, onnx.TensorProto.INT32
    graph = onnx.load(built / "trocr" / "step.fp16.onnx").graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    assert types.pop("logits") == single
    for name in ("sequences", "position", "finished"):
        assert types.pop(name) == types.pop(f"next_{name}") == integer
    assert set(types.values()) == {half}
    graph = onnx.load(built / "restormer" / "network.fp16.onnx").graph
    assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {single}
    assert {tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 4} == {half}


@pytest.mark.parametrize("suffix", ["fp32", "fp16"])
def test_an_image_of_zeros_stays_finite(built, suffix):
    """Channels of zeros have norm 0 and variance 0."""
    image = np.zeros((1, 3, 64, 64), np.float32)
    (restored,) = session(built / "restormer" / f"network.{suffix}.onnx").run(None, {"image": image})
    assert np.isfinite(restored).all()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("model", MODELS)
def test_patterns_left_out_stay_as_they_were(copied, model, precision):
    output = succeeds("surgeon.py", model, "--precision", precision, "--without", "all", "--build-dir", copied)
    assert "no plugins" in output
    for part in PARTS[model]:
        graph = onnx.load(copied / model / f"{part}.{precision}.onnx")
        assert not graph.functions
        assert {node.domain for node in graph.graph.node} == {""}
    zeros = np.zeros((1, 3, 64, 64), np.float32)
    if model == "restormer":  # in FP16 too: the norms keep FP32 and thus their epsilon
        assert np.isfinite(session(copied / model / f"network.{precision}.onnx").run(None, {"image": zeros})[0]).all()


def test_a_step_run_again_leaves_nothing_of_the_steps_after_it(copied):
    """Graphs and engines of other weights, or of another surgery, must not be taken for those of these."""
    for precision in ("fp32", "fp16"):
        for part in PARTS["trocr"]:
            (copied / "trocr" / f"{part}.{precision}.engine").touch()
    succeeds("surgeon.py", "trocr", "--precision", "fp16", "--build-dir", copied)
    left = {path.name for path in (copied / "trocr").glob("*.engine")}
    assert left == {f"{part}.fp32.engine" for part in PARTS["trocr"]}
    succeeds("export_onnx.py", "trocr", "--build-dir", copied)
    graphs = {path.name for path in (copied / "trocr").iterdir() if path.suffix in (".onnx", ".engine")}
    assert graphs == {f"{part}.onnx" for part in PARTS["trocr"]}


def test_one_plugin_left_out(copied):
    output = succeeds("surgeon.py", "restormer", "--without", "channel_layer_norm", "--build-dir", copied)
    assert "channel_layer_norm" not in output
    assert "22 transposed_attention" in output


def test_plugins_that_are_off_by_default_come_when_asked_for(copied):
    """They replace what smaller plugins would, each node once."""
    asked = (
        "--with", "norm_pointwise_conv", "pointwise_conv_residual", "transposed_attention_residual",
        "--without", "gated_feed_forward", "transposed_attention_block",
    )  # fmt: skip
    output = succeeds("surgeon.py", "restormer", "--precision", "fp16", *asked, "--build-dir", copied)
    assert "44 norm_pointwise_conv" in output
    assert "22 pointwise_conv_residual" in output  # of 44: the others end attentions
    assert "22 transposed_attention_residual" in output
    assert "channel_layer_norm" not in output
    image = np.random.default_rng(0).random((1, 3, 72, 80), dtype=np.float32)
    exported, patched = (
        session(copied / "restormer" / f"network{suffix}.onnx").run(None, {"image": image})[0]
        for suffix in ("", ".fp16")
    )
    assert 0 < np.abs(patched - exported).max() < 5e-3


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("model", MODELS)
def test_engines_build_without_a_gpu(copied, model, precision):
    pytest.importorskip("tensorrt_rtx")
    output = succeeds("build_engine.py", model, "--precision", precision, "--build-dir", copied)
    for part in PARTS[model]:
        assert (copied / model / f"{part}.{precision}.engine").stat().st_size > 100_000
        assert f"--loadEngine={copied / model / part}.{precision}.engine --shapes=" in output
    engines = json.loads((copied / model / "manifest.json").read_text())["engines"][precision]
    assert all(engine["tensorrt"].startswith("TensorRT") for engine in engines.values())
    plain = ("surgeon.py", model, "--precision", "fp16", "--without", "all", "--build-dir", str(copied))
    assert (f"`python {' '.join(plain)}` leaves FP16 layers" in output) == (precision == "fp16")


def test_engines_are_smaller_without_functions_in_fp32(copied):
    pytest.importorskip("tensorrt_rtx")
    options = ("trocr", "--precision", "fp16", "--build-dir", copied)
    succeeds("build_engine.py", *options)
    engine = copied / "trocr" / "encoder.fp16.engine"
    with_functions = engine.stat().st_size
    succeeds("surgeon.py", *options, "--without", "all")
    assert "leaves FP16 layers" not in succeeds("build_engine.py", *options)
    assert engine.stat().st_size < 0.7 * with_functions


def test_restormer_restores_files_and_folders(built, tmp_path):
    samples = built / "samples" / "restormer"
    succeeds("infer_trt.py", "restormer", samples, "-o", tmp_path / "all", "--build-dir", built)
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["astronaut.png", "chelsea.png", "coffee.png"]
    output = succeeds(
        "infer_trt.py", "restormer", samples / "coffee.png", "-o", tmp_path / "one", "--build-dir", built,
        "--precision", "fp16", "--executor", "onnxruntime",
    )  # fmt: skip
    assert output == f"{samples / 'coffee.png'} → {tmp_path / 'one' / 'coffee.png'}\n"
    fp32, fp16 = (np.asarray(Image.open(tmp_path / name / "coffee.png"), int) for name in ("all", "one"))
    assert fp32.shape == fp16.shape == (187, 229, 3)
    assert np.abs(fp32 - fp16).max() <= 1


def test_trocr_reads_lines_in_order(built, tmp_path):
    samples = built / "samples" / "trocr"
    output = succeeds("infer_trt.py", "trocr", samples, "-o", tmp_path / "lines.jsonl", "--build-dir", built)
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [line["path"] for line in lines] == [str(path) for path in sorted(samples.glob("*.png"))]
    assert output.splitlines() == [f"{line['path']}\t{line['text']}" for line in lines]
    assert len({line["text"] for line in lines}) > 5  # it looks at the images


@pytest.mark.parametrize("model", MODELS)
def test_compare_meets_its_bars_and_reports(copied, model):
    succeeds("compare.py", model, "--build-dir", copied)
    report = json.loads((copied / model / "report.json").read_text())
    assert report["passed"]
    assert list(report["executors"])[:4] == ["pytorch", "onnxruntime", "patched fp32", "patched fp16"]
    for label, row in report["executors"].items():
        assert row["ms_per_item"]["median"] > 0
        assert all(np.isfinite(value) for errors in row["errors"].values() for value in errors.values())
        assert label == "pytorch" or row["bars"]
    markdown = (copied / model / "report.md").read_text()
    assert "demo weights, trained by this project" in markdown
    assert "missed" not in markdown
    with Image.open(copied / model / "report.png") as plot:
        plot.load()


def test_compare_fails_on_a_missed_bar_and_on_a_crash(copied):
    """One weight is changed in the FP32 graph, and the FP16 graph is cut short."""
    path = copied / "restormer" / "network.fp32.onnx"
    model = onnx.load(path)
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == "output.weight")
    changed = onnx.numpy_helper.to_array(weight) * 1.01
    weight.CopyFrom(onnx.numpy_helper.from_array(changed, weight.name))
    onnx.save(model, path)
    path = copied / "restormer" / "network.fp16.onnx"
    path.write_bytes(path.read_bytes()[:1000])
    done = run_step("compare.py", "restormer", "--executors", "patched", "--build-dir", copied)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    report = json.loads((copied / "restormer" / "report.json").read_text())
    assert not report["passed"]
    assert not all(bar["met"] for bar in report["executors"]["patched fp32"]["bars"])
    assert "surgeon.py" in report["executors"]["patched fp16"]["failed"]
    assert "patched fp16 failed" in (copied / "restormer" / "report.md").read_text()


@pytest.mark.parametrize("model", MODELS)
def test_compare_on_labelled_data_of_ones_own(copied, model):
    """The samples, read back from files, score as the built-in ones do."""
    samples = copied / "samples" / model
    scores = []
    for data in ([], ["--images", samples, "--labels", samples / "labels.tsv"]):
        succeeds("compare.py", model, "--executors", "pytorch", "--build-dir", copied, *data)
        scores.append(json.loads((copied / model / "report.json").read_text())["executors"]["pytorch"]["score"])
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# What users get wrong: status 2, one line that names it, nothing half-written
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "mended_by"),
    [
        (("surgeon.py", "trocr"), "python export_onnx.py trocr"),
        (("build_engine.py", "trocr"), "python export_onnx.py trocr"),
        (("infer_trt.py", "trocr", ROOT / "README.md"), "python export_onnx.py trocr"),
        (("compare.py", "trocr"), "python export_onnx.py trocr"),
    ],
)
def test_nothing_exported(refused, step, mended_by):
    assert f"run `{mended_by}` first" in refused(*step)


@pytest.mark.parametrize(
    ("step", "mended_by"),
    [
        (("build_engine.py", "trocr", "--precision", "fp16"), "surgeon.py trocr --precision fp16"),
        (("infer_trt.py", "trocr", "IMAGE", "--precision", "fp16"), "surgeon.py trocr --precision fp16"),
        (("compare.py", "trocr"), "surgeon.py trocr --precision fp16"),
    ],
)
def test_step_before_is_missing(refused, copied, step, mended_by):
    (copied / "trocr" / "step.fp16.onnx").unlink()
    image = copied / "samples" / "trocr" / "page-1.png"
    arguments = [image if argument == "IMAGE" else argument for argument in step]
    if step[0] == "infer_trt.py":
        arguments += ["--executor", "onnxruntime"]
    assert f"run `python {mended_by} --build-dir {copied}` first" in refused(*arguments, "--build-dir", copied)


@pytest.mark.parametrize("script", ["export_onnx.py", "surgeon.py", "build_engine.py", "infer_trt.py", "compare.py"])
def test_unknown_model(refused, script):
    message = refused(script, "restorer", *(["photo.png"] if script == "infer_trt.py" else []))
    assert "unknown model 'restorer': choose one of restormer, trocr" in message


@pytest.mark.parametrize("model", MODELS)
def test_images_that_cannot_be_read(refused, built, tmp_path, model):
    (tmp_path / "text.png").write_text("not an image")
    whole = next((built / "samples" / model).glob("*.png")).read_bytes()
    (tmp_path / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    out = tmp_path / "out.jsonl" if model == "trocr" else tmp_path / "out"
    for name, reason in (("text.png", ""), ("truncated.png", ""), ("missing.png", "no such"), ("empty", "no images")):
        message = refused("infer_trt.py", model, tmp_path / name, "-o", out, "--build-dir", built)
        assert str(tmp_path / name) in message
        assert reason in message
    assert not out.is_file()
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize("model", MODELS)
def test_a_bad_image_among_good_ones_leaves_nothing_half_written(refused, built, tmp_path, model):
    good = next((built / "samples" / model).glob("*.png"))
    bad = tmp_path / "bad.png"
    bad.write_bytes(good.read_bytes()[:2000])
    out = tmp_path / "out"
    done = run_step("infer_trt.py", model, good, bad, "-o", out, "--executor", "onnxruntime", "--build-dir", built)
    assert done.returncode == 2
    assert str(bad) in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    if model == "restormer":
        assert [path.name for path in out.iterdir()] == [good.name]
    else:
        assert not out.exists()
        assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("model", MODELS)
def test_folders_without_permission(refused, built, model):
    forbidden = "/proc/trt-graft"  # not even root may write there
    image = next((built / "samples" / model).glob("*.png"))
    arguments = ("--executor", "onnxruntime", "--build-dir", built)
    assert forbidden in refused("export_onnx.py", model, "--build-dir", forbidden)
    assert forbidden in refused("infer_trt.py", model, image, "-o", f"{forbidden}/out", *arguments)
    assert forbidden in refused("compare.py", model, "--write-samples", forbidden, "--build-dir", built)


def test_build_folder_that_is_a_file(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refused("export_onnx.py", "trocr", "--build-dir", tmp_path / "file")


def test_weights_that_do_not_exist(refused, tmp_path):
    for model in MODELS:
        assert str(tmp_path / "none.pth") in refused("export_onnx.py", model, "--weights", tmp_path / "none.pth")
        assert "choose" in refused("export_onnx.py", model, "--weights", "random:huge")


def test_beams_that_cannot_be(refused):
    assert "restormer takes no --num-beams" in refused("export_onnx.py", "restormer", "--num-beams", 4)
    for beams in (0, 65):
        assert f"num_beams={beams} is not in 1…64" in refused("export_onnx.py", "trocr", "--num-beams", beams)


def test_onnx_that_lacks_a_pattern(refused, copied):
    """As when a network was changed: one softmax less."""
    path = copied / "restormer" / "network.onnx"
    model = onnx.load(path)
    next(node for node in model.graph.node if node.op_type == "Softmax").op_type = "LogSoftmax"
    onnx.save(model, path)
    before = (copied / "restormer" / "network.fp32.onnx").read_bytes()
    message = refused("surgeon.py", "restormer", "--build-dir", copied)
    assert "transposed_attention occurs 21 times instead of 22" in message
    assert (copied / "restormer" / "network.fp32.onnx").read_bytes() == before


def test_onnx_that_is_none(refused, copied):
    (copied / "trocr" / "encoder.onnx").write_bytes(b"not a protobuf")
    assert "encoder.onnx" in refused("surgeon.py", "trocr", "--build-dir", copied)
    (copied / "trocr" / "manifest.json").write_text("{")
    assert "damaged" in refused("surgeon.py", "trocr", "--build-dir", copied)


def test_options_that_do_not_fit(refused, built):
    assert "no dim is called depth: choose from batch, length" in refused(
        "build_engine.py", "trocr", "--largest", "depth=3", "--build-dir", built
    )
    assert "unknown plugin 'relu'" in refused("surgeon.py", "trocr", "--without", "relu", "--build-dir", built)
    message = refused("compare.py", "trocr", "--images", built / "samples" / "trocr", "--build-dir", built)
    assert "--labels" in message


@pytest.mark.parametrize("model", MODELS)
def test_labels_that_do_not_fit(refused, built, tmp_path, model):
    samples = built / "samples" / model
    (tmp_path / "labels.tsv").write_text("elsewhere.png\tnothing\n")
    for labels, reason in ((tmp_path / "labels.tsv", "elsewhere.png"), (tmp_path / "none.tsv", "none.tsv")):
        message = refused("compare.py", model, "--images", samples, "--labels", labels, "--build-dir", built)
        assert reason in message


def test_node_that_tensorrt_does_not_know_is_named(refused, copied):
    pytest.importorskip("tensorrt_rtx")
    path = copied / "trocr" / "encoder.fp32.onnx"
    model = onnx.load(path)
    node = next(node for node in model.graph.node if node.op_type == "Erf")
    node.op_type, node.domain = "Unheard", "elsewhere"
    model.opset_import.append(onnx.helper.make_opsetid("elsewhere", 1))
    onnx.save(model, path)
    message = refused("build_engine.py", "trocr", "--build-dir", copied)
    assert "cannot parse" in message
    assert node.name in message
    assert not list((copied / "trocr").glob("*.engine"))


def test_compute_capability_that_tensorrt_rtx_does_not_know(refused, built):
    pytest.importorskip("tensorrt_rtx")
    message = refused("build_engine.py", "trocr", "--compute-capability", "5.0", "--build-dir", built)
    assert "cannot build for compute capability 5.0" in message


# ---------------------------------------------------------------------------------------------------------------------
# Where execution runs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("built", "reason"),
    [
        (
            {"tensorrt": "TensorRT 8.6.1", "gpu": "A", "plugins": "1f"},
            "tensorrt TensorRT 8.6.1, here is TensorRT 8.6.0",
        ),
        ({"tensorrt": "TensorRT 8.6.0", "gpu": "B", "plugins": "1f"}, "gpu B, here is A"),
        ({"tensorrt": "TensorRT 8.6.0", "gpu": "A", "plugins": None}, "plugins none, here is 1f"),
        ({}, "tensorrt none"),  # an engine of which the manifest knows nothing
    ],
)
def test_engines_built_for_something_else_are_refused(built, reason):
    here = {"tensorrt": "TensorRT 8.6.0", "gpu": "A", "plugins": "1f"}
    refuse_foreign(Path("x.engine"), here, here, "python build_engine.py trocr")
    with pytest.raises(Unusable, match=reason) as problem:
        refuse_foreign(Path("x.engine"), built, here, "python build_engine.py trocr")
    assert "run `python build_engine.py trocr` again" in str(problem.value)


def test_execution_needs_no_pytorch():
    """A Python without PyTorch, transformers and onnx can import all that infers."""
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'transformers', 'onnx', 'onnx_graphsurgeon', 'skimage')))\n"
        "import infer_trt, models.restormer, models.trocr"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "path",
    ["build_engine.py", "infer_trt.py", "compare.py", *(str(p.relative_to(ROOT)) for p in ROOT.glob("models/**/*.py"))],
)
def test_execution_keeps_to_python_3_9(path):
    """TensorRT 8.6's bindings stop at Python 3.10."""
    tree = ast.parse((ROOT / path).read_text(), feature_version=(3, 9))
    ends = {
        (node.module, alias.name) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert ("typing", "Self") not in ends
    assert ("__future__", "annotations") in ends or not any(isinstance(node, ast.FunctionDef) for node in tree.body)
