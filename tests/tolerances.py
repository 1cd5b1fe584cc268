"""How close is right: twice the error that eager makes in the same dtype, plus a derived floor.

Truth is the eager formula in float64, on the very values that the low-precision inputs hold.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convnest_kernels.reference.common import accumulate_dtype

# A kernel forms each output with some tens of roundings in the dtype it accumulates in, where eager
# may happen to make none (float64 against itself, a map of one pixel), and rounds it once.
ROUNDINGS = 16


def bound(eager: Tensor, truth: Tensor, rows: int = 1, rstd: float = 1.0) -> float:
    """The largest error allowed beside `truth`.

    Sums over many rows grow the floor with √rows, and a LayerNorm over nearly equal channels by its
    rstd (1000 for a single channel). Inputs are of the order of 1, so a result far smaller is a
    difference of terms that are not.
    """
    eager_error = (eager.double() - truth).abs().max().item()
    scale = max(truth.abs().max().item(), 1.0)
    accumulated = torch.finfo(accumulate_dtype(eager.dtype)).eps * ROUNDINGS * math.sqrt(rows)
    floor = scale * (accumulated * max(rstd, 1.0) + torch.finfo(eager.dtype).eps)
    return 2 * eager_error + floor


# The GELU of the CUDA kernels errs by this, relative to its upper tail x·(1 − Φ(x)), which is 0.17
# at most (csrc/common/gelu.cuh).
GELU_TAIL_ERROR = {torch.bfloat16: 3.7e-4, torch.float16: 7e-6, torch.float32: 0.0}
LARGEST_GELU_TAIL = 0.17


def assert_statistics(
    mean: Tensor, rstd: Tensor, true_mean: Tensor, true_rstd: Tensor, dtype: torch.dtype
) -> None:
    """Fail where statistics of GELU(x), x of `dtype`, are further off than that GELU allows.

    An error of every element of a row moves its mean, and its standard deviation, by no more.
    """
    gelu_error = GELU_TAIL_ERROR[dtype] * LARGEST_GELU_TAIL
    torch.testing.assert_close(mean.double(), true_mean, rtol=2e-5, atol=5e-6 + gelu_error)
    torch.testing.assert_close(1 / rstd.double(), 1 / true_rstd, rtol=2e-4, atol=1e-5 + gelu_error)


def assert_accurate(
    name: str, ours: Tensor, eager: Tensor, truth: Tensor, rows: int = 1, rstd: float = 1.0
) -> None:
    """Fail, naming `name`, where `ours` is further from `truth` than `bound` (or not finite)."""
    assert ours.dtype == eager.dtype, f"{name} is {ours.dtype}, eager gives {eager.dtype}"
    assert ours.shape == truth.shape, f"{name} is {list(ours.shape)}, not {list(truth.shape)}"
    if not ours.numel():
        return
    assert ours.isfinite().all(), f"{name} has {(~ours.isfinite()).sum()} non-finite elements"
    error = (ours.double() - truth).abs()
    limit = bound(eager, truth, rows, rstd)
    worst = error.argmax().item()
    assert error.max().item() <= limit, (
        f"{name} is off by {error.max().item():.3g} at flat index {worst} "
        f"(got {ours.flatten()[worst].item():.6g}, truth {truth.flatten()[worst].item():.6g}); "
        f"allowed {limit:.3g}"
    )
