"""layernorm_residual on the CUDA kernels (csrc/layernorm_residual.cu)."""

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
    t: Tensor,
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    channels = t.shape[-1]
    outputs = (new_output(t), *new_statistics(t, keep))
    launch(
        "layernorm_residual_forward",
        [t, x, *(parameter(p, t) for p in (ln_weight, ln_bias, scale))],
        outputs,
        t.numel() // channels,
        channels,
        eps,
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
    rows = t.numel() // channels
    grads = (
        new_output(t, needs[0]),
        new_output(x, needs[1]),
        *(new_gradient(t, (channels,), need) for need in needs[2:]),
    )
    size = core().layernorm_residual_backward_workspace(rows, channels)
    launch(
        "layernorm_residual_backward",
        [dy, t, x, mean, rstd, *(parameter(p, t) for p in (ln_weight, scale))],
        [*grads, workspace(t, size)],
        rows,
        channels,
    )
    return grads
