"""The search for nodes that FP16 ruins, on graphs made to fail."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest

import compare
from build_engine import build, find_tensorrt, gpu_name
from models.chain import BuildFolder
from models.drift import (
    Node,
    TensorError,
    element_types,
    grow,
    half_nodes,
    markdown,
    marked,
    nodes_of,
    relative_error,
    rounded,
    shrink,
    sized,
    suspects,
    tensor_errors,
)
from models.spec import Dim, Part, TensorSpec
from surgeon import finish, grafted, in_precision, to_fp16
from tests.conftest import MODELS, ROOT, run_step

F32 = np.dtype(np.float32)
X = np.random.default_rng(0).uniform(1, 2, (1, 8)).astype(np.float32)


def run(model, **inputs):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


class Chain:
    """x → operator with a constant → … → y, in FP32 and in FP16."""

    def __init__(self, *steps, internal=False):
        self.internal = internal
        self.steps = steps
        self.exact = self.model("fp32")

    def model(self, precision, keep=()):
        tensors = [gs.Variable(name, F32, [1, 8]) for name in ("x", *"abcdefgh"[: len(self.steps) - 1], "y")]
        nodes = [
            gs.Node(
                op, f"{op}-{index}", inputs=[source, gs.Constant(f"c{index}", np.array([value], F32))], outputs=[made]
            )
            for index, ((op, value), source, made) in enumerate(zip(self.steps, tensors, tensors[1:]))
        ]
        graph = gs.Graph(nodes, inputs=tensors[:1], outputs=tensors[-1:])
        graph.opset = 17
        if precision == "fp16":
            ends = [(TensorSpec(name, "float32", (1, 8), self.internal),) for name in "xy"]
            to_fp16(graph, Part("chain", *ends, dims=()), [node for node in graph.nodes if node.name in keep])
        return finish(graph, [])

    def errors(self, keep=()):
        return tensor_errors("chain", self.exact, self.model("fp16", keep), [{"x": X}])

    def meets(self, keep):
        return relative_error(run(self.exact, x=X), run(rounded(self.model("fp16", keep)), x=X)) < 2e-3

    def found(self):
        keep = grow(self.errors, self.meets, half_nodes(self.model("fp16").graph))
        return keep if keep is None else shrink(keep, self.meets, 100)


OVERFLOW = Chain(("Mul", 1e3), ("Mul", 3e4), ("Mul", 1e-4), ("Mul", 1e-2))
UNDERFLOW = Chain(("Mul", 1e-2), ("Mul", 1e-7), ("Mul", 1e5), ("Mul", 1e2))
CANCELLATION = Chain(("Mul", 1.1), ("Add", 3e4), ("Sub", 3e4), ("Mul", 2))
HARMLESS = Chain(("Mul", 1.1), ("Add", 3), ("Sub", 1), ("Mul", 2))


# ---------------------------------------------------------------------------------------------------------------------
# Trials
# ---------------------------------------------------------------------------------------------------------------------


def test_trials_show_what_onnx_runtime_hides():
    half = OVERFLOW.model("fp16")
    assert np.isfinite(run(half, x=X)).all()  # the casts around an FP16 tensor are dropped
    assert np.isinf(run(rounded(half), x=X)).all()


@pytest.mark.parametrize("internal", [False, True])
def test_trials_round_every_stored_tensor(internal):
    chain = Chain(("Mul", 1.1), ("Add", 0.3), ("Mul", 0.7), internal=internal)
    half = np.float16
    expected = X.astype(half)
    for op, value in chain.steps:
        operator = np.add if op == "Add" else np.multiply
        expected = operator(expected.astype(np.float32), half(value).astype(np.float32)).astype(half)
    trial = rounded(chain.model("fp16"))
    np.testing.assert_array_equal(run(trial, x=X), expected.astype(np.float32))
    kept = rounded(chain.model("fp16", ["Mul-0", "Add-1", "Mul-2"]))
    assert (np.abs(run(kept, x=X) - run(chain.exact, x=X)).max() < 1e-6) == (not internal)


def test_relative_error():
    exact = np.array([3.0, 4.0])
    assert relative_error(exact, exact) == 0
    assert relative_error(exact, np.array([3.0, 4.5])) == pytest.approx(0.1)
    assert relative_error(exact, np.array([np.nan, 4])) == relative_error(exact, np.array([np.inf, 4])) == np.inf
    assert relative_error(np.zeros(2), np.zeros(2)) == 0
    assert relative_error(np.zeros(2), np.array([0, 1e-9])) == np.inf


def test_blame_is_on_the_node_where_the_error_jumps():
    by_name = {one.node.name: one for one in OVERFLOW.errors()}
    assert [name for name, one in by_name.items() if one.jumps] == ["Mul-1"]
    assert (by_name["Mul-1"].storing, by_name["Mul-2"].before) == (np.inf, np.inf)
    by_name = {one.node.name: one for one in CANCELLATION.errors()}
    assert [name for name, one in by_name.items() if one.jumps] == ["Sub-2"]
    assert by_name["Sub-2"].storing < 1e-3 < 100 * by_name["Sub-2"].before < by_name["Sub-2"].error
    assert [one.node.name for one in UNDERFLOW.errors() if one.jumps] == ["Mul-1"]
    assert not any(one.jumps for one in HARMLESS.errors())


def test_suspects_are_who_stores_or_who_rounded_before():
    nodes = [Node("one", "Add", ["x"], ["a"]), Node("two", "Sub", ["a"], ["b"]), Node("three", "Mul", ["b"], ["c"])]
    fine = [TensorError("part", node, node.outputs[0], 1e-4, 1e-4, 1e-4) for node in nodes]
    assert suspects(TensorError("part", nodes[1], "b", np.inf, 1e-4, np.inf), fine) == ["two", "three"]
    assert suspects(TensorError("part", nodes[1], "b", 1e-4, 1e-4, 1e-1), fine) == ["two", "one"]
    assert suspects(TensorError("other", nodes[1], "b", np.inf, 1e-4, np.inf), fine) == ["two"]


# ---------------------------------------------------------------------------------------------------------------------
# Search
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chain", "nodes"),
    [
        (OVERFLOW, ["Mul-1", "Mul-2"]),
        (UNDERFLOW, ["Mul-1", "Mul-2"]),
        (CANCELLATION, ["Add-1", "Sub-2"]),
        (HARMLESS, []),
    ],
)
def test_set_is_small_and_sufficient(chain, nodes):
    keep, complete = chain.found()
    assert (keep, complete) == (nodes, True)
    assert chain.meets(keep)
    for node in keep:
        assert not chain.meets([other for other in keep if other != node])


def test_overflow_behind_overflow_is_found():
    chain = Chain(("Mul", 1e6), ("Mul", 1e-6), ("Mul", 1e3), ("Mul", 1e-3), ("Mul", 1e7), ("Mul", 1e-7))
    keep, _ = chain.found()
    assert keep == ["Mul-0", "Mul-1", "Mul-4", "Mul-5"]


def test_no_set_where_the_inputs_themselves_are_rounded():
    chain = Chain(("Mul", 1e6), ("Mul", 1e-6), internal=True)
    chain.meets = lambda keep: False
    assert chain.found() is None


@pytest.mark.parametrize("needed", [set(), {"3"}, {"0", "9"}, {"1", "2", "5", "8"}, set("0123456789")])
def test_shrinking_leaves_what_is_needed(needed):
    nodes = list("0123456789")
    keep, complete = shrink(nodes, lambda keep: needed <= set(keep), 100)
    assert (set(keep), complete) == (needed, True)
    tried = []
    keep, complete = shrink(nodes, lambda keep: tried.append(keep) or needed <= set(keep), 3)
    assert needed <= set(keep)
    assert len(tried) <= 3
    assert complete == (not needed)


# ---------------------------------------------------------------------------------------------------------------------
# Whole models
# ---------------------------------------------------------------------------------------------------------------------


def scale(path: Path, factors: dict[str, tuple[float, slice]]) -> None:
    """Multiplies rows of constants of a graph."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name in factors:
            factor, rows = factors[tensor.name]
            values = onnx.numpy_helper.to_array(tensor).copy()
            values[rows] *= np.float32(factor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, path)


