"""gelu_layernorm on Triton: LN(GELU(x)), or GELU(LN(x)) with norm_first (row_norm.py)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import row_norm, row_norm_backward


def forward(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    norm_first: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return row_norm.forward(x, ln_weight, ln_bias, eps, gelu=True, norm_first=norm_first, keep=keep)


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    norm_first: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    dx, d_weight, d_bias, _, _ = row_norm_backward.backward(
        dy,
        x,
        mean,
        rstd,
        ln_weight,
        ln_bias,
        needs=(needs[0], needs[1], needs[2]),
        gelu=True,
        norm_first=norm_first,
    )
    return dx, d_weight, d_bias
