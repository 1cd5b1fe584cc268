"""Linear layers by oneDNN, where torch would take an MKL that this processor runs at half speed.

MKL keeps its AVX-512 kernels to Intel's processors. On one Zen 5 core, at the shapes of ConvNeXt-T
and batch 8, oneDNN's float32 kernels, which torch brings for its compiler, are 1.3 to 3.2 times as
fast, most of them twice (`python -m bench.adoption --matmul --threads 1`). Elsewhere these
functions are torch's own.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import _contract
from ..reference import common


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x·Wᵀ + b, without autograd: x [..., K], weight [N, K], bias [N] or None."""
    if x.dtype == weight.dtype == torch.float32 and x.numel() and _onednn_is_faster(x.device.type):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def outer(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ·b, contiguous, without autograd: a [R, A], b [R, B], result [A, B]."""
    if a.shape[1] > b.shape[1]:  # the kernel is faster by far with the short side in front
        return linear(b.t(), a.t(), None).t().contiguous()
    return linear(a.t(), b.t(), None)


def differentiable_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` with gradients."""
    if (
        torch.compiler.is_compiling()
        or x.dtype != torch.float32
        or common.autocast_is_on(x.device.type)
        or not _onednn_is_faster(x.device.type)
        or _contract.transform_is_active()
    ):
        return F.linear(x, weight, bias)
    if _contract.wants_gradients(x, weight, bias):
        return _Linear.apply(x, weight, bias)
    return linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if _contract.differentiates_twice():
            return tuple(_contract.eager_gradients(F.linear, (x, weight, bias), dy, needs))
        rows = dy.reshape(-1, dy.shape[-1])
        dx = linear(dy, weight.t(), None) if needs[0] else None
        dweight = outer(rows, x.reshape(-1, x.shape[-1])) if needs[1] else None
        return dx, dweight, rows.sum(0) if needs[2] else None


def _onednn_is_faster(device: str) -> bool:
    return device == "cpu" and _mkl_is_slow() and torch._C._get_mkldnn_enabled()


@functools.cache
def _mkl_is_slow() -> bool:
    if not torch.backends.mkl.is_available() or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    path = Path("/proc/cpuinfo")
    return path.exists() and "AuthenticAMD" in path.read_text()