def overflow_in_restormer(folder: Path) -> str:
    """q and k, which attention normalises, grow a millionfold.  Returns what the guilty node's name holds."""
    scale(folder / "restormer" / "network.onnx", {"encoder_level2.0.attn.qkv_dwconv.weight": (1e6, slice(0, 64))})
    return "encoder_level2.0.attn.qkv_dwconv/"


def overflow_in_trocr(folder: Path) -> str:
    """v grows a millionfold, and the projection behind it shrinks as much."""
    path = folder / "trocr" / "encoder.onnx"
    weights = {
        node.name.split("/")[0]: node.input[1] for node in onnx.load(path).graph.node if node.op_type == "MatMul"
    }
    layer = "encoder.layers.1.attention"
    scale(path, {weights[f"{layer}.v_proj"]: (1e6, slice(None)), weights[f"{layer}.o_proj"]: (1e-6, slice(None))})
    return f"{layer}.v_proj/"


# q and k, which do not leave the larger plugins, cannot overflow there.
SMALLER = {"restormer": ("--without", "gated_feed_forward", "transposed_attention_block"), "trocr": ()}


def rounded_error(folder: BuildFolder) -> float:
    """Largest error of the FP16 graphs, stored as they say, against the exported ones on the check inputs."""
    worst = 0.0
    for part in folder.parts():
        exact, half = onnx.load(folder.onnx(part.name)), rounded(onnx.load(folder.onnx(part.name, "fp16")))
        for inputs in folder.check_inputs(part):
            worst = np.maximum(worst, np.abs(run(half, **inputs) - run(exact, **inputs)).max())
    return float(worst)


