"""y = GELU(h)·Wᵀ + b, keeping h alone of the two wide tensors.

PyTorch keeps h for the GELU and GELU(h) for the linear layer. Backward needs GELU(h) once, for dW,
and forms it again:

    dg = dy·W;  dW = dyᵀ·GELU(h);  db = Σ dy;  dh = dg ⊙ GELU'(h)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import _contract
from ..reference import common
from . import matmul


def gelu_linear(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """GELU (exact erf form), then a linear layer.

    Args:
        h: [..., D].
        weight: [C, D], as nn.Linear holds it.
        bias: [C] or None.

    Returns:
        y: [..., C], in the dtype of h (of autocast, where that is on).
    """
    # A compiler chooses by itself what to keep, and a torch.func transform cannot see through a
    # Function.
    if torch.compiler.is_compiling() or _contract.transform_is_active():
        return _plain(h, weight, bias)
    if not _contract.wants_gradients(h, weight, bias):
        g = F.gelu(h)
        if common.autocast_is_on(h.device.type):
            return F.linear(g, weight, bias)
        return matmul.linear(g, weight, bias)
    if common.autocast_is_on(h.device.type) and h.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(h.device.type)
        h, weight = h.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return _GeluLinear.apply(h, weight, bias)


def _plain(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(F.gelu(h), weight, bias)


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(h, weight, bias)
        with _contract.without_autocast(h):
            return matmul.linear(F.gelu(h), weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        h, weight, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if _contract.differentiates_twice():
            return tuple(_contract.eager_gradients(_plain, (h, weight, bias), dy, needs))
        dh = dweight = dbias = None
        rows = dy.reshape(-1, dy.shape[-1])
        with _contract.without_autocast(dy):
            if needs[1]:
                dweight = matmul.outer(rows, F.gelu(h).reshape(-1, h.shape[-1]))
            if needs[2]:
                dbias = rows.sum(0)
            if needs[0]:
                dh = torch.ops.aten.gelu_backward(matmul.linear(dy, weight.t(), None), h)
        return dh, dweight, dbias
