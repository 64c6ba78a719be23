"""What execution and comparison decide without a GPU: profiles, executors' labels, whose work a layer does."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch

import compare
import infer_trt
import plugins
import surgeon
from build_engine import TensorRT, capped
from compare import by_plugin, error_statistics, kind_and_precision, labels_of, random_inputs
from infer_trt import nearest
from models.chain import BuildFolder
from models.report import layer_table
from models.spec import Dim, Part, TensorSpec, Unusable

PART = Part(
    "step",
    (
        TensorSpec("sequences", "int32", ("batch", "length")),
        TensorSpec("cache", "float32", ("batch", 4, "length"), internal=True),
    ),
    (TensorSpec("logits", "float32", ("batch", 9)),),
    (Dim("batch", 1, (1, 32), 32), Dim("length", 8, (64,), 512)),
    time_at=({"batch": 2, "length": 8, "sequences": 5},),
)


def test_part_survives_json():
    assert Part.from_json(json.loads(json.dumps(PART.to_json()))) == PART


def test_profiles_repeat_the_last_optimum():
    assert PART.profiles() == [{"batch": 1, "length": 64}, {"batch": 32, "length": 64}]
    assert Part("fixed", (), (), ()).profiles() == [{}]


@pytest.mark.parametrize(("batch", "profile"), [(1, 0), (2, 0), (5, 0), (6, 1), (31, 1), (32, 1)])
def test_nearest_profile(batch, profile):
    sizes = PART.sizes_of({"sequences": (batch, 24), "cache": (batch, 4, 24)})
    assert sizes == {"batch": batch, "length": 24}
    assert nearest(PART.profiles(), sizes) == profile


def test_labels():
    kinds = ["pytorch", "torch.compile", "onnxruntime", "patched", "tensorrt"]
    assert labels_of(kinds, ["fp32", "fp16"], on_gpu=False, baseline=None) == [
        *("pytorch", "torch.compile", "onnxruntime"),
        *("patched fp32", "patched fp16", "tensorrt fp32", "tensorrt fp16"),
    ]
    assert labels_of(["torch.compile", "tensorrt"], ["fp16"], on_gpu=True, baseline=None) == [
        *("pytorch", "torch.compile fp16", "tensorrt fp16"),
    ]
    assert labels_of(["pytorch"], ["fp32", "fp16"], on_gpu=True, baseline=None) == ["pytorch", "pytorch fp16"]


def test_baseline_is_compared_in_the_precisions_that_it_was_built_in(copied):
    baseline = BuildFolder(copied, "trocr")
    for part in baseline.parts():
        baseline.engine(part.name, "fp16").touch()
    labels = labels_of(["pytorch"], ["fp32", "fp16"], on_gpu=False, baseline=baseline)
    assert labels == ["pytorch", "tensorrt fp16 without plugins"]
    assert kind_and_precision(labels[-1]) == ("tensorrt", "fp16")


def test_baseline_without_engines(refused, built):
    line = refused("compare.py", "trocr", "--build-dir", built, "--executors", "pytorch", "--baseline", built)
    assert "has no engines: run `python build_engine.py trocr" in line


def test_kind_and_precision():
    assert kind_and_precision("pytorch") == ("pytorch", "fp32")
    assert kind_and_precision("torch.compile fp16") == ("torch.compile", "fp16")


def test_layers_are_counted_for_the_plugin_whose_nodes_they_name():
    owners = {"net.0/Norm_1": "norm", "net.0/Norm_11": "norm", "net.1/add_2": "gate", "net.1/add_3": "gate"}
    owners["Gate_view.15"] = "gate"  # came from no module
    times = {
        "net.0/Norm_11": 1.0,
        "Reformatting CopyNode for Input Tensor 0 to net.0/Norm_1": 2.0,
        "net.1/add_2 + net.1/relu": 3.0,
        "{ForeignNode[net.1/add_3...net.9/add_4]}": 4.0,
        "net.0/Norm_111": 5.0,
        "shape": 6.0,
        "Gate_view.15": 7.0,
    }
    assert by_plugin(times, owners) == {
        ("norm", "net"): 3.0,
        ("gate", "net"): 7.0,
        ("gate", ""): 7.0,
        ("other layers", ""): 11.0,
    }


def test_layer_times_at_every_size_and_by_module_at_the_first():
    """By module only where a part has several."""
    layers = [
        ["net, batch 1", "norm", "up", 1.0],
        ["net, batch 1", "norm", "down", 2.0],
        ["net, batch 1", "other layers", "", 4.0],
        ["net, batch 8", "norm", "up", 8.0],
        ["net, batch 8", "norm", "down", 16.0],
        ["step, batch 1", "attention", "", 32.0],
        ["step, batch 1", "norm", "decoder", 64.0],
        ["step, batch 1", "norm", "", 128.0],
    ]
    rows = {"a": {"layer_ms": layers}, "b": {"layer_ms": layers[2:3]}, "c": {"layer_ms": []}}
    cells = [line for line in layer_table(rows) if line.startswith("| ")]
    assert cells == [
        "| part | plugin | a | b |",
        "| --- | --- | --- | --- |",
        "| net, batch 1 | norm | 3 |  |",
        "| net, batch 1 | other layers | 4 | 4 |",
        "| net, batch 8 | norm | 24 |  |",
        "| step, batch 1 | attention | 32 |  |",
        "| step, batch 1 | norm | 192 |  |",
        "| part | plugin | module | a | b |",
        "| --- | --- | --- | --- | --- |",
        "| net | norm | down | 2 |  |",
        "| net | norm | up | 1 |  |",
        "| net | other layers | elsewhere | 4 | 4 |",
    ]
    assert layer_table({"c": rows["c"]}) == []


def test_the_machine_is_one_line(monkeypatch, tmp_path):
    """It names the GPU that is used, however many nvidia-smi lists."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 1.2.3\necho 1.2.3\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(compare, "gpu_name", lambda: "the second GPU")
    assert compare.machine().endswith(" cores; the second GPU, driver 1.2.3")
    tool.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compare.machine().endswith(" cores; the second GPU")
    monkeypatch.setattr(compare, "gpu_name", lambda: None)
    assert compare.machine().endswith(" cores; no GPU")


