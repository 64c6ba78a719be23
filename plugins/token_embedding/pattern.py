"""What a decoder's step makes of the token at position p (1) of each of its sequences (B, S) or (B, beams, S):

sequences ─ Gather(·, p) ─ (Reshape) ─ Gather(tokens, ·) ─ (·scale) ─ Add(·, Gather(positions, p)) ─ y (rows, 1, D)

The exporter puts a Reshape and a Cast between p and what it indexes; others may read these, too.  Where the token's row
is read by others, as by the choice between it and y that sinusoidal positions ask for, there is no match.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from plugins.matching import Constant, Either, Match, Op, Reshaped, Value, find, scalar

OP = "TokenEmbedding"


def of_columns(node: gs.Node) -> bool:
    rank = len(node.inputs[0].shape or ())
    return rank in (2, 3) and node.attrs.get("axis", 0) in (-1, rank - 1)


def of_rows(node: gs.Node) -> bool:
    return node.attrs.get("axis", 0) in (-2, 0) and len(node.inputs[0].shape or ()) == 2 and read_once(node)


def read_once(node: gs.Node) -> bool:
    return len(node.outputs[0].outputs) == 1


def index_of(position: Value) -> Value:
    return Either(Op("Cast", Reshaped(position)), Op("Cast", position), position)


tokens, positions = Constant(), Constant()
sequences, position, scale = Value(), Value(rank=1), Constant()
column = Op("Gather", sequences, index_of(position), where=of_columns)
token = Op("Gather", tokens, Either(Op("Reshape", column, Constant()), column), where=of_rows)
place = Op("Gather", positions, index_of(position), where=of_rows)
PATTERN = Op("Add", Either(Op("Mul", token, scale, where=read_once), token), place, rank=3)


def matches(graph: gs.Graph) -> list[Match]:
    found = []
    for bound in find(graph, PATTERN):
        integers = all(bound[value].dtype == np.int32 for value in (sequences, position))
        if not integers or bound[position].shape[0] != 1 or bound[PATTERN].shape[1] != 1:
            continue
        if bound[tokens].shape[1] != bound[positions].shape[1]:
            continue
        factor = bound.get(scale)
        if factor is not None and factor.values.size != 1:
            continue
        inputs = [bound[value] for value in (tokens, positions, sequences, position)]
        attributes = {"scale": 1.0 if factor is None else scalar(factor)}
        found.append(Match(inputs, [bound[PATTERN]], attributes, bound.nodes))
    return found
