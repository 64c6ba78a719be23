"""Step 2: replace PixelShuffle, LayerNorm, attention and gate subgraphs by plugin nodes.

    python surgeon.py restormer                                   FP32
    python surgeon.py trocr --precision fp16
    python surgeon.py restormer --without transposed_attention    leave one pattern as the exporter wrote it
    python surgeon.py restormer --without all                     only set the precision: the baseline without plugins
    python surgeon.py restormer --precision fp16 --keep-fp32 build/restormer/keep-fp32.txt
                                                                  what `compare.py restormer --find-drift` has found
    python surgeon.py restormer --with norm_pointwise_conv        also a plugin that is off by default

Reads build/<model>/<part>.onnx and leaves build/<model>/<part>.<precision>.onnx.  Patterns are matched by topology and
counted; a count that differs from what the model must have is an error.  The patched graph carries, for every plugin
node, an ONNX local function of the same meaning, so ONNX Runtime runs it as it is; its outputs are compared with the
exported graph's on random inputs (FP32: exit status 1 above 1e-5 of the largest value).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

import plugins
from export_onnx import OPSET
from models.chain import PRECISIONS, BuildFolder, parser, replacing, run_script
from models.spec import Part, Unusable
from plugins.matching import Match

# Operators whose sums or quotients leave the range or the resolution of FP16.
ALWAYS_FP32 = {"Softmax", "LayerNormalization", "ReduceMean", "ReduceSum", "ReduceL2", "Pow", "Sqrt", "Exp", "Range"}
MATRIX_PRODUCTS = {"Conv", "Gemm", "MatMul"}  # tensor cores sum them in FP32 whatever their inputs are
TOLERANCE = 1e-5  # of the largest value, for FP32


# ---------------------------------------------------------------------------------------------------------------------
# Grafting
# ---------------------------------------------------------------------------------------------------------------------


def find_matches(graph: gs.Graph, part: Part, path: Path) -> dict[str, list[Match]]:
    """Every plugin's matches; raises Unusable where their number is not the one that the part must have."""
    found = {name: plugins.find(name).pattern.matches(graph) for name in plugins.names()}
    wrong = [
        f"{name} occurs {len(matches)} times instead of {part.plugins.get(name, 0)}"
        for name, matches in found.items()
        if len(matches) != part.plugins.get(name, 0)
    ]
    if wrong:
        raise Unusable(f"{path} lacks the expected patterns: {'; '.join(wrong)}")
    return {name: matches for name, matches in found.items() if matches}


def graft(graph: gs.Graph, plugin: plugins.Plugin, match: Match) -> gs.Node:
    """Lets one plugin node, which it returns, produce the outputs of a matched subgraph."""
    producer = match.outputs[0].inputs[0]
    scope, separator, _ = producer.name.rpartition("/")
    node = gs.Node(
        op=plugin.op,
        name=f"{scope}{separator}{plugin.op}_{match.outputs[0].name}",
        attrs={**match.attributes, "plugin_version": plugins.VERSION, "plugin_namespace": plugins.DOMAIN},
        inputs=list(match.inputs),
        domain=plugins.DOMAIN,
    )
    for tensor in match.outputs:
        tensor.inputs.clear()
        node.outputs.append(tensor)
    graph.nodes.append(node)
    return node


def finish(graph: gs.Graph, used: Collection[str]) -> onnx.ModelProto:
    """The graph as a model that holds the functions of the `used` plugins, checked."""
    graph.cleanup().toposort()
    graph.import_domains = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(plugins.DOMAIN, 1)]
    model = gs.export_onnx(graph)
    model.ir_version = 8
    model.functions.extend(plugins.find(name).function for name in sorted(used))
    onnx.checker.check_model(model, full_check=True)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Precision
# ---------------------------------------------------------------------------------------------------------------------


