"""Single plugins against TensorRT's own layers.

A plugin's subgraph becomes a graph of its own, with the shapes that it has at one size of its part, twice: as one
plugin node, and as the exporter wrote it, in the types that `surgeon.py --without` gives it.  So each plugin, also one
that contains others or is off by default, is measured against what TensorRT would run in its place.

`compare.py --ablation` builds and times both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Tuple

import numpy as np

from models.chain import BuildFolder, replacing
from models.report import number, table
from models.spec import Part, TensorSpec

if TYPE_CHECKING:
    import onnx
    import onnx_graphsurgeon as gs

    from plugins.matching import Match

Shapes = Dict[str, Tuple[int, ...]]
LARGEST_VALUE = 64  # elements of a tensor that may be a shape, axes, or a scalar


# ---------------------------------------------------------------------------------------------------------------------
# Graphs
# ---------------------------------------------------------------------------------------------------------------------


def static_shapes(model: onnx.ModelProto, given: Shapes) -> Tuple[Shapes, Dict[str, np.ndarray]]:
    """The shapes of all tensors where the graph's inputs have the `given` ones, and the small tensors whose values
    follow from shapes.

    One pass in topological order; onnx.shape_inference alone loses track of shapes behind computed ones.
    """
    from onnx import defs, helper, numpy_helper, shape_inference
    from onnx.reference import ReferenceEvaluator

    graph, opsets = model.graph, {opset.domain: opset.version for opset in model.opset_import}
    types: Dict[str, onnx.TypeProto] = {
        value.name: helper.make_tensor_type_proto(value.type.tensor_type.elem_type, given[value.name])
        for value in graph.input
    }
    values: Dict[str, np.ndarray] = {}
    for tensor in graph.initializer:
        types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
        if np.prod(tensor.dims) <= LARGEST_VALUE:
            values[tensor.name] = numpy_helper.to_array(tensor)

    def evaluated(node: onnx.NodeProto) -> Mapping[str, np.ndarray]:
        """The outputs of a node whose inputs' values are known, or whose inputs' shapes suffice."""
        if node.op_type == "Shape":
            (name,) = node.input
            bounds = {attribute.name: attribute.i for attribute in node.attribute}
            shape = shape_of(types[name])[bounds.get("start") : bounds.get("end")]
            return {node.output[0]: np.array(shape, np.int64)}
        if not all(name in values for name in node.input if name):
            return {}
        names = [name for name in node.output if name]
        by_itself = helper.make_graph(
            [node],
            node.name,
            [helper.make_value_info(name, types[name]) for name in dict.fromkeys(node.input) if name],
            [helper.make_value_info(name, types[name]) for name in names],
        )
        made = ReferenceEvaluator(by_itself, opsets=opsets).run(
            names, {name: values[name] for name in node.input if name}
        )
        return dict(zip(names, map(np.asarray, made)))

    for node in graph.node:
        known = {name: numpy_helper.from_array(values[name], name) for name in node.input if name in values}
        inputs = {name: types[name] for name in node.input if name}
        schema = defs.get_schema(node.op_type, opsets[node.domain], node.domain)
        types.update(
            shape_inference.infer_node_outputs(
                schema, node, inputs, known, opset_imports=model.opset_import, ir_version=model.ir_version
            )
        )
        for name, made in evaluated(node).items():
            types[name] = helper.make_tensor_type_proto(types[name].tensor_type.elem_type, made.shape)
            if made.size <= LARGEST_VALUE:
                values[name] = made
    computed = {name for node in graph.node for name in node.output}
    return (
        {name: shape_of(kind) for name, kind in types.items()},
        {name: value for name, value in values.items() if name in computed},
    )


def shape_of(kind: onnx.TypeProto) -> Tuple[int, ...]:
    dims = kind.tensor_type.shape.dim
    if not kind.tensor_type.HasField("shape") or not all(dim.HasField("dim_value") for dim in dims):
        raise ValueError("a shape depends on values")
    return tuple(dim.dim_value for dim in dims)


def isolated(match: Match, shapes: Shapes, values: Mapping[str, np.ndarray]) -> Tuple[gs.Graph, Match]:
    """A match's subgraph as a graph of its own, of static shapes, and the match in that.  Both are copies."""
    import onnx_graphsurgeon as gs

    copies: Dict[int, gs.Tensor] = {}
    nodes: List[gs.Node] = []
    given = {id(tensor) for tensor in match.inputs}

    def copied(tensor: gs.Tensor) -> gs.Tensor:
        if id(tensor) in copies:
            return copies[id(tensor)]
        if isinstance(tensor, gs.Constant) or tensor.name in values:
            array = tensor.values if isinstance(tensor, gs.Constant) else values[tensor.name]
            copies[id(tensor)] = gs.Constant(tensor.name, array)
        elif tensor.is_empty():  # an optional input left out
            copies[id(tensor)] = gs.Variable.empty()
        else:
            copies[id(tensor)] = gs.Variable(tensor.name, tensor.dtype, shapes[tensor.name])
            if id(tensor) not in given:
                (node,) = tensor.inputs
                inputs = [copied(needed) for needed in node.inputs]
                if not copies[id(tensor)].inputs:  # else another output of the node has come first
                    for output in node.outputs:
                        copies.setdefault(id(output), gs.Variable(output.name, output.dtype, shapes[output.name]))
                    outputs = [copies[id(output)] for output in node.outputs]
                    nodes.append(gs.Node(node.op, node.name, dict(node.attrs), inputs, outputs, node.domain))
        return copies[id(tensor)]

    inside = replace(match, inputs=[copied(tensor) for tensor in match.inputs])
    inside = replace(inside, outputs=[copied(tensor) for tensor in match.outputs], nodes=nodes)
    variables = {id(tensor): tensor for tensor in inside.inputs if isinstance(tensor, gs.Variable)}
    graph = gs.Graph(nodes, list(variables.values()), list(inside.outputs))
    return graph.toposort(), inside


