"""gelu_layernorm on the native CPU kernels (csrc/gelu_layernorm_cpu.cpp)."""

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
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    norm_first: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    parameters = [parameter(p, x) for p in (ln_weight, ln_bias)]
    outputs = (new_output(x), *new_statistics(x, keep))
    channels = x.shape[-1]
    _C.cpu.gelu_layernorm_forward(
        address(x),
        *map(address, parameters),
        *map(address, outputs),
        x.numel() // channels,
        channels,
        eps,
        norm_first,
        DTYPE_CODES[x.dtype],
    )
    return outputs


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
    channels = x.shape[-1]
    parameters = [parameter(p, x) for p in (ln_weight, ln_bias)]
    grads = (
        new_output(x, needs[0]),
        *(new_gradient(x, (channels,), need) for need in needs[1:]),
    )
    _C.cpu.gelu_layernorm_backward(
        *map(address, (dy, x, mean, rstd)),
        *map(address, parameters),
        *map(address, grads),
        x.numel() // channels,
        channels,
        norm_first,
        DTYPE_CODES[x.dtype],
    )
    return grads
