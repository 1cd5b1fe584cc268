"""dwconv_gelu_layernorm on the CUDA kernels (csrc/dwconv_gelu_layernorm.cu, …_bwd.cu)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._host import (
    core,
    dtype_code,
    launch,
    new_gradient,
    new_output,
    new_statistics,
    parameter,
    workspace,
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
    # The norm reads c, whether backward will want it or not.
    y, c, (mean, rstd) = new_output(x), new_output(x), new_statistics(x, keep)
    launch(
        "dwconv_gelu_layernorm_forward",
        [x, *parameters],
        [y, c, *((mean, rstd) if keep else (None, None))],
        *x.shape,
        conv_weight.shape[2],
        eps,
        activation == "gelu",
        norm_first,
    )
    return y, c if keep else new_output(x, False), mean, rstd


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
    channels, kernel_size = (x.shape[-1],), conv_weight.shape[2]
    shapes = (tuple(conv_weight.shape), channels, channels, channels)
    parameters = [parameter(p, x) for p in (conv_weight, ln_weight, ln_bias)]
    grads = (
        new_output(x, needs[0]),
        *(new_gradient(x, shape, need) for shape, need in zip(shapes, needs[1:], strict=True)),
    )
    size = core().dwconv_gelu_layernorm_backward_workspace(*x.shape, kernel_size, dtype_code(x))
    launch(
        "dwconv_gelu_layernorm_backward",
        [dy, x, c, mean, rstd, *parameters],
        [*grads, workspace(x, size)],
        *x.shape,
        kernel_size,
        activation == "gelu",
        norm_first,
    )
    return grads
