"""Finds the plugins and loads the library of their kernels.

Every folder here with a `pattern.py` is a plugin:

    pattern.py     OP, the ONNX operator's name, and matches(graph), the subgraphs that it replaces; and what else the
                   properties of `Plugin` ask for
    reference.py   FUNCTION, the operator's meaning as an ONNX function body, and the same as a PyTorch function
    kernel.cu      launch_<plugin>, the same in CUDA
    plugin.cpp     how TensorRT calls it

Importing this module needs no PyTorch and no ONNX.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Dict, List, Optional, Tuple

from models.spec import Unusable

if TYPE_CHECKING:
    import onnx

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
    def default_in(self) -> Tuple[str, ...]:
        """The precisions in which surgery grafts it unasked: not where TensorRT's own layers are faster."""
        return getattr(self.pattern, "DEFAULT_IN", ("fp32", "fp16"))

    @property
    def needs_fp32(self) -> bool:
        """Whether its subgraph, where it is left as it is, must not be computed in FP16."""
        return getattr(self.pattern, "NEEDS_FP32", False)

    @property
    def reach(self) -> int:
        """How many plugins' subgraphs lie within this one's, which goes first where both match."""
        return sum(1 + find(name).reach for name in getattr(self.pattern, "FUSES", ()))

    @property
    def in_place(self) -> Dict[int, int]:
        """Output → the input whose memory it may take: the kernel then updates that instead of copying it."""
        return getattr(self.pattern, "IN_PLACE", {})

    @property
    def fp32_inputs(self) -> Tuple[int, ...]:
        """The floating-point inputs that are FP32 in every precision; outputs are that may take their memory."""
        return getattr(self.pattern, "FP32_INPUTS", ())

    @property
    def function(self) -> onnx.FunctionProto:
        """The operator as an ONNX local function; it serves any float type and computes in FP32."""
        import onnx.parser

        reference = importlib.import_module(f"plugins.{self.name}.reference")
        return onnx.parser.parse_function(reference.FUNCTION)


@cache
def _names() -> Tuple[str, ...]:
    return tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/pattern.py")))


def names() -> List[str]:
    return list(_names())


def find(name: str) -> Plugin:
    if name not in _names():
        raise Unusable(f"unknown plugin {name!r}: choose from {', '.join(names())}")
    return Plugin(name)


def of_operator(op: str) -> Plugin:
    """The plugin whose operator is called that."""
    return next(plugin for plugin in map(find, names()) if plugin.op == op)


def library_path() -> Optional[Path]:
    """libtrt_graft.so: where TRT_GRAFT_LIBRARY says, or where CMake leaves it; None if it is not there."""
    path = Path(os.environ.get("TRT_GRAFT_LIBRARY") or Path(__file__).parents[1] / "build/plugins/libtrt_graft.so")
    return path if path.is_file() else None


def load_library() -> Optional[Path]:
    """Registers the plugins with the TensorRT that this process has imported.

    Returns the library's path, or None if it is not there; raises Unusable if it does not fit this TensorRT.
    """
    path = library_path()
    if path is not None:
        try:
            ctypes.CDLL(str(path))
        except OSError as problem:
            raise Unusable(f"{path} cannot be loaded: build it for this TensorRT ({problem})") from problem
    return path
