"""The kernels' C functions, called from Python with PyTorch tensors: how tests and benchmarks reach them without
TensorRT.

    cmake -S plugins -B build/plugins -G Ninja -D TRT_GRAFT_KERNELS_ONLY=ON && ninja -C build/plugins
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from plugins import library_path

# the order of trt_graft::DataType
DATA_TYPES = {torch.float32: 0, torch.float16: 1}


@functools.cache
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(library_path()))


def launch(plugin: str, dtype: torch.dtype, *arguments: Tensor | int | float) -> None:
    """Calls `launch_<plugin>(type, arguments…, stream)` on PyTorch's current stream; raises RuntimeError if it fails.

    Tensors, which must be contiguous and on the GPU, pass as pointers, sizes as int64, flags as int32.
    """
    function = getattr(library(), f"launch_{plugin}")
    if beside_copies:
        start_copies()
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    error = function(ctypes.c_int32(DATA_TYPES[dtype]), *map(as_c, arguments), stream)
    if error:
        raise RuntimeError(f"launch_{plugin} failed with CUDA error {error}")


beside_copies = False  # whether `launch` calls `start_copies` first


@contextlib.contextmanager
def busy_memory() -> Iterator[None]:
    """Meanwhile, `launch` starts copies on another stream first, which share multiprocessors with the kernel.

    What a kernel loads and stores takes longer there: some races show nowhere else.
    """
    global beside_copies
    beside_copies = True
    try:
        yield
    finally:
        beside_copies = False


@functools.cache
def copied() -> tuple[torch.cuda.Stream, Tensor, Tensor]:
    """A stream for copies, their source and their target."""
    source, target = (torch.zeros(1 << 28, dtype=torch.uint8, device="cuda") for _ in range(2))
    return torch.cuda.Stream(), source, target


def start_copies() -> None:
    """Starts copies that keep an H100's memory busy for about two milliseconds."""
    stream, source, target = copied()
    with torch.cuda.stream(stream):
        for _ in range(10):
            target.copy_(source)


def as_c(argument: Tensor | int | float) -> ctypes._SimpleCData:
    if isinstance(argument, Tensor):
        assert argument.is_cuda
        assert argument.is_contiguous()
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, bool):
        return ctypes.c_int32(argument)
    return ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_float(argument)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    """An output on the GPU full of NaN: an element that a kernel leaves out shows."""
    return torch.full(shape, torch.nan, dtype=dtype, device="cuda")


def pitch(channels: int, dtype: torch.dtype) -> int:
    """Elements from one pixel of an image to the next, as in `common/launch.h`."""
    return -(-channels // 8) * 8 if dtype == torch.float16 else channels


def channel_last(x: Tensor) -> Tensor:
    """An image (B, C, H, W) as the kernels take it: (B, H, W, pitch), the padding poisoned with NaN."""
    batch, channels, height, width = x.shape
    image = poisoned(batch, height, width, pitch(channels, x.dtype), dtype=x.dtype)
    image[..., :channels] = x.permute(0, 2, 3, 1)
    return image


def channel_first(y: Tensor, channels: int) -> Tensor:
    """An image (B, H, W, pitch) that a kernel has made as (B, C, H, W); its padding must be zeros."""
    assert not y[..., channels:].any()
    return y[..., :channels].permute(0, 3, 1, 2).contiguous()


# A kernel sums in FP32 and rounds once; only FP16 depthwise convolutions sum in FP16.  FP32 sums in another order than
# PyTorch's differ by some units in the last place; FP16 results by half a unit, or by one where the FP32 values
# straddle a boundary.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3}


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal shape and type, all finite, and equal within TOLERANCE of the largest value."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.cpu().double(), expected.cpu().double(), rtol=0, atol=TOLERANCE[actual.dtype] * scale
    )