def alone(name: str, graph: gs.Graph, sizes: Mapping[str, int], fp32: Collection[str] = ()) -> Part:
    """An isolated graph as a part whose floating-point tensors are all of the graph's precision, but for those called
    `fp32`.

    sizes  what its part is timed at: the integer inputs have their values there, or 0 where the part computes them
    """

    def specified(tensors: Sequence[gs.Tensor]) -> Tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                tensor.name,
                np.dtype(tensor.dtype).name,
                tuple(tensor.shape),
                internal=np.dtype(tensor.dtype).kind == "f" and tensor.name not in fp32,
                chosen=tensor.name in fp32,
            )
            for tensor in tensors
        )

    inputs = specified(graph.inputs)
    integers = {tensor.name: sizes.get(tensor.name, 0) for tensor in inputs if not tensor.is_float}
    return Part(name, inputs, specified(graph.outputs), (), time_at=(integers,))


@dataclass(frozen=True)
class Kind:
    """Plugin nodes of one part that are alike at one of its sizes: in attributes, and all shapes and types.

    matches  in the part's graph; only their weights tell them apart
    in_fp32  the part's nodes that stay in FP32 where patterns are left out
    shapes   of the part's tensors, and small `values` that follow from them
    """

    part: Part
    sizes: Mapping[str, int]
    plugin: str
    matches: Sequence[Match]
    in_fp32: Collection[str]
    shapes: Shapes
    values: Mapping[str, np.ndarray]

    def isolated(self) -> Tuple[gs.Graph, Match]:
        return isolated(self.matches[0], self.shapes, self.values)

    def described(self) -> Dict[str, Any]:
        """For a row of the report."""
        import onnx_graphsurgeon as gs

        match = self.matches[0]
        return {
            "part": self.part.name,
            "size": listed(self.sizes),
            "plugin": self.plugin,
            "attributes": match.attributes,
            "inputs": [list(self.shapes[t.name]) for t in match.inputs if isinstance(t, gs.Variable)],
            "weights": [list(tensor.shape) for tensor in match.inputs if isinstance(tensor, gs.Constant)],
            "outputs": [list(self.shapes[tensor.name]) for tensor in match.outputs],
            "count": len(self.matches),
        }


def kinds(
    part: Part,
    model: onnx.ModelProto,
    found: Mapping[str, Sequence[Match]],
    in_fp32: Collection[str],
    sizes: Mapping[str, int],
) -> Iterator[Kind]:
    """All kinds of plugin nodes in a part at one size; `found` is every plugin's matches in its graph."""
    import onnx_graphsurgeon as gs

    shapes, values = static_shapes(model, {tensor.name: tensor.sizes(sizes) for tensor in part.inputs})
    for plugin, matches in found.items():
        alike: Dict[Any, List[Match]] = {}
        for match in matches:
            described = [
                (tuple(tensor.shape), np.dtype(tensor.dtype), True)
                if isinstance(tensor, gs.Constant)
                else (shapes[tensor.name], np.dtype(tensor.dtype), False)
                for tensor in match.inputs
            ]
            alike.setdefault((tuple(sorted(match.attributes.items())), *described), []).append(match)
        for group in alike.values():
            yield Kind(part, sizes, plugin, group, in_fp32, shapes, values)


def listed(sizes: Mapping[str, int]) -> str:
    """What a part is timed at; but for the position, what the state of a search is makes no difference."""
    left_out = ("sequences", "ancestors", "hypotheses", "lengths", "finished")
    return ", ".join(f"{name} {value}" for name, value in sizes.items() if name not in left_out)


