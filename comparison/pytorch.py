"""The original in PyTorch, part by part, and what it and other executors return as arrays."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple

import numpy as np

from build_engine import gpu_name
from models.spec import LoadedModel, loop_of_runs

if TYPE_CHECKING:
    import torch

WARM_UPS = 3


class TorchExecutor:
    """Runs the parts' PyTorch modules, on a GPU where one is.  Internal values are tensors where the modules are.

    While `recording`, it keeps the inputs of one call of each part: the last whose number is a power of two, which lies
    in the second half.
    """

    def __init__(self, loaded: LoadedModel, precision: str, compiled: bool) -> None:
        import torch

        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # FP32 is the reference
        self.torch = torch
        self.device = "cuda" if gpu_name() else "cpu"
        self.dtype = torch.float16 if precision == "fp16" else torch.float32
        loaded.to(self.device, self.dtype)
        self.parts = {exportable.part.name: exportable.part for exportable in loaded.parts}
        self.modules: Dict[str, Any] = {exportable.part.name: exportable.module for exportable in loaded.parts}
        if compiled:
            mode = "reduce-overhead" if self.device == "cuda" else "default"
            self.modules = {name: torch.compile(module, mode=mode) for name, module in self.modules.items()}
        self.compiled = compiled
        self.recording = False
        self.recorded: Dict[str, Dict[str, np.ndarray]] = {}
        self.calls: Counter[str] = Counter()

    def tensors(self, part: str, inputs: Mapping[str, Any]) -> List[torch.Tensor]:
        """The inputs of a part on the device; floating-point ones in the module's type."""
        tensors = [self.torch.as_tensor(inputs[tensor.name]).to(self.device) for tensor in self.parts[part].inputs]
        return [tensor.to(self.dtype) if tensor.is_floating_point() else tensor for tensor in tensors]

    def run(self, part: str, inputs: Mapping[str, Any]) -> Dict[str, Any]:
        if self.recording:
            self.calls[part] += 1
            if self.calls[part] & (self.calls[part] - 1) == 0:
                self.recorded[part] = {name: as_numpy(value) for name, value in inputs.items()}
        with self.torch.inference_mode():
            outputs = self.modules[part](*self.tensors(part, inputs))
        values = outputs if isinstance(outputs, tuple) else (outputs,)
        return {
            # a compiled module overwrites what it returned before
            tensor.name: (value.clone() if self.compiled else value) if tensor.internal else as_numpy(value)
            for tensor, value in zip(self.parts[part].outputs, values)
        }

    def loop(
        self, part: str, inputs: Mapping[str, Any], carried: Mapping[str, str], times: int, until: Optional[str] = None
    ) -> Dict[str, Any]:
        return loop_of_runs(self, part, inputs, carried, times, until)

    def limits(self, part: str) -> Mapping[str, Tuple[int, int]]:
        return self.parts[part].limits()

    def latencies(self, part: str, inputs: Mapping[str, Any], repeats: int) -> List[float]:
        tensors, measured = self.tensors(part, inputs), []
        with self.torch.inference_mode():
            for _ in range(WARM_UPS + repeats):
                self.synchronize()
                started = time.perf_counter()
                self.modules[part](*tensors)
                self.synchronize()
                measured.append((time.perf_counter() - started) * 1e3)
        return measured[WARM_UPS:]

    def synchronize(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def zeros(self, part: str, name: str, dims: Mapping[str, int]) -> torch.Tensor:
        tensor = next(tensor for tensor in self.parts[part].inputs if tensor.name == name)
        return self.torch.zeros(tensor.sizes(dims), dtype=self.dtype, device=self.device)

    def rows(self, value: torch.Tensor, indices: np.ndarray) -> torch.Tensor:
        return value[self.torch.from_numpy(indices).to(self.device)]


def as_numpy(value: Any) -> np.ndarray:
    """A value of any executor on the host; floating-point ones in FP32."""
    if hasattr(value, "to_host"):
        value = value.to_host()
    elif not isinstance(value, np.ndarray):
        value = value.cpu().numpy()
    return value.astype(np.float32) if value.dtype.kind == "f" else value
