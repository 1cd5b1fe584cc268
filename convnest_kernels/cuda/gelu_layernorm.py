"""gelu_layernorm on the CUDA kernels (csrc/gelu_layernorm.cu)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._host import (
    core,
    launch,
    new_gradient,
    new_output,
    new_statistics,
    parameter,
    workspace,
)


def forward(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    norm_first: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    channels = x.shape[-1]
    outputs = (new_output(x), *new_statistics(x, keep))
    launch(
        "gelu_layernorm_forward",
        [x, *(parameter(p, x) for p in (ln_weight, ln_bias))],
        outputs,
        x.numel() // channels,
        channels,
        eps,
        norm_first,
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
    rows = x.numel() // channels
    grads = (
        new_output(x, needs[0]),
        *(new_gradient(x, (channels,), need) for need in needs[1:]),
    )
    size = core().gelu_layernorm_backward_workspace(rows, channels)
    launch(
        "gelu_layernorm_backward",
        [dy, x, mean, rstd, *(parameter(p, x) for p in (ln_weight, ln_bias))],
        [*grads, workspace(x, size)],
        rows,
        channels,
        norm_first,
    )
    return grads
