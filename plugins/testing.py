"""What the plugins' tests share: one-node models, their run in ONNX Runtime, and small exported graphs."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import torch
from onnx import helper

import plugins
from export_onnx import OPSET, export
from models.spec import Dim, ExportablePart, Part, TensorSpec
from plugins.matching import Match
from surgeon import finish, graft

# The functions compute in FP32 and round once, to the type of the input: half a unit in the last place of a value near
# one, and some rounding of FP32 sums over up to a few hundred terms.
TOLERANCE = {np.dtype(np.float32): 2e-5, np.dtype(np.float16): 1e-3, np.dtype(np.int32): 0}


def one_node_model(
    plugin: plugins.Plugin, inputs: Mapping[str, np.ndarray], outputs: int, **attributes: Any
) -> onnx.ModelProto:
    """A model whose graph is a single node of the plugin's operator, with its function.

    An output that may take an input's memory is of its type, all others of the first input's.
    """
    arrays = list(inputs.values())
    node = helper.make_node(
        plugin.op,
        list(inputs),
        [f"out{index}" for index in range(outputs)],
        domain=plugins.DOMAIN,
        plugin_version=plugins.VERSION,
        plugin_namespace=plugins.DOMAIN,
        **attributes,
    )
    dtypes = [helper.np_dtype_to_tensor_dtype(array.dtype) for array in arrays]
    graph = helper.make_graph(
        [node],
        plugin.name,
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in inputs.items()
        ],
        [
            helper.make_tensor_value_info(f"out{index}", dtypes[plugin.in_place.get(index, 0)], None)
            for index in range(outputs)
        ],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(plugins.DOMAIN, 1)]
    return helper.make_model(graph, functions=[plugin.function], opset_imports=opsets, ir_version=8)


def run_function(
    plugin: plugins.Plugin, inputs: Mapping[str, np.ndarray], outputs: int = 1, **attributes: Any
) -> list[np.ndarray]:
    """The plugin's ONNX function in ONNX Runtime."""
    model = one_node_model(plugin, inputs, outputs, **attributes)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, dict(inputs))


def assert_close(actual: np.ndarray, expected: torch.Tensor | np.ndarray) -> None:
    """Equal shape and type, and equal values within TOLERANCE of the largest."""
    reference = expected.numpy() if isinstance(expected, torch.Tensor) else expected
    assert actual.shape == reference.shape
    assert actual.dtype == reference.dtype
    scale = max(1.0, float(np.abs(reference).max(initial=0)))
    np.testing.assert_allclose(
        actual.astype(np.float64), reference.astype(np.float64), rtol=0, atol=TOLERANCE[actual.dtype] * scale
    )


def export_graph(
    module: torch.nn.Module, shape: Sequence[int | str], example: Mapping[str, int], multiple_of: int = 1
) -> gs.Graph:
    """A one-input module as `export_onnx.py` writes it, with the named axes of `shape` dynamic."""
    names = [size for size in shape if isinstance(size, str)]
    dims = tuple(Dim(name, 1, (8,), 64, 1 if name == "batch" else multiple_of) for name in names)
    part = Part("part", (TensorSpec("x", "float32", tuple(shape)),), (TensorSpec("y", "float32", tuple(shape)),), dims)

    def inputs(sizes: Mapping[str, int], random: np.random.Generator) -> dict[str, np.ndarray]:
        return {"x": random.standard_normal(part.inputs[0].sizes(sizes), dtype=np.float32)}

    return gs.import_onnx(export(ExportablePart(part, module.eval(), inputs, example, ())))


@functools.cache
def trocr_part(name: str, num_beams: int = 1) -> tuple[ExportablePart, onnx.ModelProto]:
    """A part of the small TrOCR that `--weights demo` gives, with its exported graph."""
    from models.trocr.network import load

    exportable = next(exportable for exportable in load("demo", num_beams).parts if exportable.part.name == name)
    return exportable, export(exportable)


def assert_replaces_in_trocr(plugin: plugins.Plugin, part: str, num_beams: int = 1) -> Sequence[Match]:
    """Finds the plugin's pattern as often as the part says, replaces it, and compares with PyTorch; returns the matches
    as they were found."""
    exportable, model = trocr_part(part, num_beams)
    graph = gs.import_onnx(model)
    matches = plugin.pattern.matches(graph)
    assert len(matches) == exportable.part.plugins[plugin.name] > 0
    session = grafted(graph, plugin, matches)
    for seed, dims in enumerate(exportable.check_at):
        inputs = exportable.example(dims, np.random.default_rng(seed))
        with torch.inference_mode():
            expected = exportable.module(*(torch.from_numpy(values) for values in inputs.values()))
        for actual, reference in zip(session.run(None, inputs), expected):
            assert_close(actual, reference)
    return matches


def grafted(graph: gs.Graph, plugin: plugins.Plugin, matches: Sequence[Match]) -> onnxruntime.InferenceSession:
    """The graph with its matches replaced, ready to run."""
    for match in matches:
        graft(graph, plugin, match)
    model = finish(graph, [plugin.name])
    assert [node.op_type for node in model.graph.node].count(plugin.op) == len(matches)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
