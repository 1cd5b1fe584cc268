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