def to_fp16(graph: gs.Graph, part: Part, keep_fp32: Collection[gs.Node]) -> None:
    """Types the graph as FP16, except ALWAYS_FP32 operators and the nodes in `keep_fp32`.

    Graph inputs and outputs keep their types, internal ones become FP16; casts stand where types meet.
    """
    kept = {id(node) for node in keep_fp32}
    half, single = np.dtype(np.float16), np.dtype(np.float32)
    internal = {tensor.name for tensor in (*part.inputs, *part.outputs) if tensor.internal}
    graph.toposort()
    for tensor in graph.inputs:
        if is_float(tensor) and tensor.name in internal:
            tensor.dtype = half
    # what the type of each graph output must be
    outputs = {id(tensor): half if tensor.name in internal else single for tensor in graph.outputs if is_float(tensor)}
    casts = Casts()
    for node in graph.nodes:
        if node.op == "Shape":  # takes any type
            continue
        dtype = single if node.op in ALWAYS_FP32 or id(node) in kept else half
        plugin = plugins.of_operator(node.op) if node.domain == plugins.DOMAIN else None
        for index, tensor in enumerate(node.inputs):
            if is_float(tensor):
                exact = plugin is not None and index in plugin.fp32_inputs
                node.inputs[index] = casts.cast(tensor, single if exact else dtype)
        if node.op == "Cast" and node.attrs["to"] == onnx.TensorProto.FLOAT:
            node.attrs.update(to_dtype(dtype))
        for index, tensor in enumerate(node.outputs):
            if is_float(tensor):
                exact = plugin is not None and plugin.in_place.get(index) in plugin.fp32_inputs
                made = single if exact else dtype
                tensor.dtype = outputs.get(id(tensor), made)
                if tensor.dtype != made:
                    node.outputs[index] = casts.output(tensor, made)
    graph.nodes.extend(casts.nodes)
    graph.toposort()


def is_float(tensor: gs.Tensor) -> bool:
    return tensor.dtype in (np.float32, np.float16)


def to_dtype(dtype: np.dtype) -> dict[str, int]:
    """The attribute of a Cast."""
    return {"to": onnx.helper.np_dtype_to_tensor_dtype(dtype)}


class Casts:
    """Makes each conversion once and shares it among its users."""

    def __init__(self) -> None:
        self.nodes: list[gs.Node] = []
        self.made: dict[tuple[int, np.dtype], gs.Tensor] = {}

    def cast(self, tensor: gs.Tensor, dtype: np.dtype) -> gs.Tensor:
        """`tensor` in `dtype`; constants are converted here, FP32 values beyond FP16's range to its largest."""
        if tensor.dtype == dtype:
            return tensor
        key = id(tensor), dtype
        if key not in self.made:
            name = f"{tensor.name}.{dtype.name}"
            if isinstance(tensor, gs.Constant):
                limit = np.finfo(dtype).max
                self.made[key] = gs.Constant(name, np.asarray(tensor.values.clip(-limit, limit), dtype))
            else:
                self.made[key] = gs.Variable(name, dtype, tensor.shape)
                self.nodes.append(gs.Node("Cast", name, to_dtype(dtype), [tensor], [self.made[key]]))
        return self.made[key]

    def output(self, tensor: gs.Tensor, dtype: np.dtype) -> gs.Tensor:
        """A tensor in `dtype` to produce instead of the graph output `tensor`, which becomes its cast."""
        inner = gs.Variable(f"{tensor.name}.{dtype.name}", dtype, tensor.shape)
        for consumer in list(tensor.outputs):
            for index, used in enumerate(consumer.inputs):
                if used is tensor:
                    consumer.inputs[index] = inner
        self.nodes.append(gs.Node("Cast", f"{tensor.name}.cast", to_dtype(tensor.dtype), [inner], [tensor]))
        return inner


# ---------------------------------------------------------------------------------------------------------------------
# Checking
# ---------------------------------------------------------------------------------------------------------------------


def largest_errors(folder: BuildFolder, part: Part, patched: Path, precision: str) -> tuple[float, float]:
    """Largest error of the patched graph against the exported one in ONNX Runtime: absolute, and as a share of the
    largest value of the same output."""
    import onnxruntime

    sessions = [
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for path in (folder.onnx(part.name), patched)
    ]
    names = [tensor.name for tensor in part.outputs]
    absolute = relative = 0.0
    for inputs in folder.check_inputs(part):
        expected = sessions[0].run(names, inputs)
        actual = sessions[1].run(names, in_precision(part, inputs, precision))
        for tensor, reference, values in zip(part.outputs, expected, actual, strict=True):
            if precision == "fp16" and not tensor.is_approximate:
                continue  # a token chosen otherwise: no error of rounding
            error = float(np.abs(values.astype(np.float32) - reference).max())
            absolute = float(np.maximum(absolute, error))  # keeps NaN
            relative = float(np.maximum(relative, error / max(1.0, float(np.abs(reference).max()))))
    return absolute, relative