@pytest.mark.parametrize(
    ("model", "break_it", "limit"), [("restormer", overflow_in_restormer, 5e-3), ("trocr", overflow_in_trocr, 0.1)]
)
def test_guilty_node_of_a_model_is_found_and_kept(copied, model, break_it, limit):
    guilty, folder = break_it(copied), BuildFolder(copied, model)
    file = folder.path / "keep-fp32.txt"
    surgery = ("surgeon.py", model, "--precision", "fp16", *SMALLER[model], "--build-dir", copied)
    run_step(*surgery)
    assert not rounded_error(folder) <= limit

    done = run_step("compare.py", model, "--find-drift", "--build-dir", copied)
    assert done.returncode == 0, (done.stdout, done.stderr)
    names = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    assert 2 <= len(names) <= 4
    assert sum(guilty in name for name in names) == 1
    (first,) = (line for line in done.stdout.splitlines() if line.endswith("→ inf") and guilty in line)
    assert first == next(line for line in done.stdout.splitlines() if "→ inf" in line)
    assert f"{len(names)} of " in done.stdout
    (marked,) = (line for line in (folder.path / "drift.md").read_text().splitlines() if guilty in line)
    assert "**× inf**" in marked

    done = run_step(*surgery, "--keep-fp32", file)
    assert done.returncode == 0, done.stderr
    assert rounded_error(folder) <= limit
    patched = json.loads(folder.manifest_path.read_text())["patched"]["fp16"]
    assert sorted(name for part in patched.values() for name in part["keep_fp32"]) == sorted(names)
    done = run_step("compare.py", model, "--executors", "patched", "--precision", "fp16", "--build-dir", copied)
    assert done.returncode == 0, (done.stdout, done.stderr)

    file.write_text("\n".join(name for name in names if guilty not in name))
    run_step(*surgery, "--keep-fp32", file)
    assert not rounded_error(folder) <= limit


