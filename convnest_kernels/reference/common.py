"""What the eager formulas share: the depthwise convolution, LayerNorm and its statistics, NHWC."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of statistics and of parameter gradients: float32, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise k×k over [N, H, W, C], stride 1, zero padding k//2; weight is [C, 1, k, k]."""
    y = F.conv2d(
        x.permute(0, 3, 1, 2),
        weight.to(x.dtype),
        None if bias is None else bias.to(x.dtype),
        padding=(weight.shape[2] // 2, weight.shape[3] // 2),
        groups=x.shape[-1],
    )
    return y.permute(0, 2, 3, 1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Linear layer over the last axis.

    Float32 parameters beside low-precision activations are cast, but not under autocast, which
    casts them by itself and keeps what it cast.
    """
    if not autocast_is_on(x.device.type):
        weight = weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x, weight, bias)


def autocast_is_on(device: str) -> bool:
    """Whether autocast is enabled for a device type; False for types that cannot have it."""
    return _can_autocast(device) and torch.is_autocast_enabled(device)


@torch.compiler.assume_constant_result
def _can_autocast(device: str) -> bool:
    # Dynamo of torch 2.10 cannot trace what this calls.
    return torch.amp.is_autocast_available(device)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last axis; parameters are cast to the dtype of x."""
    weight = None if weight is None else weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def new_statistics(x: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised mean and rstd of the rows of x; empty if they are not kept."""
    dtype = accumulate_dtype(x.dtype)
    shape = x.shape[:-1] if keep else (0,)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def statistics(x: Tensor, eps: float, keep: bool) -> tuple[Tensor, Tensor]:
    """Mean and 1/√(var + eps) over the last axis, two-pass, as kernels keep them for backward."""
    dtype = accumulate_dtype(x.dtype)
    if not keep:
        return new_statistics(x, keep)
    variance, mean = torch.var_mean(x.to(dtype), dim=-1, correction=0)
    return mean, torch.rsqrt(variance + eps)


def gelu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """Dx of GELU(x), in the dtype of x."""
    return torch.ops.aten.gelu_backward(dy.to(x.dtype), x)


def layer_norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias of LayerNorm over the last axis, from kept statistics.

    Formed in the statistics' dtype; dx comes in the dtype of x.
    """
    dtype = mean.dtype
    dy = dy.to(dtype)
    x_hat = (x.to(dtype) - mean[..., None]) * rstd[..., None]
    dx_hat = dy if weight is None else dy * weight.to(dtype)
    dx = dx_hat - dx_hat.mean(-1, keepdim=True) - x_hat * (dx_hat * x_hat).mean(-1, keepdim=True)
    rows = tuple(range(dy.dim() - 1))
    return (dx * rstd[..., None]).to(x.dtype), (dy * x_hat).sum(rows), dy.sum(rows)


def depthwise_conv_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias of `depthwise_conv`, in the dtype of x."""
    channels, _, *kernel = weight.shape
    padding = [size // 2 for size in kernel]
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        dy.to(x.dtype).permute(0, 3, 1, 2),
        x.permute(0, 3, 1, 2),
        weight.to(x.dtype),
        [channels],
        [1, 1],
        padding,
        [1, 1],
        False,
        [0, 0],
        channels,
        [True, True, True],
    )
    return dx.permute(0, 2, 3, 1), dweight, dbias


def backend_gradients(dx: Tensor, *parameters: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Gradients as a backend gives them: contiguous, and empty where none is needed."""
    return tuple(
        grad.contiguous() if need else dx.new_empty(0)
        for grad, need in zip((dx, *parameters), needs, strict=True)
    )
