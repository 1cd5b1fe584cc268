"""layernorm_residual on the native CPU kernels (csrc/layernorm_residual_cpu.cpp)."""

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
    t: Tensor,
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    parameters = [parameter(p, t) for p in (ln_weight, ln_bias, scale)]
    outputs = (new_output(t), *new_statistics(t, keep))
    channels = t.shape[-1]
    _C.cpu.layernorm_residual_forward(
        *map(address, (t, x)),
        *map(address, parameters),
        *map(address, outputs),
        t.numel() // channels,
        channels,
        eps,
        DTYPE_CODES[t.dtype],
    )
    return outputs


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
    channels = t.shape[-1]
    parameters = [parameter(p, t) for p in (ln_weight, scale)]
    grads = (
        new_output(t, needs[0]),
        new_output(x, needs[1]),
        *(new_gradient(t, (channels,), need) for need in needs[2:]),
    )
    _C.cpu.layernorm_residual_backward(
        *map(address, (dy, t, x, mean, rstd)),
        *map(address, parameters),
        *map(address, grads),
        t.numel() // channels,
        channels,
        DTYPE_CODES[t.dtype],
    )
    return grads
