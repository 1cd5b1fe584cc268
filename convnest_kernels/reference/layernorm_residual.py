"""layernorm_residual, eager: y = s ⊙ x + LN(t)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .common import (
    backend_gradients,
    layer_norm,
    layer_norm_backward,
    statistics,
)


def layernorm_residual(
    t: Tensor,
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    scale: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """The formula of `ops.layernorm_residual`, in plain PyTorch and any dtype."""
    shortcut = x if scale is None else scale.to(x.dtype) * x
    return shortcut + layer_norm(t, ln_weight, ln_bias, eps)


def forward(
    t: Tensor,
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The eager backend's forward: y, and mean and rstd where they are kept."""
    y = layernorm_residual(t, x, ln_weight, ln_bias, scale, eps=eps)
    return y, *statistics(t, eps, keep)


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
    """The eager backend's backward, after docs/math.md."""
    dt, dln_weight, dln_bias = layer_norm_backward(dy, t, mean, rstd, ln_weight)
    dx = dy.clone() if scale is None else scale.to(dy.dtype) * dy
    dscale = (dy * x).to(mean.dtype).sum(tuple(range(dy.dim() - 1)))
    return backend_gradients(dt, dx, dln_weight, dln_bias, dscale, needs=needs)