def random_inputs(part: Part, limits: Mapping[str, Tuple[int, int]]) -> Iterator[Tuple[str, Dict[str, np.ndarray]]]:
    """Name and inputs of a part at each of the sizes that it is timed at, as far as they lie within `limits`."""
    random = np.random.default_rng(0)
    for sizes in part.time_at:
        if any(not low <= sizes[name] <= high for name, (low, high) in limits.items()):
            continue
        values = random.random(1_000_003, dtype=np.float32)  # repeated: gigabytes of random numbers take their time
        yield (
            f"{part.name}, {listed(sizes)}",
            {
                tensor.name: np.full(tensor.sizes(sizes), sizes[tensor.name], tensor.dtype)
                if tensor.name in sizes
                else np.resize(values, tensor.sizes(sizes))
                for tensor in part.inputs
            },
        )


# ---------------------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------------------


def markdown(report: Mapping[str, Any], title: str) -> str:
    """All kinds' times as tables, one for each precision, with the plugins that lose marked."""
    lines = [f"# {title}: single plugins against TensorRT's own layers", ""]
    lines += [f"- Weights: {report['weights']}", f"- Machine: {report['machine']}"]
    versions = {row["built_with"]["tensorrt"]: None for row in report["rows"] if "built_with" in row}
    lines += [f"- Version: {', '.join(versions) or 'unknown'}", f"- Date: {report['date']}", ""]
    lines += ["Each plugin's subgraph as an engine of its own, with static shapes, once as the plugin and once as"]
    lines += ["TensorRT's layers; images in the layout that suits each best.  Medians in µs, of runs queued one behind"]
    lines += ["the other in a CUDA graph; ratio: TensorRT's to the plugin's.  Count: how many such nodes the part has;"]
    lines += [
        "subgraphs of different plugins overlap.  Difference: the largest between both outputs, as a share of the"
    ]
    lines += ["largest value, on random inputs.", ""]
    header = ["part", "size", "plugin", "input → output", "count", "TensorRT", "plugin", "ratio", "difference", ""]
    for precision in dict.fromkeys(row["precision"] for row in report["rows"]):
        rows = [cells(row) for row in report["rows"] if row["precision"] == precision]
        lines += [f"## {precision.upper()}", "", *table(header, rows)]
    return "\n".join(lines)


def cells(row: Mapping[str, Any]) -> List[str]:
    shapes = " → ".join(", ".join(map(dimensions, row[key])) for key in ("inputs", "outputs"))
    known = [row["part"], row["size"], row["plugin"], shapes, str(row["count"])]
    if "failed" in row:
        return [*known, "", "", "", "", f"**failed**: {row['failed'].replace('|', '/')}"]
    layers, plugin = (row[key]["median"] for key in ("layers_us", "plugin_us"))
    verdict = "**plugin loses**" if loses(row) else ""
    return [*known, number(layers), number(plugin), number(layers / plugin), number(row["difference"]), verdict]


def loses(row: Mapping[str, Any]) -> bool:
    return row["plugin_us"]["median"] > row["layers_us"]["median"]


def dimensions(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def joined(measured: Sequence[Mapping[str, Any]], earlier: Sequence[Mapping[str, Any]]) -> List[Mapping[str, Any]]:
    """All rows that were measured, and those of `earlier` reports that were not measured again and still hold: of the
    same TensorRT, GPU and plugin library."""
    built_with = [row["built_with"] for row in measured if "built_with" in row]
    again = [identified(row) for row in measured]
    kept = [row for row in earlier if row.get("built_with") in built_with and identified(row) not in again]
    return sorted((*kept, *measured), key=lambda row: (row["part"], numbers_in(row["size"]), row["plugin"]))


def numbers_in(size: str) -> List[int]:
    """What sizes are sorted by: batch 8 comes before batch 32."""
    return [int(number) for number in re.findall(r"\d+", size)]


def identified(row: Mapping[str, Any]) -> List[Any]:
    keys = ("precision", "part", "size", "plugin", "attributes", "inputs", "weights", "outputs")
    return [row[key] for key in keys]


def rows_before(folder: BuildFolder) -> List[Dict[str, Any]]:
    """The rows that an earlier run on the same weights has left."""
    path = folder.path / "ablation.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return report["rows"] if report["weights"] == folder.manifest()["weights"] else []


def write(folder: BuildFolder, report: Mapping[str, Any]) -> Path:
    """Writes ablation.json and ablation.md, and returns the latter's path."""
    path = folder.path / "ablation.md"
    with replacing(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    with replacing(path) as temporary:
        temporary.write_text(markdown(report, folder.spec.title), encoding="utf-8")
    return path
