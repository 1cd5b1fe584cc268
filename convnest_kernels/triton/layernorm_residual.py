"""layernorm_residual on Triton: scale * x + LN(t) (row_norm.py)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import row_norm, row_norm_backward


def forward(
    t: Tensor,
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return row_norm.forward(t, ln_weight, ln_bias, eps, residual=x, scale=scale, keep=keep)


def backward(
    dy: Tensor,
    t: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    dt, d_weight, d_bias, d_scale, dx = row_norm_backward.backward(
        dy,
        t,
        mean,
        rstd,
        ln_weight,
        ln_bias,
        needs=(needs[0], needs[2], needs[3]),
        residual=x,
        scale=scale,
        needs_residual=needs[1],
        needs_scale=needs[4],
    )
    return dt, dx, d_weight, d_bias, d_scale
