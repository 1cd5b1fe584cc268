"""dwconv_gelu_layernorm on Triton: LN(act(c)) or act(LN(c)), c = DW(x) + b.

LayerNorm needs whole rows, a convolution tile has a few channels: so two kernels each way. Forward:
the convolution reads x and writes c; the row kernel reads c and writes y. Backward: the row kernel
reads dy and c and writes dc (row_norm_backward.py, which also sums the bias gradient); the
convolution reads dc and x and writes dx. Without `keep`, c is workspace: one tensor like x.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import depthwise, depthwise_backward, row_norm, row_norm_backward


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
    c, _ = depthwise.forward(x, conv_weight, conv_bias, store_sum=True, store_gelu=False)
    y, mean, rstd = row_norm.forward(
        c, ln_weight, ln_bias, eps, gelu=activation == "gelu", norm_first=norm_first, keep=keep
    )
    return y, c if keep else x.new_empty(0), mean, rstd


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
    needs_x, needs_conv_weight, needs_conv_bias, needs_ln_weight, needs_ln_bias = needs
    needs_conv = needs_x or needs_conv_weight
    dc, d_ln_weight, d_ln_bias, d_conv_bias, _ = row_norm_backward.backward(
        dy,
        c,
        mean,
        rstd,
        ln_weight,
        ln_bias,
        needs=(needs_conv, needs_ln_weight, needs_ln_bias),
        gelu=activation == "gelu",
        norm_first=norm_first,
        sum_dx=needs_conv_bias,
    )
    if needs_conv:
        dx, _, d_conv_weight, *_ = depthwise_backward.backward(
            dc, x, conv_weight, needs=(needs_x, needs_conv_weight, False, False, False)
        )
    else:
        dx, d_conv_weight = x.new_empty(0), mean.new_empty(0)
    return dx, d_conv_weight, d_conv_bias, d_ln_weight, d_ln_bias
