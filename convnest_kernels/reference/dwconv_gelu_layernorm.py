"""dwconv_gelu_layernorm, eager: y = LN(act(c)) or act(LN(c)), c = DW(x) + b."""

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


def dwconv_gelu_layernorm(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    *,
    eps: float = 1e-6,
    activation: str = "gelu",
    norm_first: bool = False,
) -> Tensor:
    """The formula of `ops.dwconv_gelu_layernorm`, in plain PyTorch and any dtype."""
    c = depthwise_conv(x, conv_weight, conv_bias)
    return _activate_and_normalize(c, ln_weight, ln_bias, eps, activation, norm_first)


def _activate_and_normalize(
    c: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    activation: str,
    norm_first: bool,
) -> Tensor:
    if norm_first:
        return _activate(layer_norm(c, ln_weight, ln_bias, eps), activation)
    return layer_norm(_activate(c, activation), ln_weight, ln_bias, eps)


def _activate(x: Tensor, activation: str) -> Tensor:
    return F.gelu(x) if activation == "gelu" else x


def forward(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    activation: str,
    norm_first: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The eager backend's forward: y, and c, mean and rstd where they are kept."""
    c = depthwise_conv(x, conv_weight, conv_bias).contiguous()
    y = _activate_and_normalize(c, ln_weight, ln_bias, eps, activation, norm_first)
    normalized = _activate(c, "none" if norm_first or not keep else activation)
    mean, rstd = statistics(normalized, eps, keep)
    return y, c if keep else x.new_empty(0), mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    c: Tensor,
    mean: Tensor,
    rstd: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    activation: str,
    norm_first: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The eager backend's backward, after docs/math.md."""
    if norm_first:
        if activation == "gelu":
            dy = gelu_backward(dy, layer_norm(c, ln_weight, ln_bias, eps))
        dc, dln_weight, dln_bias = layer_norm_backward(dy, c, mean, rstd, ln_weight)
    else:
        a = _activate(c, activation)
        dc, dln_weight, dln_bias = layer_norm_backward(dy, a, mean, rstd, ln_weight)
        if activation == "gelu":
            dc = gelu_backward(dc, c)
    dx, dconv_weight, dconv_bias = depthwise_conv_backward(dc, x, conv_weight)
    return backend_gradients(dx, dconv_weight, dconv_bias, dln_weight, dln_bias, needs=needs)
