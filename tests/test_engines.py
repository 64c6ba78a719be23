"""Every plugin as an engine of one node, built and run by the chain's own scripts; and both models' engines.

TensorRT may live in another interpreter than PyTorch: TRT_PYTHON names it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import plugins
from build_engine import gpu_name
from export_onnx import OPSET
from models.chain import BuildFolder
from models.spec import Dim, Part, TensorSpec
from tests.conftest import MODELS, ROOT, run_step

PYTHON = os.environ.get("TRT_PYTHON", sys.executable)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(gpu_name() is None, reason="no GPU")]

# As in plugins/kernels.py: FP32 sums in another order, FP16 results rounded another way.
TOLERANCE = {"fp32": 2e-5, "fp16": 2e-3}


BEAMS = 4

# integer inputs and outputs, and what they are smaller than; 0 stands for the length
STATE = {"sequences": 100, "position": 0, "finished": 2, "ancestors": BEAMS, "hypotheses": 100, "lengths": 0}
INTEGERS = {**STATE, **{f"next_{name}": bound for name, bound in STATE.items()}}
# what is FP32 in every precision
SCORES = ("scores", "hypothesis_scores", "next_scores", "next_hypothesis_scores")


@dataclass(frozen=True)
class Case:
    """A node of a plugin's operator, and the sizes at which its engine runs.

    inputs, outputs  name → shape, in sizes and names of dims; integers where the name is one of INTEGERS
    weights          name → shape of constants, or integers
    order            of the node's inputs: first inputs, then weights, unless it is given
    sizes            of all dims; the first is what the engine is tuned for
    """

    plugin: str
    inputs: Mapping[str, Sequence[int | str]]
    weights: Mapping[str, Sequence[int] | np.ndarray]
    outputs: Mapping[str, Sequence[int | str]]
    sizes: Sequence[Mapping[str, int]]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    order: Sequence[str] = ()

    @property
    def names(self) -> list[str]:
        """Of the node's inputs, in its order."""
        return list(self.order or (*self.inputs, *self.weights))

    @property
    def part(self) -> Part:
        def tensors(shapes: Mapping[str, Sequence[int | str]]) -> tuple[TensorSpec, ...]:
            return tuple(
                TensorSpec(
                    name,
                    "int32" if name in INTEGERS else "float32",
                    tuple(shape),
                    internal=name not in INTEGERS and name not in SCORES,
                    chosen=name in SCORES,
                )
                for name, shape in shapes.items()
            )

        dims = tuple(
            Dim(name, min(values), (values[0],), max(values))
            for name in self.sizes[0]
            for values in [[sizes[name] for sizes in self.sizes]]
        )
        return Part(self.plugin, tensors(self.inputs), tensors(self.outputs), dims, {self.plugin: 1})

    def model(self, precision: str, random: np.random.Generator) -> onnx.ModelProto:
        dtype = np.dtype(np.float16 if precision == "fp16" else np.float32)
        plugin = plugins.find(self.plugin)
        node = helper.make_node(
            plugin.op,
            self.names,
            list(self.outputs),
            domain=plugins.DOMAIN,
            plugin_version=plugins.VERSION,
            plugin_namespace=plugins.DOMAIN,
            **self.attributes,
        )
        values = {
            tensor.name: helper.make_tensor_value_info(
                tensor.name,
                helper.np_dtype_to_tensor_dtype(dtype if tensor.internal else np.dtype(tensor.dtype)),
                tensor.shape,
            )
            for tensor in (*self.part.inputs, *self.part.outputs)
        }
        graph = helper.make_graph(
            [node],
            self.plugin,
            [values[name] for name in self.inputs],
            [values[name] for name in self.outputs],
            [
                numpy_helper.from_array(
                    shape if isinstance(shape, np.ndarray) else weight(shape, random).astype(dtype), name
                )
                for name, shape in self.weights.items()
            ],
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(plugins.DOMAIN, 1)]
        return helper.make_model(graph, functions=[plugin.function], opset_imports=opsets, ir_version=8)

    def input_sets(self, random: np.random.Generator) -> list[dict[str, np.ndarray]]:
        """Two for each of the sizes: the second one meets a CUDA graph."""
        return [
            {
                tensor.name: random.standard_normal(tensor.sizes(sizes), np.float32)
                if tensor.is_float
                else random.integers(0, INTEGERS[tensor.name] or sizes["length"], tensor.sizes(sizes), np.int32)
                for tensor in self.part.inputs
            }
            for sizes in self.sizes
            for _ in range(2)
        ]