def test_random_inputs_have_the_sizes_and_integers_asked_for():
    ((name, inputs),) = random_inputs(PART, PART.limits())
    assert name == "step, batch 2, length 8"
    assert inputs["sequences"].tolist() == [[5] * 8] * 2
    assert inputs["cache"].shape == (2, 4, 8)
    assert inputs["cache"].std() > 0.2


def test_sizes_beyond_an_engine_are_not_timed():
    assert list(random_inputs(PART, {**PART.limits(), "batch": (1, 1)})) == []


def test_capped_part():
    part = capped(PART, {"batch": 1, "length": 4096})
    assert part.limits() == {"batch": (1, 1), "length": (8, 512)}
    assert part.profiles() == [{"batch": 1, "length": 64}]
    with pytest.raises(Unusable, match="length begins at 8"):
        capped(PART, {"length": 4})


@pytest.mark.parametrize("made", [None, TypeError("pybind11::init(): factory function returned nullptr")])
def test_tensorrt_that_cannot_use_the_gpu(made):
    """As where the driver is older than CUDA wants it."""

    def builder(logger):
        if made:
            raise made

    tensorrt = TensorRT(SimpleNamespace(Builder=builder, __version__="11.2"), "TensorRT", builds_without_gpu=False)
    with pytest.raises(Unusable, match="TensorRT 11.2 cannot start here: is a GPU there, and its driver new enough?"):
        tensorrt.started("Builder", None)