def test_model_that_fp16_does_not_harm(copied):
    done = run_step("compare.py", "trocr", "--find-drift", "--build-dir", copied)
    assert done.returncode == 0, done.stderr
    file = copied / "trocr" / "keep-fp32.txt"
    assert all(line.startswith("#") for line in file.read_text().splitlines())
    before = (copied / "trocr" / "step.fp16.onnx").read_bytes()
    done = run_step("surgeon.py", "trocr", "--precision", "fp16", "--keep-fp32", file, "--build-dir", copied)
    assert done.returncode == 0, done.stderr
    assert (copied / "trocr" / "step.fp16.onnx").read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# TensorRT's errors
# ---------------------------------------------------------------------------------------------------------------------


def all_marked(folder: BuildFolder, part: Part) -> tuple[list[str], Part, onnx.ModelProto]:
    """The tensors that an engine is to show, and the part and FP16 graph that it is built from."""
    done = grafted(folder, part, folder.manifest()["patched"]["fp16"][part.name]["without"])
    exact, half = (finish(done.typed(precision, ()), done.counts) for precision in ("fp32", "fp16"))
    names = [name for node in nodes_of(exact.graph) for name in node.outputs]
    return names, *marked(part, half, names)


@pytest.mark.parametrize("model", MODELS)
def test_marked_tensors_are_outputs(built, model):
    folder = BuildFolder(built, model)
    for part in folder.parts():
        names, shown, graph = all_marked(folder, part)
        plain = onnx.load(folder.onnx(part.name, "fp16"))
        outputs = [value.name for value in graph.graph.output]
        assert outputs == [tensor.name for tensor in shown.outputs]
        assert outputs[: len(part.outputs)] == [tensor.name for tensor in part.outputs]
        assert len(set(outputs)) == len(outputs)
        assert set(outputs) == {*names, *(tensor.name for tensor in part.outputs)}
        types = element_types(plain.graph)
        for value, tensor in zip(graph.graph.output, shown.outputs):
            half = types[value.name] == onnx.TensorProto.FLOAT16
            assert value.type.tensor_type.elem_type == types[value.name]
            assert tensor.internal is False
            assert len(part.outputs) > outputs.index(tensor.name) or tensor.dtype == ("float16" if half else "float32")
        session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        inputs = in_precision(part, folder.check_inputs(part)[0], "fp16")
        assert [value.dtype == np.float16 for value in session.run(names, inputs)] == [
            types[name] == onnx.TensorProto.FLOAT16 for name in names
        ]


def test_sizes_reach_to_the_input_sets():
    tensor = TensorSpec("x", "float32", ("batch", 3, "height"))
    part = Part("part", (tensor,), (tensor,), (Dim("batch", 1, (1, 8), 8), Dim("height", 64, (256,), 720)))
    sets = [{"x": np.zeros(shape, np.float32)} for shape in ((3, 3, 24), (2, 3, 80))]
    assert sized(part, sets, only=True).dims == (Dim("batch", 2, (3,), 3), Dim("height", 24, (80,), 80))
    assert sized(part, sets, only=False).dims == (Dim("batch", 1, (1, 8), 8), Dim("height", 24, (256,), 720))


@pytest.mark.parametrize("model", MODELS)
def test_tensorrt_takes_all_tensors_as_outputs(built, tmp_path, model):
    pytest.importorskip("tensorrt_rtx")
    tensorrt = find_tensorrt()
    if not tensorrt.builds_without_gpu:
        pytest.skip("TensorRT-RTX only where it needs no GPU")
    folder, source = BuildFolder(built, model), tmp_path / "marked.onnx"
    for part in folder.parts():
        _, shown, graph = all_marked(folder, part)
        onnx.save(graph, source)
        shown = sized(shown, folder.check_inputs(part), only=True)
        assert build(tensorrt, shown, source, "fp16", ["8.9"], tmp_path / "timings")