def weight(shape: Sequence[int], random: np.random.Generator) -> np.ndarray:
    """Factors and offsets near 1; matrices whose products are as large as what they multiply."""
    inputs = int(np.prod(shape[1:]))
    return random.uniform(0.5, 1.5, shape) if inputs == 1 else random.standard_normal(shape) / np.sqrt(inputs)


IMAGES = [
    dict(batch=batch, height=height, width=width)
    for batch, height, width in ((2, 24, 40), (1, 4, 2), (32, 8, 8), (3, 26, 22))
]
ROWS = [dict(batch=batch, length=length) for batch, length in ((16, 64), (1, 8), (32, 24), (3, 40), (64, 17), (2, 512))]
CACHES = {f"{kind}_cache": ("batch", 8, "length", 64) for kind in ("key", "value")}
PRESENT = {f"present_{kind}": ("batch", 8, "length", 64) for kind in ("key", "value")}
TOKEN = ("batch", 1, 512)
ROW_TOKEN = ("rows", 1, 512)
BEAM_ROWS = [
    dict(batch=batch, rows=BEAMS * batch, length=length) for batch, length in ((4, 64), (1, 8), (8, 24), (3, 40))
]
BEAM_CACHES = {name: ("batch", BEAMS * 8, "length", 64) for name in CACHES}
BEAM_PRESENT = {name: ("batch", BEAMS * 8, "length", 64) for name in PRESENT}
BEAM_TABLE = ("batch", BEAMS, "length")
BEAM_STATE = {
    "sequences": BEAM_TABLE,
    "scores": ("batch", BEAMS),
    "ancestors": BEAM_TABLE,
    "hypotheses": BEAM_TABLE,
    "lengths": ("batch", BEAMS),
    "hypothesis_scores": ("batch", BEAMS),
    "position": (1,),
    "finished": ("batch",),
}
TOKENS = ("batch", "length", 384)
IMAGE_48 = ("batch", 48, "height", "width")
IMAGE_96 = ("batch", 96, "height", "width")

