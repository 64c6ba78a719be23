"""What this machine has: processor, GPU, and TensorRT in some interpreter."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Optional

from build_engine import gpu_name

ROOT = Path(__file__).parents[1]


def machine() -> str:
    """The processor, and the GPU that is used where one is there."""
    cpu = platform.processor() or platform.machine()
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    except OSError:
        pass
    return "; ".join([f"{cpu}, {os.cpu_count()} cores", gpu()])


def gpu() -> str:
    """The first GPU that CUDA_VISIBLE_DEVICES leaves, with its driver's version where nvidia-smi tells."""
    name = gpu_name()
    if name is None:
        return "no GPU"
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        versions = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        versions = []
    return ", driver ".join([name, *versions[:1]])  # all GPUs have one driver


def tensorrt_absent(python: str) -> Optional[str]:
    """Why TensorRT is not at hand with that interpreter, or None if it is."""
    return "no GPU" if gpu_name() is None else tensorrt_obstacle(python)


def tensorrt_obstacle(python: str) -> Optional[str]:
    """Why TensorRT cannot run here with that interpreter, or None if it can."""
    check = "import sys, infer_trt; sys.exit(infer_trt.tensorrt_obstacle())"
    try:
        done = subprocess.run([python, "-c", check], cwd=ROOT, capture_output=True, text=True)
    except OSError as problem:
        return f"{python}: {problem.strerror}"
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it crashes"])[-1]
