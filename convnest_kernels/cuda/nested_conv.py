"""nested_conv on the CUDA kernels (csrc/nested_conv.cu, csrc/nested_conv_bwd.cu)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._host import (
    launch,
    new_gradient,
    new_output,
    new_statistics,
    parameter,
    workspace,
    workspace_bytes,
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
    # The convolution reads the statistics, whether backward will want them or not.
    v, u, mean, rstd = new_output(h), new_output(h, keep), *new_statistics(h, True)
    launch(
        "nested_conv_forward",
        [h, *parameters],
        [v, u, mean, rstd],
        *h.shape,
        conv_weight.shape[2],
        eps,
        shortcut,
    )
    return v, u, *((mean, rstd) if keep else new_statistics(h, False))


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
    channels, kernel_size = (h.shape[-1],), conv_weight.shape[2]
    shapes = (tuple(conv_weight.shape), channels, channels, channels)
    parameters = [parameter(p, h) for p in (conv_weight, ln_weight, ln_bias)]
    grads = (
        new_output(h, needs[0]),
        *(new_gradient(h, shape, need) for shape, need in zip(shapes, needs[1:], strict=True)),
    )
    size = workspace_bytes(
        "nested_conv_backward_workspace", [dv, h, u, grads[0]], *h.shape, kernel_size
    )
    launch(
        "nested_conv_backward",
        [dv, h, u, mean, rstd, *parameters],
        [*grads, workspace(h, size)],
        *h.shape,
        kernel_size,
        shortcut,
    )
    return grads