CASES = [
    Case(
        "channel_layer_norm",
        {"x": IMAGE_48},
        {"weight": [48], "bias": [48]},
        {"y": IMAGE_48},
        IMAGES,
        dict(epsilon=1e-5, subtract_mean=1),
    ),
    Case(
        "transposed_attention",
        {"qkv": ("batch", 288, "height", "width")},
        {"temperature": [2, 1, 1]},
        {"y": IMAGE_96},
        IMAGES,
    ),
    Case(
        "depthwise_conv",
        {"x": IMAGE_48},
        {"weight": [48, 1, 3, 3], "bias": [48]},
        {"y": IMAGE_48},
        IMAGES,
        dict(channels=48),
    ),
    Case(
        "gated_depthwise_conv",
        {"x": IMAGE_48},
        {"weight": [48, 1, 3, 3], "bias": [48]},
        {"y": ("batch", 24, "height", "width")},
        IMAGES,
        dict(channels=48),
    ),
    Case(
        "norm_pointwise_conv",
        {"x": IMAGE_48},
        {"norm_weight": [48], "norm_bias": [48], "weight": [144, 48, 1, 1], "bias": [144]},
        {"y": ("batch", 144, "height", "width")},
        IMAGES,
        dict(epsilon=1e-5, subtract_mean=1),
    ),
    Case(
        "pointwise_conv_residual",
        {"x": ("batch", 128, "height", "width"), "residual": IMAGE_48},
        {"weight": [48, 128, 1, 1], "bias": [48]},
        {"y": IMAGE_48},
        IMAGES,
        order=("x", "weight", "bias", "residual"),
    ),
    Case(
        "transposed_attention_residual",
        {"qkv": ("batch", 288, "height", "width"), "residual": IMAGE_96},
        {"temperature": [2, 1, 1], "weight": [96, 96, 1, 1], "bias": [96]},
        {"y": IMAGE_96},
        IMAGES,
        order=("qkv", "temperature", "weight", "bias", "residual"),
    ),
    Case(
        "gated_feed_forward",
        {"x": IMAGE_48},
        {
            "norm_weight": [48],
            "norm_bias": [48],
            "project_in": [256, 48, 1, 1],
            "project_in_bias": [256],
            "depthwise": [256, 1, 3, 3],
            "depthwise_bias": [256],
            "project_out": [48, 128, 1, 1],
            "project_out_bias": [48],
        },
        {"y": IMAGE_48},
        IMAGES,
        dict(epsilon=1e-5, subtract_mean=1, channels=256),
    ),
    Case(
        "transposed_attention_block",
        {"x": IMAGE_96},
        {
            "norm_weight": [96],
            "norm_bias": [96],
            "qkv_weight": [288, 96, 1, 1],
            "qkv_bias": [288],
            "depthwise_weight": [288, 1, 3, 3],
            "depthwise_bias": [288],
            "temperature": [2, 1, 1],
            "weight": [96, 96, 1, 1],
            "bias": [96],
        },
        {"y": IMAGE_96},
        IMAGES,
        dict(epsilon=1e-5, subtract_mean=1, channels=288),
    ),
    Case(
        "pixel_unshuffle",
        {"x": ("batch", 3, 24, 40)},
        {},
        {"y": ("batch", 12, 12, 20)},
        [dict(batch=batch) for batch in (2, 1, 32)],
        dict(factor=2),
    ),
    Case(
        "pixel_shuffle",
        {"x": ("batch", 12, 12, 20)},
        {},
        {"y": ("batch", 3, 24, 40)},
        [dict(batch=batch) for batch in (2, 1, 32)],
        dict(factor=2),
    ),
    Case(
        "residual_layer_norm",
        {"x": TOKENS, "residual": TOKENS},
        {"weight": [384], "bias": [384]},
        {"sum": TOKENS, "y": TOKENS},
        ROWS,
        dict(epsilon=1e-6),
    ),
    Case("encoder_attention", dict.fromkeys("qkv", TOKENS), {}, {"y": TOKENS}, ROWS, dict(heads=6, scale=0.125)),
    Case(
        "linear",
        {"x": TOKENS},
        {"weight": [640, 384], "bias": [640]},
        {"y": ("batch", "length", 640)},
        ROWS,
        dict(activation=1),
    ),
    Case(
        "token_embedding",
        {"sequences": (1, "batch", "length"), "position": (1,)},  # beams of one image
        {"tokens": [100, 512], "positions": [512, 512]},
        {"y": TOKEN},
        ROWS,
        dict(scale=22.6),
        order=("tokens", "positions", "sequences", "position"),
    ),
    Case("split_heads", {"x": TOKENS}, {}, {"y": ("batch", 6, "length", 64)}, ROWS, dict(heads=6)),
    Case(
        "cached_self_attention",
        {**dict.fromkeys(("query", "key", "value"), TOKEN), **CACHES, "position": (1,)},
        {},
        {"y": TOKEN, **PRESENT},
        ROWS,
        dict(scale=0.125),
    ),
    Case(
        "beam_self_attention",
        {
            **dict.fromkeys(("query", "key", "value"), ROW_TOKEN),
            **BEAM_CACHES,
            "ancestors": BEAM_TABLE,
            "position": (1,),
        },
        {},
        {"y": ROW_TOKEN, **BEAM_PRESENT},
        BEAM_ROWS,
        dict(scale=0.125),
    ),
    Case(
        "cross_attention",
        {"query": ROW_TOKEN, "key": ("batch", 8, "length", 64), "value": ("batch", 8, "length", 64)},
        {},
        {"y": ROW_TOKEN},
        [
            *BEAM_ROWS,
            dict(batch=1, rows=1, length=24),
            dict(batch=16, rows=16, length=64),
            dict(batch=2, rows=6, length=8),
        ],
        dict(scale=0.125),
    ),
    Case(
        "layer_norm_linear",
        {"x": TOKEN},
        {"gamma": [512], "beta": [512], "weight": [1100, 512], "bias": [1100]},
        {"h": TOKEN, "y": ("batch", 1, 1100)},
        [dict(batch=batch) for batch in (16, 1, 32, 3, 64)],
        dict(epsilon=1e-5, activation=1),
    ),
    Case(
        "layer_norm_qkv",
        {"x": TOKEN},
        {"gamma": [512], "beta": [512], "weight": [1536, 512], "bias": [1536]},
        {"h": TOKEN, "y0": TOKEN, "y1": TOKEN, "y2": TOKEN},
        [dict(batch=batch) for batch in (16, 1, 32, 3, 64)],
        dict(epsilon=1e-5),
    ),
    Case(
        "linear_residual",
        {"x": ("batch", 1, 2048), "residual": TOKEN},
        {"weight": [512, 2048], "bias": [512]},
        {"y": TOKEN},
        [dict(batch=batch) for batch in (16, 1, 32, 3, 64)],
        order=("x", "weight", "bias", "residual"),
    ),
    Case(
        "greedy_choice",
        {"logits": ("batch", 5000), "sequences": ("batch", "length"), "position": (1,), "finished": ("batch",)},
        {
            "allowed_from": np.arange(5000, dtype=np.int32) % 50,
            "forced": np.array([7, -1, -1, 9, -1], np.int32),
            "ends": np.array([2, 7], np.int32),
        },
        {"next_sequences": ("batch", "length"), "next_position": (1,), "next_finished": ("batch",)},
        ROWS,
        dict(pad=1),
    ),
    Case(
        "beam_choice",
        {"logits": ("batch", BEAMS, 5000), **BEAM_STATE},
        {
            "allowed_from": np.arange(5000, dtype=np.int32) % 50,
            "forced": np.array([7, -1, -1, 9, -1], np.int32),
            "ends": np.array([2, 7], np.int32),
            "penalties": np.arange(1, 65, dtype=np.float32),
            "hopes": np.arange(1, 65, dtype=np.float32) ** 2,
        },
        {f"next_{name}": shape for name, shape in BEAM_STATE.items()},
        [dict(batch=sizes["batch"], length=sizes["length"]) for sizes in BEAM_ROWS],
        dict(max_length=100, stop_when_full=1),
    ),
]


