"""LayerNorm over the channels of a row with what stands around it, forward.

    NORM_FIRST = False   a = act(x);  y = LN(a)         act = GELU or nothing
    NORM_FIRST = True    a = x;       y = act(LN(a))
    HAS_RESIDUAL         y = scale * residual + LN(x)
    LN(a) = (a - mean) * rstd * weight + bias

The statistics are two-pass in float32: the mean first, then the centred squares, over a row that
is read once and stays in registers. Serves gelu_layernorm, layernorm_residual, the second half of
dwconv_gelu_layernorm and, without y, the statistics of nested_conv.

    reads x once (and residual once); writes y once, and mean and rstd
    grid: (blocks of BLOCK_R rows,); a program walks all channels, N_BLOCKS blocks of BLOCK_C
"""

# mypy: disable-error-code="assignment, misc, var-annotated, operator, arg-type"
# Kernels are Triton's language: blocks and tuples of blocks that Python's types do not describe.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _launch, heuristics
from .math import activate, load_parameter


@triton.jit(do_not_specialize=["n_rows", "eps"])
def row_norm_fwd_kernel(
    x,  # [n_rows, C]
    residual,  # [n_rows, C] or unused
    weight,  # [C] or unused
    bias,  # [C] or unused
    scale,  # [C] or unused
    y,  # [n_rows, C] or unused
    mean,  # [n_rows] float32 or unused
    rstd,  # [n_rows] float32 or unused
    n_rows,
    C,
    eps,
    GELU: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    STORE_Y: tl.constexpr,
    STORE_STATISTICS: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    N_BLOCKS: tl.constexpr,
):
    i_r = tl.program_id(0)
    if INT64:
        i_r = i_r.to(tl.int64)
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < n_rows
    o_row = o_r[:, None] * C

    b_rows = ()
    b_sum = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i in tl.static_range(N_BLOCKS):
        o_c = i * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = m_r[:, None] & (o_c < C)[None, :]
        b_x = tl.load(x + o_row + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
        b_a = activate(b_x, GELU and not NORM_FIRST)  # GELU(0) = 0: masked lanes add nothing
        b_sum += b_a
        b_rows += (b_a,)
    b_mean = tl.sum(b_sum, 1) / C

    b_squares = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i in tl.static_range(N_BLOCKS):
        o_c = i * BLOCK_C + tl.arange(0, BLOCK_C)
        b_d = tl.where((o_c < C)[None, :], b_rows[i] - b_mean[:, None], 0.0)
        b_squares += b_d * b_d
    b_rstd = 1.0 / tl.sqrt_rn(tl.sum(b_squares, 1) / C + eps)

    if STORE_STATISTICS:
        tl.store(mean + o_r, b_mean, mask=m_r)
        tl.store(rstd + o_r, b_rstd, mask=m_r)
    if STORE_Y:
        for i in tl.static_range(N_BLOCKS):
            o_c = i * BLOCK_C + tl.arange(0, BLOCK_C)
            m_c = o_c < C
            mask = m_r[:, None] & m_c[None, :]
            b_w = load_parameter(weight, o_c, m_c, 1.0, HAS_WEIGHT)
            b_b = load_parameter(bias, o_c, m_c, 0.0, HAS_BIAS)
            b_y = (b_rows[i] - b_mean[:, None]) * b_rstd[:, None] * b_w[None, :] + b_b[None, :]
            b_y = activate(b_y, GELU and NORM_FIRST)
            if HAS_RESIDUAL:
                b_res = tl.load(residual + o_row + o_c[None, :], mask=mask, other=0.0)
                b_s = load_parameter(scale, o_c, m_c, 1.0, HAS_SCALE)
                b_y += b_s[None, :] * b_res.to(tl.float32)
            tl.store(y + o_row + o_c[None, :], b_y.to(y.dtype.element_ty), mask=mask)


def forward(
    x: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    *,
    gelu: bool = False,
    norm_first: bool = False,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    store: bool = True,
    keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernel over the rows of x; returns (y, mean, rstd), empty where not asked for."""
    channels = x.shape[-1]
    n_rows = x.numel() // channels
    tile = heuristics.row_tile(channels, 1)
    y = _launch.new_output(x, store)
    mean = _launch.new_float(x, x.shape[:-1], keep)
    rstd = torch.empty_like(mean)
    weight, bias, scale = map(_launch.parameter, (ln_weight, ln_bias, scale))

    def pointer(tensor: Tensor | None) -> Tensor:
        return x if tensor is None else tensor

    with _launch.device_of(x):
        row_norm_fwd_kernel[(-(-n_rows // tile.block_r),)](
            x,
            pointer(residual),
            pointer(weight),
            pointer(bias),
            pointer(scale),
            y,
            mean,
            rstd,
            n_rows,
            channels,
            eps,
            GELU=gelu,
            NORM_FIRST=norm_first,
            HAS_RESIDUAL=residual is not None,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            HAS_SCALE=scale is not None,
            STORE_Y=store,
            STORE_STATISTICS=keep,
            INT64=_launch.needs_int64(x),
            BLOCK_R=tile.block_r,
            BLOCK_C=tile.block_c,
            N_BLOCKS=tile.n_blocks,
            **_launch.row_options(x, tile.num_warps),
        )
    return y, mean, rstd
