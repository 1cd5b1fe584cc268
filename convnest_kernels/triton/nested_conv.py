"""nested_conv on Triton: v = GELU(u), u = g + DW(LN(g)) + b, g = GELU(h).

Forward, two kernels: the row statistics of g (row_norm.py: reads h once), then the convolution
with LN(GELU(h)) in its prologue (depthwise.py: reads h once plus halo, writes v, and u if kept).

Backward, two kernels beside the sums of partials. The convolution's (depthwise_backward.py) reads
h, u and dv and writes p; the finishing kernel here removes the means of LN's gradient:

    du = dv GELU'(u);  dz = DW^T(du);  p = rstd w dz + du
    dh = (p - rstd (m1 + ghat m2)) GELU'(h),  ghat = (g - mean) rstd
    m1 = sum_C(w dz)/C,  m2 = sum_C(w dz ghat)/C

m1 and m2 come as one float32 pair per row and channel block of the convolution: `row_sums`.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import _launch, depthwise, depthwise_backward, heuristics, row_norm
from .math import gelu, gelu_gradient


@triton.jit(do_not_specialize=["n_rows", "n_sums"])
def nested_conv_finish_kernel(
    p,  # [n_rows, C]; p and dh may be one tensor: an element is read and written by one thread
    h,  # [n_rows, C]
    mean,  # [n_rows] float32
    rstd,  # [n_rows] float32
    row_sums,  # [n_sums, 2, n_rows] float32
    dh,  # [n_rows, C]
    n_rows,
    n_sums,
    C,
    INT64: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    N_BLOCKS: tl.constexpr,
):
    """Reads p and h once, row_sums once; writes dh once. Grid: (blocks of BLOCK_R rows,)."""
    i_r = tl.program_id(0)
    if INT64:
        i_r = i_r.to(tl.int64)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < n_rows
    b_sum = tl.zeros((BLOCK_R,), tl.float32)
    b_dot = tl.zeros((BLOCK_R,), tl.float32)
    p_sums = row_sums + o_r
    for _ in range(n_sums):
        b_sum += tl.load(p_sums, mask=m_r, other=0.0)
        b_dot += tl.load(p_sums + n_rows, mask=m_r, other=0.0)
        p_sums += n_rows.to(tl.int64) * 2
    b_mean = tl.load(mean + o_r, mask=m_r, other=0.0)[:, None]
    b_rstd = tl.load(rstd + o_r, mask=m_r, other=0.0)[:, None]
    b_sum = b_rstd * (b_sum / C)[:, None]
    b_dot = b_rstd * (b_dot / C)[:, None]
    for i in tl.static_range(N_BLOCKS):
        o_c = i * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = m_r[:, None] & (o_c < C)[None, :]
        offsets = o_r[:, None] * C + o_c[None, :]
        b_h = tl.load(h + offsets, mask=mask, other=0.0).to(tl.float32)
        b_dg = tl.load(p + offsets, mask=mask, other=0.0).to(tl.float32)
        b_dg -= b_sum + (gelu(b_h) - b_mean) * b_rstd * b_dot
        b_dh = b_dg * gelu_gradient(b_h)
        tl.store(dh + offsets, b_dh.to(dh.dtype.element_ty), mask=mask)


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
    _, mean, rstd = row_norm.forward(h, None, None, eps, gelu=True, store=False)
    u, v = depthwise.forward(
        h,
        conv_weight,
        conv_bias,
        norm=(mean, rstd, ln_weight, ln_bias),
        shortcut=shortcut,
        store_sum=keep,
        store_gelu=True,
    )
    if not keep:
        mean, rstd = mean.new_empty(0), rstd.new_empty(0)
    return v, u, mean, rstd


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
    dh, row_sums, *parameter_grads = depthwise_backward.backward(
        dv,
        h,
        conv_weight,
        total=u,
        norm=(mean, rstd, ln_weight, ln_bias),
        shortcut=shortcut,
        needs=needs,
    )
    if needs[0]:
        _finish(dh, h, mean, rstd, row_sums)
    return dh, *parameter_grads


def _finish(dh: Tensor, h: Tensor, mean: Tensor, rstd: Tensor, row_sums: Tensor) -> None:
    """Turn p, which the convolution left in dh, into dh in place."""
    channels = h.shape[-1]
    n_rows = h.numel() // channels
    tile = heuristics.row_tile(channels, 1)
    with _launch.device_of(h):
        nested_conv_finish_kernel[(-(-n_rows // tile.block_r),)](
            dh,
            h,
            mean,
            rstd,
            row_sums,
            dh,
            n_rows,
            row_sums.shape[0],
            channels,
            INT64=_launch.needs_int64(h) or _launch.needs_int64(row_sums),
            BLOCK_R=tile.block_r,
            BLOCK_C=tile.block_c,
            N_BLOCKS=tile.n_blocks,
            **_launch.row_options(h, tile.num_warps),
        )