@pytest.mark.parametrize(("each_size", "graphs"), [(False, 2), (True, 3)])
def test_compiled_parts_are_those_of_pytorch_at_every_size(each_size, graphs):
    part = Part(
        "linear", (TensorSpec("x", "float32", ("batch", 4)),), (TensorSpec("y", "float32", ("batch", 4), True),), ()
    )
    module = torch.nn.Linear(4, 4)
    loaded = SimpleNamespace(parts=[SimpleNamespace(part=part, module=module)], to=module.to)
    executor = compare.TorchExecutor(loaded, "fp32", compiled=True)
    executor.compile(each_size)
    torch._dynamo.utils.counters.clear()
    for batch in (2, 3, 5):
        x = np.random.default_rng(batch).random((batch, 4), np.float32)
        kept = [executor.run("linear", {"x": x + offset})["y"] for offset in (0, 1)]
        assert len(executor.latencies("linear", {"x": x}, 2)) == 2
        for offset, y in enumerate(kept):
            torch.testing.assert_close(y, module(torch.from_numpy(x + offset)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_errors_keep_nan():
    assert np.isnan(error_statistics(np.ones(3), np.array([1, np.nan, 1]))["abs max"])


GREEDY_STATE = ("sequences", "position", "finished")
BEAM_STATE = (*GREEDY_STATE, "scores", "ancestors", "hypotheses", "lengths", "hypothesis_scores")


@pytest.mark.parametrize(("folder", "state"), [("built", GREEDY_STATE), ("built_beams", BEAM_STATE)])
def test_surgery_says_what_runs_in_place_and_whose_work_nodes_do(request, folder, state):
    built = request.getfixturevalue(folder)
    patched = json.loads((built / "trocr" / "manifest.json").read_text())["patched"]["fp16"]
    layers = range(2)
    assert patched["step"]["in_place"] == {
        **{f"present_{kind}_{layer}": f"self_{kind}_{layer}" for layer in layers for kind in ("key", "value")},
        **{f"next_{name}": name for name in state},
    }
    assert patched["encoder"]["in_place"] == {}
    grafted, owned = patched["step"]["plugins"], Counter(patched["step"]["owners"].values())
    assert {plugin: owned[plugin] for plugin in grafted} == grafted
    assert set(owned) - set(grafted) <= {
        name for name in plugins.names() if "fp16" not in plugins.find(name).default_in
    }


def test_beams_that_were_asked_for(built_beams):
    """The folder says so to those who load the weights again; the step takes fewer images, timed with beams."""
    folder = BuildFolder(built_beams, "trocr")
    manifest = folder.manifest()
    assert manifest["load_options"] == {"num_beams": 3}
    assert manifest["settings"]["generation"]["num_beams"] == 3
    step = next(part for part in folder.parts() if part.name == "step")
    assert step.limits()["batch"] == (1, 21)
    assert step.chosen == ["scores", "hypothesis_scores", "next_scores", "next_hypothesis_scores"]
    names = ["batch 1, beam 3, 20 tokens", "batch 8, beam 3, 20 tokens"]
    assert list(folder.spec.workloads(manifest["settings"])) == names
    assert list(folder.spec.load("demo", num_beams=3).workloads()) == names
    timed = [name for name, _ in random_inputs(step, step.limits())]
    assert timed[:2] == [f"step, batch {batch}, length 24, position 23" for batch in (1, 8)]


def test_a_timed_call_takes_all_its_steps(built_beams, monkeypatch):
    """Whatever ends before, so that executors do the same work."""
    folder = BuildFolder(built_beams, "trocr")
    executor, settings = infer_trt.OnnxRuntimeExecutor(folder, "fp32"), folder.manifest()["settings"]
    calls: Counter[str] = Counter()
    run = executor.run
    monkeypatch.setattr(executor, "run", lambda part, inputs: calls.update([part]) or run(part, inputs))
    folder.spec.workloads(settings)["batch 1, beam 3, 20 tokens"](executor)
    assert calls == {"encoder": 1, "prefill": 1, "step": 20}


def test_surgery_finds_what_runs_in_place_only_where_nothing_reads_it_later():
    """A cache's other reader may want its size, or its values before the plugin's node runs, but not beside it."""
    plugin = plugins.find("cached_self_attention")
    for reader, taken in ((None, True), ("Shape", True), ("before", True), ("beside", False)):
        inputs = [gs.Variable(name, np.float32, (1, 1, 4)) for name in ("query", "key", "value")]
        caches = [gs.Variable(name, np.float32, (1, 1, 2, 4)) for name in ("key_cache", "value_cache")]
        position = gs.Variable("position", np.int32, (1,))
        outputs = [gs.Variable(name, np.float32, (1, 1, 2, 4)) for name in ("y", "present_key", "present_value")]
        query, other = inputs[0], gs.Variable("other", np.float32)
        nodes = []
        if reader:
            nodes.append(gs.Node("Shape" if reader == "Shape" else "ReduceMax", inputs=[caches[0]], outputs=[other]))
        if reader == "before":
            query = gs.Variable("sum", np.float32)
            nodes.append(gs.Node("Add", inputs=[inputs[0], other], outputs=[query]))
        given = [query, *inputs[1:], *caches, position]
        nodes.append(gs.Node(plugin.op, domain=plugins.DOMAIN, inputs=given, outputs=outputs))
        graph = gs.Graph(nodes, [*inputs, *caches, position], outputs)
        expected = {"present_value": "value_cache"}
        assert surgeon.in_place(graph) == ({"present_key": "key_cache", **expected} if taken else expected)
