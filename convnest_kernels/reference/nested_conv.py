"""nested_conv, eager: v = GELU(g + DW(LN(g)) + b), g = GELU(h)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .common import (
    backend_gradients,
    depthwise_conv,
    depthwise_conv_backward,
    gelu_backward,
    layer_norm,
    layer_norm_backward,
    statistics,
)


def nested_conv(
    h: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    *,
    eps: float = 1e-6,
    shortcut: bool = True,
) -> Tensor:
    """The formula of `ops.nested_conv`, in plain PyTorch and any dtype. Zero padding is of z."""
    u = _pre_activation(h, conv_weight, conv_bias, ln_weight, ln_bias, eps, shortcut)
    return F.gelu(u)


def _pre_activation(
    h: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    shortcut: bool,
) -> Tensor:
    g = F.gelu(h)
    z = layer_norm(g, ln_weight, ln_bias, eps)
    u = depthwise_conv(z, conv_weight, conv_bias)
    return g + u if shortcut else u


def forward(
    h: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    shortcut: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The eager backend's forward: v, and u, mean and rstd where they are kept."""
    u = _pre_activation(h, conv_weight, conv_bias, ln_weight, ln_bias, eps, shortcut)
    mean, rstd = statistics(F.gelu(h), eps, keep) if keep else statistics(h, eps, keep)
    v = F.gelu(u).contiguous()
    return v, u.contiguous() if keep else h.new_empty(0), mean, rstd


def backward(
    dv: Tensor,
    h: Tensor,
    u: Tensor,
    mean: Tensor,
    rstd: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    shortcut: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The eager backend's backward, after docs/math.md."""
    g = F.gelu(h)
    z = layer_norm(g, ln_weight, ln_bias, eps)
    du = gelu_backward(dv, u)
    dz, dconv_weight, dconv_bias = depthwise_conv_backward(du, z, conv_weight)
    dg, dln_weight, dln_bias = layer_norm_backward(dz, g, mean, rstd, ln_weight)
    dh = gelu_backward(dg + du if shortcut else dg, h)
    return backend_gradients(dh, dconv_weight, dconv_bias, dln_weight, dln_bias, needs=needs)
