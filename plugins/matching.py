"""Finds subgraphs by topology.

A pattern is written as the expression that the subgraph computes.  Values that the expression uses twice are one
object, and match only if the graph uses one tensor there:

    x = Value()
    mean = Op("ReduceMean", x)
    deviation = Op("Sub", x, mean)

Matching starts at the expression's result and walks up through producers.  Names of nodes and tensors play no part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

COMMUTATIVE = ("Add", "Mul")


@dataclass(frozen=True)
class Bindings:
    """What a match binds: tensors by pattern value, and all nodes that the pattern covers."""

    tensors: dict[Value, gs.Tensor] = field(default_factory=dict)
    nodes: tuple[gs.Node, ...] = ()

    def __getitem__(self, value: Value) -> gs.Tensor:
        return self.tensors[value]

    def get(self, value: Value, default: gs.Tensor | None = None) -> gs.Tensor | None:
        return self.tensors.get(value, default)

    def binding(self, value: Value, tensor: gs.Tensor) -> Bindings:
        return Bindings({**self.tensors, value: tensor}, self.nodes)

    def covering(self, node: gs.Node) -> Bindings:
        return Bindings(self.tensors, (*self.nodes, node))


class Value:
    """Matches any tensor, or any of the given rank."""

    def __init__(self, rank: int | None = None) -> None:
        self.rank = rank

    def match(self, tensor: gs.Tensor, bindings: Bindings) -> Iterator[Bindings]:
        """Every way in which `tensor` can be this value, given what is bound already."""
        if self.rank is not None and (tensor.shape is None or len(tensor.shape) != self.rank):
            return
        bound = bindings.get(self)
        if bound is None:
            yield from self.match_producer(tensor, bindings.binding(self, tensor))
        elif bound is tensor:
            yield bindings

    def match_producer(self, tensor: gs.Tensor, bindings: Bindings) -> Iterator[Bindings]:
        yield bindings


class Constant(Value):
    """Matches a constant, or only a scalar constant that is close to `scalar`."""

    def __init__(self, scalar: float | None = None) -> None:
        super().__init__()
        self.scalar = scalar

    def match_producer(self, tensor: gs.Tensor, bindings: Bindings) -> Iterator[Bindings]:
        if isinstance(tensor, gs.Constant) and (
            self.scalar is None
            or (tensor.values.size == 1 and np.isclose(tensor.values.item(), self.scalar, rtol=1e-5))
        ):
            yield bindings


class Op(Value):
    """Matches output `output` of a node of type `op` with exactly these inputs; `where` may ask more of the node."""

    def __init__(
        self,
        op: str,
        *inputs: Value,
        output: int = 0,
        rank: int | None = None,
        where: Callable[[gs.Node], bool] = lambda node: True,
    ) -> None:
        super().__init__(rank)
        self.op, self.inputs, self.output, self.where = op, inputs, output, where

    def match_producer(self, tensor: gs.Tensor, bindings: Bindings) -> Iterator[Bindings]:
        node = producer(tensor)
        if node is None or node.op != self.op or len(node.inputs) != len(self.inputs):
            return
        if len(node.outputs) <= self.output or node.outputs[self.output] is not tensor or not self.where(node):
            return
        orders: list[Sequence[Value]] = [self.inputs]
        if self.op in COMMUTATIVE:
            orders.append(self.inputs[::-1])
        for order in orders:
            yield from match_all(order, node.inputs, bindings.covering(node))


class Reshaped(Value):
    """Matches what one or more Reshape nodes make of `inner`; the shortest chain is tried first, or the longest."""

    def __init__(self, inner: Value, rank: int | None = None, longest: bool = False) -> None:
        super().__init__(rank)
        self.inner, self.longest = inner, longest

    def match_producer(self, tensor: gs.Tensor, bindings: Bindings) -> Iterator[Bindings]:
        node = producer(tensor)
        if node is not None and node.op == "Reshape":
            covering = bindings.covering(node)
            ways = (self.inner.match, self.match_producer)
            for way in reversed(ways) if self.longest else ways:
                yield from way(node.inputs[0], covering)


class Either(Value):
    """Matches any of several forms of the same expression, as different exporters write it."""

    def __init__(self, *forms: Value) -> None:
        super().__init__()
        self.forms = forms

    def match_producer(self, tensor: gs.Tensor, bindings: Bindings) -> Iterator[Bindings]:
        for form in self.forms:
            yield from form.match(tensor, bindings)


def match_all(values: Sequence[Value], tensors: Sequence[gs.Tensor], bindings: Bindings) -> Iterator[Bindings]:
    if not values:
        yield bindings
        return
    for bound in values[0].match(tensors[0], bindings):
        yield from match_all(values[1:], tensors[1:], bound)


def producer(tensor: gs.Tensor) -> gs.Node | None:
    return tensor.inputs[0] if tensor.inputs else None


@dataclass(frozen=True)
class Match:
    """A subgraph that one plugin node can replace.

    `nodes` are all nodes that it covers.  Those that others also use stay in the graph; the rest becomes unreachable
    when the plugin node takes over `outputs`.
    """

    inputs: Sequence[gs.Tensor]
    outputs: Sequence[gs.Tensor]
    attributes: dict[str, Any]
    nodes: Sequence[gs.Node]


def find(graph: gs.Graph, pattern: Value) -> list[Bindings]:
    """One binding for every tensor that matches the pattern, in the order of the graph.

    A match inside a larger one of the same pattern (a shorter chain of Reshapes) is left out.
    """
    found: list[tuple[gs.Tensor, Bindings]] = []
    for node in graph.nodes:
        for tensor in node.outputs:
            bindings = next(pattern.match(tensor, Bindings()), None)
            if bindings is not None:
                found.append((tensor, bindings))
    inside = {id(node) for tensor, bindings in found for node in bindings.nodes if node is not producer(tensor)}
    return [bindings for tensor, bindings in found if id(producer(tensor)) not in inside]


def scalar(tensor: gs.Tensor) -> float:
    """The value of a one-element constant."""
    return float(tensor.values.item())