def in_precision(part: Part, inputs: Mapping[str, np.ndarray], precision: str) -> dict[str, np.ndarray]:
    """The inputs as a graph of that precision takes them: internal ones in its own type."""
    internal = {tensor.name for tensor in part.inputs if tensor.internal}
    dtype = np.float16 if precision == "fp16" else np.float32
    return {name: values.astype(dtype) if name in internal else values for name, values in inputs.items()}


# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grafted:
    """A part's graph with its plugin nodes, in FP32.

    nodes_before  how many nodes the exported graph had
    counts        plugin → how many nodes it became
    owners        node → the plugin that does its work, or would
    left          nodes of patterns left as they were that must not be computed in FP16
    """

    part: Part
    graph: gs.Graph
    nodes_before: int
    counts: Counter[str]
    owners: dict[str, str]
    left: Collection[str]

    def typed(self, precision: str, keep_fp32: Collection[str]) -> gs.Graph:
        """A copy of the graph in a precision; FP16 with the nodes called `keep_fp32` in FP32."""
        graph = self.graph.copy()
        if precision == "fp16":
            kept = {*self.left, *keep_fp32}
            to_fp16(graph, self.part, [node for node in graph.nodes if node.name in kept])
        return graph


def grafted(folder: BuildFolder, part: Part, without: Collection[str]) -> Grafted:
    """Reads one part's exported graph and replaces its patterns, except those of the plugins `without`."""
    source = folder.require(folder.onnx(part.name), "export_onnx.py")
    try:
        graph = gs.import_onnx(onnx.load(source))
    except Exception as problem:  # protobuf's errors have no common type
        command = folder.command("export_onnx.py")
        raise Unusable(f"{source} is not a readable ONNX file: run `{command}` again") from problem
    nodes_before = len(graph.nodes)
    found = find_matches(graph, part, source)
    owners: dict[str, str] = {}
    counts: Counter[str] = Counter()
    replaced: set[int] = set()  # nodes
    for name in sorted(found, key=lambda name: -plugins.find(name).reach):
        for match in found[name]:
            if name in without:
                owners.update((node.name, name) for node in match.nodes if id(node) not in replaced)
            elif not any(id(tensor.inputs[0]) in replaced for tensor in match.outputs):
                replaced.update(map(id, match.nodes))
                node = graft(graph, plugins.find(name), match)
                replaced.add(id(node))
                owners[node.name] = name
                counts[name] += 1
    left = {
        node.name
        for name in found
        if name in without and plugins.find(name).needs_fp32
        for match in found[name]
        for node in match.nodes
        if node.op not in MATRIX_PRODUCTS
    }
    return Grafted(part, graph.cleanup(), nodes_before, counts, owners, left)


def patch(
    folder: BuildFolder, done: Grafted, precision: str, keep_fp32: Collection[str]
) -> tuple[dict[str, Any], bool]:
    """Writes one part's patched graph.  Returns what the manifest should say of it, and whether its outputs are
    right."""
    part, counts = done.part, done.counts
    graph = done.typed(precision, keep_fp32)
    model = finish(graph, counts)
    target = folder.onnx(part.name, precision)
    folder.engine(part.name, precision).unlink(missing_ok=True)  # it was built from the graph that is replaced now
    with replacing(target) as temporary:
        onnx.save(model, temporary)
        absolute, relative = largest_errors(folder, part, temporary, precision)
    passed = relative <= TOLERANCE if precision == "fp32" else np.isfinite(relative)
    print(f"{target}: {done.nodes_before} → {len(model.graph.node)} nodes, {listed(counts) or 'no plugins'}")
    verdict = "" if passed else ": FAILED"
    source = folder.onnx(part.name).name
    print(f"  against {source} in ONNX Runtime: max abs error {absolute:.1e}, relative {relative:.1e}{verdict}")
    report = {
        "plugins": counts,
        "in_place": in_place(graph),
        "owners": done.owners,
        "keep_fp32": [node.name for node in graph.nodes if node.name in keep_fp32],
        "max_abs_error": absolute,
    }
    return report, bool(passed)


