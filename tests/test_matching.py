"""Patterns on small graphs made by hand."""

import numpy as np
import onnx_graphsurgeon as gs

from plugins.matching import Constant, Either, Op, Reshaped, Value, find


def graph_of(*lines: str) -> gs.Graph:
    """A graph from lines such as `Mul a 0.5 -> out`: numbers are constants, and `name:3` is a tensor of rank 3."""
    tensors: dict[str, gs.Tensor] = {}

    def tensor(word: str) -> gs.Tensor:
        name, _, rank = word.partition(":")
        if name not in tensors:
            if name[0] in "-.0123456789":
                tensors[name] = gs.Constant(name, np.array([float(value) for value in name.split(",")], np.float32))
            else:
                tensors[name] = gs.Variable(name, np.float32, [2] * int(rank or 1))
        return tensors[name]

    nodes = []
    for line in lines:
        expression, _, outputs = line.partition(" -> ")
        op, *inputs = expression.split()
        nodes.append(gs.Node(op, "", inputs=[tensor(word) for word in inputs], outputs=[*map(tensor, outputs.split())]))
    return gs.Graph(nodes)


def count(pattern: Value, *lines: str) -> int:
    return len(find(graph_of(*lines), pattern))


def test_a_value_used_twice_is_one_tensor():
    x = Value()
    assert count(Op("Mul", x, x), "Mul a a -> out") == 1
    assert count(Op("Mul", x, x), "Mul a b -> out") == 0


def test_operands_of_a_sum_may_be_swapped_but_not_those_of_a_difference():
    x = Value()
    (bound,) = find(graph_of("Add 2 a -> out"), Op("Add", x, Constant(2)))
    assert bound[x].name == "a"
    assert count(Op("Sub", x, Constant(2)), "Sub 2 a -> out") == 0
    assert count(Op("Sub", x, Constant(2)), "Sub a 2 -> out") == 1


def test_a_wrong_order_tried_first_is_undone():
    """Both operands are products; only the second order fits, which shows deep inside."""
    x, y = Value(), Value()
    pattern = Op("Add", Op("Mul", x, Constant(2)), Op("Mul", y, Constant(3)))
    (bound,) = find(graph_of("Mul a 3 -> p", "Mul b 2 -> q", "Add p q -> out"), pattern)
    assert (bound[x].name, bound[y].name) == ("b", "a")
    assert len(bound.nodes) == 3


def test_constants_are_compared_by_value():
    for value, expected in (("0.5", 1), ("0.5000001", 1), ("0.51", 0), ("0.5,0.5", 0), ("b", 0)):
        assert count(Op("Mul", Value(), Constant(0.5)), f"Mul a {value} -> out") == expected
    assert count(Op("Mul", Value(), Constant()), "Mul a 0.5,0.7 -> out") == 1
    assert count(Op("Mul", Value(), Constant()), "Mul a b -> out") == 0


def test_outputs_of_a_node_are_told_apart():
    x = Value()
    pattern = Op("Sub", Op("Split", x, output=0), Op("Split", x, output=1))
    assert count(pattern, "Split a -> p q", "Sub p q -> out") == 1
    assert count(pattern, "Split a -> p q", "Sub q p -> out") == 0


def test_chains_of_reshapes():
    lines = (
        "Relu a:2 -> b:2",
        "Reshape b 2,2 -> c:2",
        "Reshape c 2,2 -> d:2",
        "Reshape d 2,2 -> e:2",
        "Relu e -> out:2",
    )

    def covered(pattern):
        (bound,) = find(graph_of(*lines), pattern)
        return [node.outputs[0].name for node in bound.nodes]

    assert covered(Op("Relu", Reshaped(Value(rank=2)))) == ["out", "e"]
    assert covered(Op("Relu", Reshaped(Value(rank=2), longest=True))) == ["out", "e", "d", "c"]
    # the whole chain up to the Relu, whichever is tried first; its inner links are no matches of their own
    assert covered(Reshaped(Op("Relu", Value()))) == ["e", "d", "c", "b"]


def test_either_form_matches():
    x = Value()
    pattern = Either(Op("Neg", x), Op("Mul", x, Constant(-1)))
    assert count(pattern, "Neg a -> out") == count(pattern, "Mul -1 a -> out") == 1
    assert count(pattern, "Mul 2 a -> out") == 0


def test_names_do_not_matter_and_every_occurrence_is_found():
    x = Value()
    graph = graph_of("Relu a -> b", "Relu b -> c", "Relu c -> d")
    for node in graph.nodes:
        node.name = "same"
    assert [bound[x].name for bound in find(graph, Op("Relu", x))] == ["a", "b", "c"]
