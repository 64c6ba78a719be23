"""Step 1: export a model's parts from PyTorch to ONNX and check them against PyTorch.

    python export_onnx.py restormer                               the demo variant
    python export_onnx.py restormer --weights random              the published network, random weights
    python export_onnx.py restormer --weights deblurring.pth      one of the authors' checkpoints, any task
    python export_onnx.py trocr --weights microsoft/trocr-base-printed
    python export_onnx.py trocr --weights random:small
    python export_onnx.py trocr --num-beams 4                     beam search, whatever the generation settings say

Leaves build/<model>/<part>.onnx, opset 17 (the newest that TensorRT 8.6 reads), with named dynamic axes, and the
manifest.  Every part runs in ONNX Runtime at sizes that the exporter has not seen; the largest absolute error against
PyTorch is printed.  Exit status 1 when it is too large, 2 when the weights cannot be used.
"""

from __future__ import annotations

import inspect
import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import numpy as np
import onnx
from onnx import numpy_helper

from models.chain import BuildFolder, parser, replacing, run_script
from models.spec import ExportablePart, LoadedModel, Unusable

if TYPE_CHECKING:
    import torch

OPSET = 17
# Rounding differs between the two runtimes, so errors grow with the values: this much of the largest is accepted.
TOLERANCE = 1e-4


def export(exportable: ExportablePart) -> onnx.ModelProto:
    """Traces the part's module with the dynamo exporter and returns it as ONNX, opset 17."""
    import torch

    part = exportable.part
    example = exportable.example(exportable.trace_at, np.random.default_rng(0))
    dims = {
        dim.name: dim.multiple_of * torch.export.Dim(dim.name) if dim.multiple_of > 1 else torch.export.Dim(dim.name)
        for dim in part.dims
    }
    dynamic_axes = [
        {axis: dims[size] for axis, size in enumerate(tensor.shape) if isinstance(size, str)} for tensor in part.inputs
    ]
    # the exporter wants them nested as forward's parameters are: what *args takes is one tuple
    parameters = inspect.signature(exportable.module.forward).parameters.values()
    named = sum(parameter.kind is not inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
    rest = [tuple(dynamic_axes[named:])] if named < len(parameters) else []
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports every torchvision operator it cannot find
    with warnings.catch_warnings(), without_slow_rule():
        warnings.simplefilter("ignore")  # deprecations inside the exporter itself
        program = torch.onnx.export(
            exportable.module,
            tuple(torch.from_numpy(example[tensor.name]) for tensor in part.inputs),
            dynamo=True,
            opset_version=OPSET + 1,  # the exporter's oldest
            input_names=[tensor.name for tensor in part.inputs],
            output_names=[tensor.name for tensor in part.outputs],
            dynamic_shapes=(*dynamic_axes[:named], *rest),
            verbose=False,
        )
    model = program.model_proto
    name_after_modules(model)
    lower(model)
    return model


def without_slow_rule() -> AbstractContextManager[object]:
    """Within it, the exporter's optimizer does not look for slices that make a Split: for every node it would go
    through the whole graph, which took 72 of the 165 s for Restormer.  Our graphs have none."""
    try:
        from onnxscript.rewriter.rules.common import slice_split_rule
    except ImportError:  # another release than the pinned one: slow, or mended
        return nullcontext()
    return patch.object(slice_split_rule, "try_rewrite", return_value=None)


def name_after_modules(model: onnx.ModelProto) -> None:
    """Names each node after the module it comes from and drops the exporter's notes, which hold source paths."""
    for node in model.graph.node:
        notes = {note.key: note.value for note in node.metadata_props}
        scopes = notes.get("namespace", "").split("/")
        module = scopes[-2].split(":")[0] if len(scopes) > 1 else ""
        node.name = f"{module}/{node.output[0]}" if module else node.output[0]
        del node.metadata_props[:]
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer):
        del value.metadata_props[:]
    del model.metadata_props[:], model.graph.metadata_props[:]