def test_errors_of_another_executor():
    """It overflows where the trial does not, and the other way round."""
    half = OVERFLOW.model("fp16")
    names = [name for node in nodes_of(OVERFLOW.exact.graph) for name in node.outputs]
    values = {name: run(OVERFLOW.model("fp32"), x=X) for name in names[-1:]}
    values.update((name, np.full((1, 8), np.inf if name == names[2] else 1.0, np.float16)) for name in names[:-1])
    theirs = tensor_errors("chain", OVERFLOW.exact, half, [{"x": X}], lambda group, index: [values[n] for n in group])
    assert np.isfinite([one.error for one in theirs]).tolist() == [True, True, False, True]
    assert theirs[-1].error == 0
    assert theirs[3].before == np.inf
    built_with = {"tensorrt": "TensorRT 0", "gpu": "a GPU", "plugins": None}
    lines = markdown(OVERFLOW.errors(), "Chain", theirs[1:], built_with).splitlines()
    assert sum("TensorRT 0 on a GPU, without the plugin library" in line for line in lines) == 1
    cells = [line.split(" | ")[-1] for line in lines if "<code>Mul-" in line]
    assert cells[0] == " |"  # not among theirs
    assert cells[2].startswith("inf **× ")
    assert cells[3] == "0 |"
    assert "TensorRT" not in markdown(OVERFLOW.errors(), "Chain")


WORKER = f"""#!{sys.executable}
import sys
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, {str(ROOT)!r})
from infer_trt import OnnxRuntimeExecutor
from models import engines
from models.chain import BuildFolder
def build_all(folder, *_):
    if [part.name for part in folder.parts()] == ["prefill"]:
        print("[11/22/2026-12:00:00] [TRT] [E] 10: no kernel", flush=True)
        print("[11/22/2026-12:00:00] [TRT] [E] 2: no kernel either", flush=True)
        sys.exit("out of luck")
    return dict(tensorrt="TensorRT 0", gpu="a GPU", plugins="1f")
engines.build_all = build_all
engines.TensorRTExecutor = type("Executor", (OnnxRuntimeExecutor,), dict(calls=dict()))
engines.find_tensorrt = lambda: SimpleNamespace(builds_without_gpu=False)
engines.plugins.load_library = lambda: None
assert sys.argv[-2:] == ["--engine-worker", "run"], sys.argv
engines.serve(BuildFolder(Path(sys.argv[sys.argv.index("--build-dir") + 1]), sys.argv[2]), sys.argv[-1])
"""


@pytest.fixture
def searched(copied: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], int]:
    """`compare.py MODEL --find-drift` where a script is what a TensorRT interpreter would be."""

    def search(model: str, worker: str) -> int:
        folder = BuildFolder(copied, model)
        python = copied / "python"
        python.write_text(worker)
        python.chmod(0o755)
        monkeypatch.setattr(compare, "gpu_name", lambda: "a GPU")
        monkeypatch.setattr(compare, "tensorrt_obstacle", lambda python: None)
        return compare.find_drift(folder, folder.spec.samples(folder.manifest()["settings"]), str(python))

    return search


def test_tensorrts_errors_stand_beside_the_trials(copied, searched, capsys):
    guilty = overflow_in_trocr(copied)
    assert searched("trocr", WORKER) == 0
    lines = capsys.readouterr().out.splitlines()
    (failed,) = (line for line in lines if "out of luck" in line)
    assert failed == "TensorRT does not run prefill with all tensors as outputs: out of luck; 10: no kernel"
    begin = next(index for index, line in enumerate(lines) if line.startswith("TensorRT 0: the error jumps at "))
    jumps = lines[begin + 1 : lines.index("searching for nodes to keep in FP32")]
    assert guilty in next(line for line in jumps if line.endswith("→ inf"))
    assert lines[-1].startswith("TensorRT with ")
    assert "(met: ≤ 0.1)" in lines[-1]

    rows = [line.split(" | ") for line in (copied / "trocr" / "drift.md").read_text().splitlines()]
    (header,) = (row for row in rows if row[0] == "| part")
    assert header[-1] == "TensorRT 0 |"
    (row,) = (row for row in rows if len(row) == len(header) and guilty in row[1])
    assert row[-1] == "inf **× inf** |"
    assert all((row[-1] == " |") == (row[0] == "| prefill") for row in rows if row[0].startswith(("| pre", "| enc")))
    assert not [path for path in (copied / "trocr").iterdir() if path.is_dir()]


