"""What execution and comparison decide without a GPU: profiles, executors' labels, whose work a layer does."""

from __future__ import annotations

import json

import numpy as np
import pytest

from build_engine import capped
from compare import by_plugin, error_statistics, kind_and_precision, labels_of, random_inputs
from infer_trt import nearest
from models.chain import BuildFolder
from models.spec import Dim, Part, TensorSpec, Unusable

PART = Part(
    "step",
    (
        TensorSpec("input_ids", "int32", ("batch", 1)),
        TensorSpec("cache", "float32", ("batch", 4, "length"), internal=True),
    ),
    (TensorSpec("logits", "float32", ("batch", 9)),),
    (Dim("batch", 1, (1, 32), 32), Dim("length", 8, (64,), 512)),
    time_at=({"batch": 2, "length": 8, "input_ids": 5},),
)


def test_part_survives_json():
    assert Part.from_json(json.loads(json.dumps(PART.to_json()))) == PART


def test_profiles_repeat_the_last_optimum():
    assert PART.profiles() == [{"batch": 1, "length": 64}, {"batch": 32, "length": 64}]
    assert Part("fixed", (), (), ()).profiles() == [{}]


@pytest.mark.parametrize(("batch", "profile"), [(1, 0), (2, 0), (5, 0), (6, 1), (31, 1), (32, 1)])
def test_nearest_profile(batch, profile):
    sizes = PART.sizes_of({"input_ids": (batch, 1), "cache": (batch, 4, 24)})
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
    times = {
        "net.0/Norm_11": 1.0,
        "Reformatting CopyNode for Input Tensor 0 to net.0/Norm_1": 2.0,
        "net.1/add_2 + net.1/relu": 3.0,
        "{ForeignNode[net.1/add_3...net.9/add_4]}": 4.0,
        "net.0/Norm_111": 5.0,
        "shape": 6.0,
    }
    assert by_plugin(times, owners) == {("norm", "net"): 3.0, ("gate", "net"): 7.0, ("other layers", ""): 11.0}


def test_random_inputs_have_the_sizes_and_integers_asked_for():
    ((name, inputs),) = random_inputs(PART, PART.limits())
    assert name == "step, batch 2, length 8"
    assert inputs["input_ids"].tolist() == [[5], [5]]
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


def test_errors_keep_nan():
    assert np.isnan(error_statistics(np.ones(3), np.array([1, np.nan, 1]))["abs max"])


def test_surgery_says_what_runs_in_place_and_whose_work_nodes_do(built):
    patched = json.loads((built / "trocr" / "manifest.json").read_text())["patched"]["fp16"]
    layers = range(2)
    assert patched["step"]["in_place"] == {
        f"present_{kind}_{layer}": f"self_{kind}_{layer}" for layer in layers for kind in ("key", "value")
    }
    assert patched["encoder"]["in_place"] == {}
    assert sorted(set(patched["step"]["owners"].values())) == sorted(patched["step"]["plugins"])
    assert len(patched["step"]["owners"]) == sum(patched["step"]["plugins"].values())
