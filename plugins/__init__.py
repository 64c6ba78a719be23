"""Finds the plugins: every folder here with a `pattern.py` and a `reference.py` is one.

pattern.py     OP, the ONNX operator's name, and matches(graph), the subgraphs that it replaces
reference.py   FUNCTION, the operator's meaning as an ONNX function body, and the same as a PyTorch function
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType

import onnx

from models.spec import Unusable

DOMAIN = "trt_graft"  # ONNX domain and TensorRT plugin namespace
VERSION = "1"


@dataclass(frozen=True)
class Plugin:
    """One plugin folder."""

    name: str

    @cached_property
    def pattern(self) -> ModuleType:
        return importlib.import_module(f"plugins.{self.name}.pattern")

    @property
    def op(self) -> str:
        return self.pattern.OP

    @property
    def function(self) -> onnx.FunctionProto:
        """The operator as an ONNX local function; it serves any float type and computes in FP32."""
        reference = importlib.import_module(f"plugins.{self.name}.reference")
        return onnx.parser.parse_function(reference.FUNCTION)


def names() -> list[str]:
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/pattern.py"))


def find(name: str) -> Plugin:
    if name not in names():
        raise Unusable(f"unknown plugin {name!r}: choose from {', '.join(names())}")
    return Plugin(name)
