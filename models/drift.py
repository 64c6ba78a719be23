"""Finds where graphs lose precision in FP16, and a small set of nodes whose staying in FP32 mends it.

A trial is the FP16 graph with some nodes kept in FP32, as `rounded` makes it: ONNX Runtime computes it in FP32 and
rounds every tensor to FP16 that the FP16 graph stores so.  The FP16 graph itself would show less: ONNX Runtime's CPU
has hardly any FP16 kernels, puts casts around FP32 ones, and drops the casts between two of these, so that a value of
1e5 passes through an FP16 tensor unharmed.

So the search sees all that happens to stored values: rounding, overflow, numbers too small for FP16, and what later
operators make of them.  It does not see what happens within an operator, such as sums in FP16 (our kernels and tensor
cores sum in FP32); and it also rounds tensors that TensorRT never stores because it fuses the operators around them.

Of an executor the search knows two functions: the errors of tensors, and whether the bars are met.  An engine
takes minutes to build, so TensorRT, where a GPU is, does not search: it is asked once for the errors of the FP16 graph,
beside the trial's, and at last whether it meets the bars with the nodes that were found.

Tensors that are an engine's outputs show what TensorRT stores, with its own kernels, but it fuses no nodes across them.
One engine gives all tensors of a part: a jump compares what a node makes with what it takes, which must be of one run,
and several engines would each choose other kernels, and take as many times longer to build.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Callable, Dict, List, Optional, Set, Tuple

import numpy as np

from models.report import code, number, table
from models.spec import Dim, Part, TensorSpec

if TYPE_CHECKING:
    import onnx
    import onnxruntime

ROUNDING = 2.0**-11  # largest relative error of a number rounded to FP16
JUMP = 8  # an error that grows by more than this factor in one node is marked
GROUP = 64  # tensors that are read from a graph at once, which are then in memory twice


# ---------------------------------------------------------------------------------------------------------------------
# Graphs
# ---------------------------------------------------------------------------------------------------------------------


def rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """An FP16 graph as one that takes, gives and computes FP32, with every FP16 tensor's values rounded to FP16."""
    import onnx
    from onnx import helper, numpy_helper

    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    types = element_types(graph)
    for tensor in graph.initializer:
        if tensor.data_type == half:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    nodes: List[onnx.NodeProto] = []

    def store(exact: str, stored: str) -> None:
        nodes.append(helper.make_node("Cast", [exact], [f"{stored}.half"], f"{stored}.half", to=half))
        nodes.append(helper.make_node("Cast", [f"{stored}.half"], [stored], f"{stored}.single", to=single))

    inputs = {value.name: f"{value.name}.stored" for value in graph.input if types[value.name] == half}
    for name, stored in inputs.items():
        store(name, stored)
    for original in model.graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        nodes.append(node)
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == half:
                attribute.i = single
        for index, name in enumerate(original.input):
            node.input[index] = inputs.get(name, name)
        for index, name in enumerate(original.output):
            if types.get(name) == half:
                node.output[index] = f"{name}.exact"
                store(f"{name}.exact", name)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == half:
            value.type.tensor_type.elem_type = single
    return made


def element_types(graph: onnx.GraphProto) -> Dict[str, int]:
    """Tensor name → element type, for all that the graph states."""
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    return {**types, **{tensor.name: tensor.data_type for tensor in graph.initializer}}


def half_nodes(graph: onnx.GraphProto) -> List[str]:
    """The nodes that compute in FP16, in topological order."""
    import onnx

    types = element_types(graph)
    return [
        node.name
        for node in graph.node
        if node.op_type != "Cast"
        and any(types.get(name) == onnx.TensorProto.FLOAT16 for name in (*node.input, *node.output))
    ]