def in_place(graph: gs.Graph) -> dict[str, str]:
    """Graph output → the graph input whose memory it may take, because a plugin's kernel updates that in place.

    TensorRT does not know that the two share memory: whatever else reads the input must lie before the plugin's node,
    or it might run behind it.
    """
    inputs = {id(tensor) for tensor in graph.inputs}
    outputs = {id(tensor): tensor.name for tensor in graph.outputs}

    def may_change(tensor: gs.Tensor, node: gs.Node) -> bool:
        readers = {id(reader) for reader in tensor.outputs if reader.op != "Shape"}  # which reads no values
        return id(tensor) in inputs and readers <= nodes_before(node) | {id(node)}

    return {
        outputs[id(node.outputs[output])]: node.inputs[source].name
        for node in graph.nodes
        if node.domain == plugins.DOMAIN
        for output, source in plugins.of_operator(node.op).in_place.items()
        if id(node.outputs[output]) in outputs and may_change(node.inputs[source], node)
    }


def nodes_before(node: gs.Node) -> set[int]:
    """The ids of all nodes that a node depends on."""
    found: set[int] = set()
    ahead = [node]
    while ahead:
        for producer in (tensor.inputs[0] for tensor in ahead.pop().inputs if tensor.inputs):
            if id(producer) not in found:
                found.add(id(producer))
                ahead.append(producer)
    return found


def node_names(file: Path, parts: Sequence[Grafted]) -> list[str]:
    """The nodes that the lines of a file name; `#` begins a comment.  Raises Unusable naming the first that is in none
    of the parts."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as problem:
        raise Unusable(f"{file} is no list of nodes") from problem
    known = {node.name for done in parts for node in done.graph.nodes}
    names = [line.partition("#")[0].strip() for line in lines]
    for number, name in enumerate(names, 1):
        if name and name not in known:
            raise Unusable(f"{file}, line {number}: the patched graphs have no node {name}")
    return [name for name in names if name]


def listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def described_defaults() -> Iterator[str]:
    """The plugins that are not grafted unasked in every precision."""
    for name in plugins.names():
        left_out = [precision for precision in PRECISIONS if precision not in plugins.find(name).default_in]
        if left_out:
            yield name if len(left_out) == len(PRECISIONS) else f"{name} (in {', '.join(left_out)})"


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the patched graph (fp32)")
    arguments.add_argument(
        "--without", nargs="+", default=[], metavar="PLUGIN", help=f"from {', '.join(plugins.names())}, or all"
    )
    arguments.add_argument(
        "--with",
        nargs="+",
        default=[],
        metavar="PLUGIN",
        dest="wanted",
        help=f"also those that are off by default: {', '.join(described_defaults())}",
    )
    arguments.add_argument(
        "--keep-fp32", type=Path, metavar="FILE", help="FP16, but for the nodes whose names are the lines of FILE"
    )
    options = arguments.parse_args()
    if options.keep_fp32 and options.precision != "fp16":
        raise Unusable("--keep-fp32 goes with --precision fp16")
    if options.without == ["all"]:
        without = plugins.names()
    else:
        without = [plugins.find(name).name for name in options.without]
        wanted = {plugins.find(name).name for name in options.wanted}
        without += {name for name in plugins.names() if options.precision not in plugins.find(name).default_in} - wanted
    folder = BuildFolder(options.build_dir, options.model)
    manifest = folder.manifest()
    parts = [grafted(folder, part, without) for part in folder.parts()]
    keep_fp32 = node_names(options.keep_fp32, parts) if options.keep_fp32 else []
    patched, passed = {}, True
    for done in parts:
        patched[done.part.name], part_passed = patch(folder, done, options.precision, keep_fp32)
        patched[done.part.name]["without"] = sorted(without)
        passed = passed and part_passed
    manifest.setdefault("patched", {})[options.precision] = patched
    manifest.get("engines", {}).pop(options.precision, None)
    folder.write_manifest(manifest)
    return 0 if passed else 1


if __name__ == "__main__":
    run_script(main)
