"""dwconv_gelu_layernorm on the native CPU kernels (csrc/dwconv_gelu_layernorm_cpu.cpp)."""

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
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    activation: str,
    norm_first: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parameters = [parameter(p, x) for p in (conv_weight, conv_bias, ln_weight, ln_bias)]
    outputs = (new_output(x), new_output(x, keep), *new_statistics(x, keep))
    _C.cpu.dwconv_gelu_layernorm_forward(
        address(x),
        *map(address, parameters),
        *map(address, outputs),
        *x.shape,
        conv_weight.shape[2],
        eps,
        activation == "gelu",
        norm_first,
        DTYPE_CODES[x.dtype],
    )
    return outputs


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
    channels = (x.shape[-1],)
    shapes = (tuple(conv_weight.shape), channels, channels, channels)
    parameters = [parameter(p, x) for p in (conv_weight, ln_weight, ln_bias)]
    grads = (
        new_output(x, needs[0]),
        *(new_gradient(x, shape, need) for shape, need in zip(shapes, needs[1:], strict=True)),
    )
    _C.cpu.dwconv_gelu_layernorm_backward(
        *map(address, (dy, x, c, mean, rstd)),
        *map(address, parameters),
        *map(address, grads),
        *x.shape,
        conv_weight.shape[2],
        activation == "gelu",
        norm_first,
        DTYPE_CODES[x.dtype],
    )
    return grads