def exposing(model: onnx.ModelProto, names: Sequence[str]) -> onnxruntime.InferenceSession:
    """A session whose outputs are the FP32 tensors `names`."""
    import onnx
    import onnxruntime

    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    del exposed.graph.output[:]
    single = onnx.TensorProto.FLOAT
    exposed.graph.output.extend(onnx.helper.make_tensor_value_info(name, single, None) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(exposed.SerializeToString(), options, providers=["CPUExecutionProvider"])


def marked(part: Part, model: onnx.ModelProto, names: Collection[str]) -> Tuple[Part, onnx.ModelProto]:
    """A part and its graph with the tensors `names` as outputs, too, and all outputs for the host."""
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    known = {value.name for value in graph.output}
    wanted = set(names) - known
    added = [value for value in graph.value_info if value.name in wanted]
    rest = [value for value in graph.value_info if value.name not in wanted]
    graph.output.extend(added)
    del graph.value_info[:]
    graph.value_info.extend(rest)
    half = onnx.TensorProto.FLOAT16
    outputs = [replace(tensor, internal=False) for tensor in part.outputs]
    outputs += [
        TensorSpec(value.name, "float16" if value.type.tensor_type.elem_type == half else "float32", ())
        for value in added
    ]
    return replace(part, outputs=tuple(outputs)), made


def sized(part: Part, input_sets: Sequence[Mapping[str, np.ndarray]], only: bool) -> Part:
    """The part with dims that reach to the sizes of the input sets, which need not be any that users may give; or with
    `only` these, tuned for the largest."""
    seen = [part.sizes_of({name: values.shape for name, values in inputs.items()}) for inputs in input_sets]

    def dim(known: Dim) -> Dim:
        sizes = [sizes[known.name] for sizes in seen]
        if only:
            return replace(known, minimum=min(sizes), optima=(max(sizes),), maximum=max(sizes))
        return replace(known, minimum=min(known.minimum, *sizes), maximum=max(known.maximum, *sizes))

    return replace(part, dims=tuple(map(dim, part.dims)))


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """A node and the floating-point tensors that it takes and gives, constants apart."""

    name: str
    op: str
    inputs: Sequence[str]
    outputs: Sequence[str]


@dataclass(frozen=True)
class TensorError:
    """What FP16 does to an output of `node`.

    Errors are root mean squares relative to the exact tensor's, the largest over the input sets, and infinite where a
    value is no number.

    storing  error of the exact tensor rounded to FP16; 0 where it stays in FP32
    before   largest error of the node's inputs
    error    error in the FP16 graph
    """

    part: str
    node: Node
    tensor: str
    storing: float
    before: float
    error: float

    @property
    def blame(self) -> float:
        """How much worse the tensor is than its inputs, or than a rounding, which alone would be no loss."""
        if np.isinf(self.before):  # what went wrong before is not this node's doing
            return self.storing / ROUNDING
        return max(self.storing / ROUNDING, self.error / max(self.before, ROUNDING))

    @property
    def jumps(self) -> bool:
        return self.blame > JUMP


def relative_error(exact: np.ndarray, values: np.ndarray) -> float:
    """Root mean square of the error over that of the exact values."""
    exact, values = exact.astype(np.float64), values.astype(np.float64)
    with np.errstate(invalid="ignore"):
        error, scale = np.sqrt(np.mean((values - exact) ** 2)), np.sqrt(np.mean(exact**2))
    if error == 0:
        return 0.0
    return float(error / scale) if np.isfinite(error) and scale > 0 else float("inf")


Run = Callable[[Sequence[str], int], Sequence[np.ndarray]]  # tensors, index of an input set → their values


def nodes_of(exact: onnx.GraphProto, chosen: Collection[str] = ()) -> List[Node]:
    """The nodes of a graph in FP32, in topological order, without the tensors that are `chosen`, see TensorSpec."""
    import onnx

    types = element_types(exact)
    left_out = {tensor.name for tensor in exact.initializer} | set(chosen)

    def floats(names: Sequence[str]) -> List[str]:
        return [name for name in names if types.get(name) == onnx.TensorProto.FLOAT and name not in left_out]

    return [Node(node.name, node.op_type, floats(node.input), floats(node.output)) for node in exact.node]


def tensor_errors(
    part: str,
    exact: onnx.ModelProto,
    half: onnx.ModelProto,
    input_sets: Sequence[Mapping[str, np.ndarray]],
    run: Optional[Run] = None,
    chosen: Collection[str] = (),
) -> List[TensorError]:
    """The errors of all floating-point tensors that nodes of a graph make, in topological order.

    exact, half  the graph in FP32, and in FP16 with some nodes in FP32
    run          computes the latter; a trial unless it is given
    chosen       tensors whose errors say nothing, see TensorSpec
    """
    import onnx

    half_types = element_types(half.graph)
    nodes = nodes_of(exact.graph, chosen)
    names = [name for node in nodes for name in node.outputs]
    exact_session = exposing(exact, names)
    if run is None:
        trial = exposing(rounded(half), names)
        run = lambda names, index: trial.run(names, input_sets[index])  # noqa: E731
    storing, errors = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for start in range(0, len(names), GROUP):
        group = names[start : start + GROUP]
        for index, inputs in enumerate(input_sets):
            runs = exact_session.run(group, inputs), run(group, index)
            for name, expected, values in zip(group, *runs):
                errors[name] = max(errors[name], relative_error(expected, values))
                if half_types[name] == onnx.TensorProto.FLOAT16:
                    with np.errstate(over="ignore"):
                        storing[name] = max(storing[name], relative_error(expected, expected.astype(np.float16)))
    return [
        TensorError(
            part, node, name, storing[name], max([0.0, *(errors.get(n, 0.0) for n in node.inputs)]), errors[name]
        )
        for node in nodes
        for name in node.outputs
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Search
# ---------------------------------------------------------------------------------------------------------------------

Errors = Callable[[Collection[str]], Sequence[TensorError]]  # nodes kept in FP32 → errors of all parts' tensors
Meets = Callable[[Collection[str]], bool]  # nodes kept in FP32 → whether the bars are met


def suspects(one: TensorError, measured: Sequence[TensorError]) -> List[str]:
    """The nodes whose staying in FP32 spares a tensor its error: all around it where FP16 cannot store it; else the
    node that makes it, and those that make that node's inputs."""
    nodes = [other.node for other in measured if other.part == one.part]
    if one.storing / ROUNDING > JUMP:
        return [one.node.name, *(node.name for node in nodes if one.tensor in node.inputs)]
    return [one.node.name, *(node.name for node in nodes if not set(node.outputs).isdisjoint(one.node.inputs))]


def grow(errors: Errors, meets: Meets, candidates: Sequence[str]) -> Optional[List[str]]:
    """Nodes that meet the bars by staying in FP32: candidates where most is lost, twice as many in each round; None if
    even all of them do not."""
    keep: Set[str] = set()
    count = 1
    while not meets(keep):
        measured = errors(keep)
        found = []
        for one in sorted(measured, key=lambda one: -one.blame):
            added = set(suspects(one, measured)).intersection(candidates) - keep
            if added:
                found.append((one.blame, added))
        if not found:
            return None
        infinite = [added for blame, added in found if np.isinf(blame)]  # they hide what happens behind them
        keep.update(*(infinite or [added for _, added in found[:count]]))
        count *= 1 if infinite else 2
    return [name for name in candidates if name in keep]


def shrink(keep: List[str], meets: Meets, trials: int) -> Tuple[List[str], bool]:
    """Leaves out nodes that the bars do not need: first halves of them, at last single ones, in at most `trials`.

    Returns what is left, and whether each single node has been tried.
    """
    size = max(1, len(keep) // 2)
    while True:
        start = 0
        while start < len(keep):
            if trials == 0:
                return keep, False
            trials -= 1
            rest = keep[:start] + keep[start + size :]
            if meets(rest):
                keep = rest
            else:
                start += size
        if size == 1:
            return keep, True
        size //= 2


# ---------------------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------------------


def markdown(
    measured: Sequence[TensorError],
    title: str,
    in_tensorrt: Sequence[TensorError] = (),
    built_with: Optional[Mapping[str, Optional[str]]] = None,
) -> str:
    """All tensors' errors as a table, with the jumps marked; and TensorRT's where engines were `built_with` it."""

    def mark(one: TensorError) -> str:
        return f"**× {number(one.blame)}**" if one.jumps else ""

    theirs = {(one.part, one.tensor): f"{number(one.error)} {mark(one)}".strip() for one in in_tensorrt}
    rows = [
        [
            one.part,
            code(one.node.name),
            one.node.op,
            code(one.tensor),
            *(number(value) for value in (one.storing, one.before, one.error)),
            mark(one),
            *([theirs.get((one.part, one.tensor), "")] if built_with else []),
        ]
        for one in measured
    ]
    lines = [
        f"# {title}: errors of tensors in FP16",
        "",
        "Root mean squares, relative to the exact tensor's: the error of rounding the exact tensor to FP16, the",
        f"largest among the node's inputs, and the tensor's own.  Marked: own errors of more than {JUMP} times the",
        "inputs', and roundings that lose that much more than they must.  inf: a value is no number.",
        "",
    ]
    header = ["part", "node", "operator", "tensor", "rounding", "inputs", "output", ""]
    if built_with:
        header.append(f"{built_with['tensorrt']}")
        lines += [
            f"Last column: the error in {built_with['tensorrt']} on {built_with['gpu']},"
            f" {'with' if built_with['plugins'] else 'without'} the plugin library,",
            "in engines that have all these tensors as outputs.  That hinders fusions, and stores the tensors in the",
            "types that the graph gives them: the engines that are used may err more or less.",
            "",
        ]
    return "\n".join([*lines, *table(header, rows)])
