import ctypes

import pytest
import torch

from plugins import kernels


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 3, 50), (3, 33, 31), (1, 48, 65536), (70000, 2, 3), (1, 2_200_000, 3), (0, 4, 4)]
)
def test_kernel_is_the_transposition(shape):
    batch, rows, columns = shape
    x = torch.randn(shape, device="cuda")
    y = kernels.poisoned(x.numel() + 64, dtype=torch.float32)
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    arguments = (ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), *map(ctypes.c_int64, shape), stream)
    assert kernels.library().launch_transpose(*arguments) == 0
    assert torch.equal(y[: x.numel()].view(batch, columns, rows), x.transpose(1, 2))
    assert y[x.numel() :].isnan().all()