def lower(model: onnx.ModelProto) -> None:
    """Rewrites opset 18 as the opset 17 that TensorRT 8.6 reads, in place.

    `onnx.version_converter` has no way down for Split and the reductions, the only operators in our graphs that
    changed; raises ValueError for any other.  Shape's start and end, which TensorRT 8.6 accepts and does not heed,
    become a Slice.
    """
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    lowered: list[onnx.NodeProto] = []
    for node in model.graph.node:
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "Split":
            # opset 17 splits into as many equal parts as there are outputs
            remove_attribute(node, "num_outputs")
        elif node.op_type.startswith("Reduce") and node.op_type != "ReduceSum":
            axes = constants[node.input.pop()]
            remove_attribute(node, "noop_with_empty_axes")
            node.attribute.append(onnx.helper.make_attribute("axes", axes.tolist()))
        elif node.op_type == "Shape" and attributes:
            bounds = {"start": attributes.get("start", 0), "end": attributes.get("end", np.iinfo(np.int64).max)}
            (output,) = node.output
            for name, value in bounds.items():
                model.graph.initializer.append(numpy_helper.from_array(np.array([value]), f"{output}.{name}"))
            lowered.append(onnx.helper.make_node("Shape", node.input, [f"{output}.whole"], f"{node.name}.whole"))
            inputs = [f"{output}.whole", *(f"{output}.{name}" for name in bounds)]
            node = onnx.helper.make_node("Slice", inputs, [output], node.name)
        elif onnx.defs.get_schema(node.op_type, OPSET + 1, node.domain).since_version > OPSET:
            raise ValueError(f"{node.name}: {node.op_type} of opset {OPSET + 1} has no known form in opset {OPSET}")
        lowered.append(node)
    used = {name for node in lowered for name in node.input}
    kept_tensors = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.node[:], model.graph.initializer[:], model.opset_import[:]
    model.graph.node.extend(lowered)
    model.graph.initializer.extend(kept_tensors)
    model.opset_import.append(onnx.helper.make_opsetid("", OPSET))
    model.ir_version = 8


def remove_attribute(node: onnx.NodeProto, name: str) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)


def check(exportable: ExportablePart, path: Path, input_sets: Sequence[Mapping[str, np.ndarray]]) -> tuple[float, bool]:
    """Compares the graph at `path` in ONNX Runtime with PyTorch.

    Returns the largest absolute error over all outputs, and whether every output is within TOLERANCE.
    """
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    part = exportable.part
    worst, passed = 0.0, True
    for inputs in input_sets:
        got = session.run([tensor.name for tensor in part.outputs], inputs)
        with torch.inference_mode():
            expected = exportable.module(*(torch.from_numpy(inputs[tensor.name]) for tensor in part.inputs))
        for actual, reference in zip(got, as_arrays(expected), strict=True):
            error = float(np.abs(actual - reference).max())
            worst = max(worst, error)
            passed = passed and error <= TOLERANCE * max(1.0, float(np.abs(reference).max()))  # False for NaN
    return worst, passed


def as_arrays(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> list[np.ndarray]:
    return [tensor.numpy() for tensor in (outputs if isinstance(outputs, tuple) else (outputs,))]


def export_model(
    folder: BuildFolder, loaded: LoadedModel, weights_argument: str, load_options: Mapping[str, int]
) -> bool:
    """Exports and checks every part; the manifest is written only when all passed."""
    folder.clear()
    print(f"{folder.spec.title}: {loaded.weights}")
    passed = True
    for exportable in loaded.parts:
        part, started = exportable.part, time.perf_counter()
        model = export(exportable)
        sets = [
            exportable.example(dims, np.random.default_rng(n)) for n, dims in enumerate(exportable.check_at, start=1)
        ]
        path = folder.onnx(part.name)
        with replacing(path) as temporary:
            onnx.save(model, temporary)
            onnx.checker.check_model(temporary, full_check=True)
            error, part_passed = check(exportable, temporary, sets)
        folder.write_check_inputs(part, sets)
        passed = passed and part_passed
        sizes = " and ".join(", ".join(f"{name} {size}" for name, size in dims.items()) for dims in exportable.check_at)
        print(
            f"{path}: {len(model.graph.node)} nodes, max abs error {error:.1e} against PyTorch at {sizes}"
            f"{'' if part_passed else ': FAILED'} ({time.perf_counter() - started:.0f} s)"
        )
    if passed:
        loaded.save_assets(folder.path)
        folder.write_manifest(
            {
                "model": folder.spec.name,
                "weights": loaded.weights,
                "weights_argument": weights_argument,
                "load_options": load_options,
                "parts": [exportable.part.to_json() for exportable in loaded.parts],
                "settings": loaded.settings,
            }
        )
    return passed


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--weights",
        default="demo",
        metavar="demo|random[:VARIANT]|FILE|FOLDER|HUB_ID",
        help="restormer: a checkpoint file of the authors; trocr: a Hugging Face folder or hub id (demo)",
    )
    arguments.add_argument(
        "--num-beams", type=int, metavar="N", help="trocr: of the search (what the weights' generation settings say)"
    )
    options = arguments.parse_args()
    folder = BuildFolder(options.build_dir, options.model)
    load_options = {} if options.num_beams is None else {"num_beams": options.num_beams}
    if not set(load_options) <= set(folder.spec.load_options):
        raise Unusable(f"{folder.spec.name} takes no --num-beams")
    loaded = folder.spec.load(options.weights, **load_options)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as problem:
        raise Unusable(f"{folder.path} is not a folder: choose another --build-dir") from problem
    return 0 if export_model(folder, loaded, options.weights, load_options) else 1


if __name__ == "__main__":
    run_script(main)
