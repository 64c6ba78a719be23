"""Runs a build folder's engines on stored inputs: what test_engines.py needs of the interpreter that has TensorRT.

    python -m tests.run_engines BUILD_DIR MODEL PRECISION

For each part, reads <part>.check.npz, and leaves <part>.<precision>.outputs.npz with `<round>/<set>/<output>`: the
outputs of a first round, and of a second one after all memory was poisoned.  After the first, rounds must allocate
nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Dict

import numpy as np

from infer_trt import TensorRTExecutor
from models.chain import BuildFolder

ROUNDS = 5


def as_numpy(value: Any) -> np.ndarray:
    return value if isinstance(value, np.ndarray) else value.to_host()


def main() -> None:
    build_dir, model, precision = sys.argv[1:]
    folder = BuildFolder(Path(build_dir), model)
    executor = TensorRTExecutor(folder, precision)
    results: Dict[str, Dict[str, Any]] = {part.name: {} for part in folder.parts()}
    free = []
    for turn in range(ROUNDS):
        for call in executor.calls.values():
            for array in call.arrays.values():
                executor.cuda.memset_d8(array.address, 0xFF, int(np.prod(array.shape)) * array.dtype.itemsize)
        for part in folder.parts():
            for number, inputs in enumerate(folder.check_inputs(part)):
                outputs = executor.run(part.name, inputs)
                if turn < 2:
                    results[part.name].update({f"{turn}/{number}/{key}": as_numpy(outputs[key]) for key in outputs})
        free.append(executor.cuda.mem_get_info()[0])
    for name, outputs in results.items():
        np.savez(folder.path / f"{name}.{precision}.outputs.npz", **outputs)
    # Other processes on the GPU take and give back memory too: what this one took, it would have taken in every round.
    taken = [before - after for before, after in zip(free, free[1:])]
    assert min(taken) <= 0, f"bytes allocated in the rounds after the first: {taken}"


if __name__ == "__main__":
    main()