def test_samples_judge_the_engines_too(searched, capsys):
    assert searched("restormer", WORKER) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("TensorRT with 0 nodes in FP32: PSNR dB against reference ")
    assert last.endswith("(met: ≥ 55)")


def test_search_goes_on_without_tensorrt(copied, searched, capsys):
    assert searched("trocr", f"#!{sys.executable}\nimport sys\nsys.exit('no pycuda')") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "without TensorRT: TensorRT cannot begin: no pycuda" in lines
    assert not any(line.startswith("TensorRT with") for line in lines)
    assert "Last column" not in (copied / "trocr" / "drift.md").read_text()
    assert (copied / "trocr" / "keep-fp32.txt").is_file()


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(gpu_name() is None, reason="no GPU")
def test_tensorrt_names_the_guilty_tensor(copied):
    guilty, folder = overflow_in_restormer(copied), BuildFolder(copied, "restormer")
    done = run_step("surgeon.py", "restormer", "--precision", "fp16", *SMALLER["restormer"], "--build-dir", copied)
    assert done.returncode == 0 or "FAILED" in done.stdout, done.stderr  # ONNX Runtimes differ in what they see
    python = os.environ.get("TRT_PYTHON", sys.executable)
    done = run_step("compare.py", "restormer", "--find-drift", "--build-dir", copied, "--trt-python", python)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    begin = next(index for index, line in enumerate(lines) if line.startswith("TensorRT") and "jumps at" in line)
    jumps = lines[begin + 1 : lines.index("searching for nodes to keep in FP32")]
    assert guilty in next(line for line in jumps if line.endswith("→ inf"))
    rows = [line.split(" | ") for line in (folder.path / "drift.md").read_text().splitlines()]
    rows = [row for row in rows if row[0] == "| network"]
    assert all(row[-1] != " |" for row in rows)  # each tensor has an error
    assert guilty in next(row[1] for row in rows if row[-1] == "inf **× inf** |")
    assert lines[-1].startswith("TensorRT with ")
    assert "failed" not in lines[-1], done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# What users get wrong
# ---------------------------------------------------------------------------------------------------------------------


def test_lists_of_nodes_that_do_not_fit(refused, copied, tmp_path):
    file = tmp_path / "keep.txt"
    graph = onnx.load(copied / "trocr" / "encoder.fp32.onnx").graph
    file.write_text(f"# comment\n{graph.node[1].name}  # fine\n\nnone/such\nnor/this\n")
    arguments = ("surgeon.py", "trocr", "--build-dir", copied, "--keep-fp32", file)
    before = (copied / "trocr" / "encoder.fp16.onnx").read_bytes()
    assert f"{file}, line 4: the patched graphs have no node none/such" in refused(*arguments, "--precision", "fp16")
    assert "--precision fp16" in refused(*arguments)
    file.write_bytes(b"\xff\xfe\x00")
    assert f"{file} is no list of nodes" in refused(*arguments, "--precision", "fp16")
    file.unlink()
    assert str(file) in refused(*arguments, "--precision", "fp16")
    assert (copied / "trocr" / "encoder.fp16.onnx").read_bytes() == before


def test_search_wants_patched_graphs(refused, copied):
    (copied / "trocr" / "step.fp16.onnx").unlink()
    message = refused("compare.py", "trocr", "--find-drift", "--build-dir", copied)
    assert "run `python surgeon.py trocr --precision fp16" in message