def run_with_tensorrt(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PYTHON, *map(str, arguments)], cwd=ROOT, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True
    )


def written(cases: Sequence[Case], build_dir: Path) -> BuildFolder:
    """A build folder as surgeon.py would leave it, with a part for each case."""
    folder = BuildFolder(build_dir, "trocr")
    patched: dict[str, Any] = {precision: {} for precision in TOLERANCE}
    random = np.random.default_rng(0)
    for case in cases:
        folder.write_check_inputs(case.part, case.input_sets(random))
        in_place = {
            list(case.outputs)[output]: case.names[source]
            for output, source in plugins.find(case.plugin).in_place.items()
        }
        for precision in TOLERANCE:
            onnx.save(case.model(precision, random), folder.onnx(case.plugin, precision))
            patched[precision][case.plugin] = {"in_place": in_place}
    folder.write_manifest({"parts": [case.part.to_json() for case in cases], "settings": {}, "patched": patched})
    return folder


@pytest.fixture(scope="module", params=list(TOLERANCE))
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[BuildFolder, str]:
    """All cases in one precision, built and run."""
    folder, precision = written(CASES, tmp_path_factory.mktemp("engines")), request.param
    for command in (
        ("build_engine.py", "trocr", "--precision", precision, "--build-dir", folder.path.parent),
        ("-m", "tests.run_engines", folder.path.parent, "trocr", precision),
    ):
        done = run_with_tensorrt(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder, precision


def test_every_plugin_has_a_case():
    assert sorted(case.plugin for case in CASES) == plugins.names()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.plugin)
