"""nested_conv on the native CPU kernels (csrc/nested_conv_cpu.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._host import (
    _C,
    DTYPE_CODES,
    address,
    new_gradient,
    new_output,
    new_statistics,
    parameter,
)


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
    parameters = [parameter(p, h) for p in (conv_weight, conv_bias, ln_weight, ln_bias)]
    outputs = (new_output(h), new_output(h, keep), *new_statistics(h, keep))
    _C.cpu.nested_conv_forward(
        address(h),
        *map(address, parameters),
        *map(address, outputs),
        *h.shape,
        conv_weight.shape[2],
        eps,
        shortcut,
        DTYPE_CODES[h.dtype],
    )
    return outputs


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
    channels = (h.shape[-1],)
    shapes = (tuple(conv_weight.shape), channels, channels, channels)
    parameters = [parameter(p, h) for p in (conv_weight, ln_weight, ln_bias)]
    grads = (
        new_output(h, needs[0]),
        *(new_gradient(h, shape, need) for shape, need in zip(shapes, needs[1:], strict=True)),
    )
    _C.cpu.nested_conv_backward(
        *map(address, (dv, h, u, mean, rstd)),
        *map(address, parameters),
        *map(address, grads),
        *h.shape,
        conv_weight.shape[2],
        shortcut,
        DTYPE_CODES[h.dtype],
    )
    return grads
