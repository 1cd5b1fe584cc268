"""gelu_layernorm, eager: y = LN(GELU(x)) or GELU(LN(x))."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .common import (
    backend_gradients,
    gelu_backward,
    layer_norm,
    layer_norm_backward,
    statistics,
)


def gelu_layernorm(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    *,
    eps: float = 1e-6,
    norm_first: bool = False,
) -> Tensor:
    """The formula of `ops.gelu_layernorm`, in plain PyTorch and any dtype."""
    if norm_first:
        return F.gelu(layer_norm(x, ln_weight, ln_bias, eps))
    return layer_norm(F.gelu(x), ln_weight, ln_bias, eps)


def forward(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    norm_first: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The eager backend's forward: y, and mean and rstd where they are kept."""
    y = gelu_layernorm(x, ln_weight, ln_bias, eps=eps, norm_first=norm_first)
    mean, rstd = statistics(x if norm_first or not keep else F.gelu(x), eps, keep)
    return y, mean, rstd


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
    """The eager backend's backward, after docs/math.md."""
    if norm_first:
        dy = gelu_backward(dy, layer_norm(x, ln_weight, ln_bias, eps))
        dx, dln_weight, dln_bias = layer_norm_backward(dy, x, mean, rstd, ln_weight)
    else:
        dg, dln_weight, dln_bias = layer_norm_backward(dy, F.gelu(x), mean, rstd, ln_weight)
        dx = gelu_backward(dg, x)
    return backend_gradients(dx, dln_weight, dln_bias, needs=needs)