def test_engine_computes_what_the_function_says(ran, case):
    """Dynamic shapes, batch 1 to 64, with and without a CUDA graph, several contexts of one engine."""
    folder, precision = ran
    session = onnxruntime.InferenceSession(folder.onnx(case.plugin, precision), providers=["CPUExecutionProvider"])
    dtype = np.float16 if precision == "fp16" else np.float32
    outputs = np.load(folder.path / f"{case.plugin}.{precision}.outputs.npz")
    for number, inputs in enumerate(folder.check_inputs(case.part)):
        internal = {tensor.name for tensor in case.part.inputs if tensor.internal}
        typed = {name: values.astype(dtype) if name in internal else values for name, values in inputs.items()}
        for name, expected in zip(case.outputs, session.run(list(case.outputs), typed)):
            first, second = (outputs[f"{turn}/{number}/{name}"] for turn in range(2))
            assert first.shape == expected.shape
            scale = max(1.0, float(np.abs(expected.astype(np.float32)).max()))
            error = np.abs(first.astype(np.float32) - expected.astype(np.float32)).max()
            tolerance = 0 if name in INTEGERS else TOLERANCE[precision]
            assert error <= tolerance * scale, (name, number, error)  # NaN fails too
            np.testing.assert_array_equal(first, second)


# ---------------------------------------------------------------------------------------------------------------------
# What plugins refuse
# ---------------------------------------------------------------------------------------------------------------------

NORM = CASES[0]


@pytest.mark.parametrize(
    ("attributes", "weights", "x_type", "message"),
    [
        (NORM.attributes, {"weight": [47], "bias": [48]}, None, "ChannelLayerNorm: weight and bias must be (C)"),
        ({"epsilon": 1e-5}, NORM.weights, None, "ChannelLayerNorm: attribute subtract_mean is missing"),
        (
            {"epsilon": 1, "subtract_mean": 1},
            NORM.weights,
            None,
            "ChannelLayerNorm: attribute epsilon is missing or of",
        ),
        (NORM.attributes, NORM.weights, onnx.TensorProto.INT32, "INT32"),
    ],
    ids=["shape", "missing attribute", "attribute of another type", "input of another type"],
)
def test_refusal_is_in_tensorrts_log(tmp_path, attributes, weights, x_type, message):
    case = Case(NORM.plugin, NORM.inputs, weights, NORM.outputs, NORM.sizes, attributes)
    folder = written([case], tmp_path)
    path = folder.onnx(case.plugin, "fp32")
    model = onnx.load(path)
    if x_type is not None:
        model.graph.input[0].type.tensor_type.elem_type = x_type
    onnx.save(model, path)
    done = run_with_tensorrt("build_engine.py", "trocr", "--build-dir", tmp_path)
    assert done.returncode == 2
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


LOAD = """
import sys, ctypes
import tensorrt as trt
import plugins
logger = trt.Logger(trt.Logger.ERROR)
registry = trt.get_plugin_registry()
path = str(plugins.library_path())
for how in sys.argv[1:]:
    if how == "static":
        ctypes.CDLL(path)
    else:
        handle = registry.load_library(path)
        if how == "twice" and handle is not None:
            registry.deregister_library(handle)
            registry.load_library(path)
creators = registry.plugin_creator_list if hasattr(registry, "plugin_creator_list") else registry.all_creators
names = [creator.name for creator in creators if creator.plugin_namespace == "trt_graft"]
print(sorted(set(names)))
"""


@pytest.mark.parametrize(
    "how", [["static"], ["dynamic"], ["static", "dynamic"], ["dynamic", "static"], ["twice"]], ids="+".join
)
def test_library_loads_in_every_way(how):
    """Statically, as ctypes and trtexec's --staticPlugins do, and through the registry, as --dynamicPlugins does."""
    done = run_with_tensorrt("-c", LOAD, *how)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(sorted(plugins.find(name).op for name in plugins.names()))
    assert "already" not in done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Both models
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_models_meet_their_bars(built, model):
    """The demo variants' engines against PyTorch FP32, at the models' bars."""
    for precision in TOLERANCE:
        done = run_with_tensorrt("build_engine.py", model, "--precision", precision, "--build-dir", built)
        assert done.returncode == 0, done.stderr
    done = run_step(
        "compare.py", model, "--build-dir", built, "--executors", "pytorch", "tensorrt", "--trt-python", PYTHON
    )
    assert done.returncode == 0, done.stdout + done.stderr
