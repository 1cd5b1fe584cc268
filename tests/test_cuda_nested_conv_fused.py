"""nested_conv's backward on CUDA in two wide kernels: where it runs, and against three kernels."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch

from tests import emulation
from tests import test_cuda_nested_conv as nested

pytestmark = nested.pytestmark

SCHEDULES = (nested.TWO_KERNELS, nested.TWO_KERNELS_AHEAD, nested.TWO_KERNELS_TIGHT)


def test_two_kernels_run_where_their_shared_memory_fits():
    fuses = emulation.library().nested_conv_bwd_fuses
    for size in (3, 5, 7):
        assert all(fuses(size, shared_bytes) for shared_bytes in SCHEDULES)
    assert not fuses(7, nested.THREE_KERNELS) and not fuses(9, 227 * 1024)


@pytest.mark.parametrize(
    "case",
    # More channels are more blocks of the same.
    [
        case
        for case in nested.CASES
        if case.keep and nested.takes_two_kernels(case) and case.shape[-1] <= 32
    ],
    ids=str,
)
def test_two_kernels_give_the_same_bits_on_every_schedule(case):
    inputs = nested.arguments(case)
    dv = torch.randn(case.shape).to(case.dtype)
    kept = nested.forward(case, *inputs)
    results = []
    for shared_bytes in SCHEDULES:
        with emulation.device(shared_bytes):
            results.append(nested.backward(case, dv, kept, inputs))
    for overlapped, ahead, direct in zip(*results, strict=True):
        assert torch.equal(overlapped, ahead) and torch.equal(overlapped, direct)


@pytest.mark.parametrize("cancels", [False, True], ids=["random", "means_cancel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_two_kernels_err_little_more_than_three(dtype, cancels):
    """p rounds once more; also where a row's mean is most of what p holds."""
    case = nested.Case((1, 14, 14, 96), dtype=dtype, shortcut=False)
    h, conv_weight, conv_bias, ln_weight, ln_bias = nested.arguments(case)
    dv = torch.randn(case.shape)
    if cancels:
        conv_weight = conv_weight[:1] + 0.01 * torch.randn_like(conv_weight)
        conv_bias, ln_weight = torch.full_like(conv_bias, 3), 1 + 0.01 * torch.randn(96)
        dv = torch.randn(1, 14, 14, 1) + 0.02 * dv
    inputs, dv = (h, conv_weight, conv_bias, ln_weight, ln_bias), dv.to(dtype)
    kept = nested.forward(case, *inputs)
    wide = nested.double(*inputs)
    truth = nested.eager_backward(case, dv.double(), nested.eager_forward(case, *wide), wide)
    errors = []
    for shared_bytes in (nested.TWO_KERNELS, nested.THREE_KERNELS):
        with emulation.device(shared_bytes):
            ours = nested.backward(case, dv, kept, inputs)
        errors.append([(a.double() - b).norm() for a, b in zip(ours, truth, strict=True)])
    for name, two, three in zip(nested.BwdParams.outputs, *errors, strict=True):
        assert two <= 1.5 * three, name


@pytest.mark.parametrize("shortcut", [True, False])
def test_two_kernels_keep_no_wide_tensor(shortcut):
    """p lies where dh will: the workspace is the row sums and the parameters' partial sums."""
    case = nested.Case((4, 28, 28, 576), shortcut=shortcut)
    N, H, W, C = case.shape
    lib = emulation.library()
    lib.nested_conv_bwd_workspace.restype = ctypes.c_size_t
    params = nested.BwdParams(N=N, H=H, W=W, C=C, shortcut=shortcut)

    def workspace() -> int:
        return lib.nested_conv_bwd_workspace(
            ctypes.byref(params), 7, emulation.TYPES.index(case.dtype)
        )

    pass_bytes = 2 * math.prod(case.shape)
    params.dh = 16
    with emulation.device(nested.TWO_KERNELS):
        with_dh = workspace()
        params.dh = None
        row_sums = 8 * N * H * W * C // 16
        assert with_dh - workspace() == row_sums
        assert row_sums == pass_bytes // 4
        items = (with_dh - row_sums) // (4 * C * (49 + 1 + 2))
        assert (with_dh - row_sums) % (4 * C * (49 + 1 + 2)) == 0 and 1 <= items <= 32
    with emulation.device(nested.THREE_KERNELS):
        assert workspace() > 2 * pass_bytes
