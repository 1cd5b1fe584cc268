"""LayerNorm over the channels of a row with what stands around it, backward.

    ahat = (a - mean) * rstd                               a = act(x), or x if NORM_FIRST
    dz   = dy                                              dy * act'(weight * ahat + bias) if so
    da   = rstd * (w dz - sum_C(w dz)/C - ahat * sum_C(w dz ahat)/C)
    dx   = da * act'(x)                                    da if NORM_FIRST
    dweight = sum dz ahat;  dbias = sum dz;  dsum = sum dx           over the rows
    dresidual = scale * dy;  dscale = sum dy residual                with HAS_RESIDUAL

Reads dy and x once (residual once for dscale); writes dx once (dresidual once).
Partials: [n_programs, 3, C] float32 of (dweight, dbias, and dsum or dscale), summed in a fixed
order by a second kernel.
Grid: (n_programs,); program i takes the row blocks i, i + n_programs, ... and all channels.
"""

# mypy: disable-error-code="assignment, misc, var-annotated, operator, arg-type"
# Kernels are Triton's language: blocks and tuples of blocks that Python's types do not describe.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import _launch, heuristics
from .math import activate, load_parameter, scaled


@triton.jit(do_not_specialize=["n_rows"])
def row_norm_bwd_kernel(
    dy,  # [n_rows, C]
    x,  # [n_rows, C]
    residual,  # [n_rows, C] or unused
    mean,  # [n_rows] float32
    rstd,  # [n_rows] float32
    weight,  # [C] or unused
    bias,  # [C] or unused
    scale,  # [C] or unused
    dx,  # [n_rows, C] or unused
    dresidual,  # [n_rows, C] or unused
    partials,  # [n_programs, 3, C] float32
    n_rows,
    C,
    GELU: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    STORE_DX: tl.constexpr,
    STORE_DRESIDUAL: tl.constexpr,
    SUM_AFFINE: tl.constexpr,
    SUM_DX: tl.constexpr,
    SUM_SCALE: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    N_BLOCKS: tl.constexpr,
):
    i_p = tl.program_id(0)
    n_programs = tl.num_programs(0)
    zero = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    d_weight = ()
    d_bias = ()
    d_third = ()
    for _ in tl.static_range(N_BLOCKS):
        d_weight += (zero,)
        d_bias += (zero,)
        d_third += (zero,)

    for i_r in range(i_p, tl.cdiv(n_rows, BLOCK_R), n_programs):
        o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
        if INT64:
            o_r = o_r.to(tl.int64)
        m_r = o_r < n_rows
        o_row = o_r[:, None] * C
        b_mean = tl.load(mean + o_r, mask=m_r, other=0.0)[:, None]
        b_rstd = tl.load(rstd + o_r, mask=m_r, other=0.0)[:, None]

        b_wdz = ()
        b_ahat = ()
        b_x = ()
        b_sum = zero
        b_dot = zero
        n_weight = ()
        n_bias = ()
        n_third = ()
        for i in tl.static_range(N_BLOCKS):
            o_c = i * BLOCK_C + tl.arange(0, BLOCK_C)
            m_c = o_c < C
            mask = m_r[:, None] & m_c[None, :]
            b_w = load_parameter(weight, o_c, m_c, 1.0, HAS_WEIGHT)[None, :]
            b_dy = tl.load(dy + o_row + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
            b_in = tl.load(x + o_row + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
            b_a = activate(b_in, GELU and not NORM_FIRST)
            b_hat = tl.where(mask, (b_a - b_mean) * b_rstd, 0.0)
            b_dz = b_dy
            if NORM_FIRST:
                b_b = load_parameter(bias, o_c, m_c, 0.0, HAS_BIAS)[None, :]
                b_dz = scaled(b_dy, b_hat * b_w + b_b, GELU)
            b_sum += b_dz * b_w
            b_dot += b_dz * b_w * b_hat
            b_wdz += (b_dz * b_w,)
            b_ahat += (b_hat,)
            b_x += (b_in,)
            if SUM_AFFINE:
                n_weight += (d_weight[i] + b_dz * b_hat,)
                n_bias += (d_bias[i] + b_dz,)
            if SUM_SCALE:
                b_res = tl.load(residual + o_row + o_c[None, :], mask=mask, other=0.0)
                n_third += (d_third[i] + b_dy * b_res.to(tl.float32),)
            if STORE_DRESIDUAL:
                b_s = load_parameter(scale, o_c, m_c, 1.0, HAS_SCALE)[None, :]
                b_dres = (b_dy * b_s).to(dresidual.dtype.element_ty)
                tl.store(dresidual + o_row + o_c[None, :], b_dres, mask=mask)
        if SUM_AFFINE:
            d_weight = n_weight
            d_bias = n_bias

        if STORE_DX or SUM_DX:
            b_sum_mean = (tl.sum(b_sum, 1) / C)[:, None]
            b_dot_mean = (tl.sum(b_dot, 1) / C)[:, None]
            for i in tl.static_range(N_BLOCKS):
                o_c = i * BLOCK_C + tl.arange(0, BLOCK_C)
                mask = m_r[:, None] & (o_c < C)[None, :]
                b_dx = b_rstd * (b_wdz[i] - b_sum_mean - b_ahat[i] * b_dot_mean)
                b_dx = scaled(b_dx, b_x[i], GELU and not NORM_FIRST)
                if SUM_DX:
                    n_third += (d_third[i] + tl.where(mask, b_dx, 0.0),)
                if STORE_DX:
                    tl.store(dx + o_row + o_c[None, :], b_dx.to(dx.dtype.element_ty), mask=mask)
        if SUM_SCALE or SUM_DX:
            d_third = n_third

    base = partials + i_p.to(tl.int64) * 3 * C
    for i in tl.static_range(N_BLOCKS):
        o_c = i * BLOCK_C + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        if SUM_AFFINE:
            tl.store(base + o_c, tl.sum(d_weight[i], 0), mask=m_c)
            tl.store(base + C + o_c, tl.sum(d_bias[i], 0), mask=m_c)
        if SUM_SCALE or SUM_DX:
            tl.store(base + 2 * C + o_c, tl.sum(d_third[i], 0), mask=m_c)


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    *,
    needs: tuple[bool, bool, bool],
    gelu: bool = False,
    norm_first: bool = False,
    sum_dx: bool = False,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    needs_residual: bool = False,
    needs_scale: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the kernel; returns (dx, dln_weight, dln_bias, third, dresidual).

    `needs` is of the first three, `third` is the sum of dx over the rows (`sum_dx`) or the
    gradient of `scale` (`needs_scale`); what is not needed comes back empty.
    """
    channels = x.shape[-1]
    n_rows = x.numel() // channels
    tile = heuristics.row_tile(channels, 4)
    programs = heuristics.row_programs(n_rows, tile.block_r, channels)
    affine = needs[1] or needs[2]
    third = sum_dx or needs_scale
    dx = _launch.new_output(x, needs[0])
    dresidual = _launch.new_output(x, needs_residual)
    d_weight, d_bias, d_third = (
        _launch.new_float(x, (channels,), need) for need in (needs[1], needs[2], third)
    )
    partials = _launch.new_float(x, (programs, 3 * channels), affine or third)
    weight, bias, scale = map(_launch.parameter, (ln_weight, ln_bias, scale))

    def pointer(tensor: Tensor | None) -> Tensor:
        return x if tensor is None else tensor

    with _launch.device_of(x):
        row_norm_bwd_kernel[(programs,)](
            dy,
            x,
            pointer(residual),
            mean,
            rstd,
            pointer(weight),
            pointer(bias),
            pointer(scale),
            dx,
            dresidual,
            partials,
            n_rows,
            channels,
            GELU=gelu,
            NORM_FIRST=norm_first,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            HAS_SCALE=scale is not None,
            STORE_DX=needs[0],
            STORE_DRESIDUAL=needs_residual,
            SUM_AFFINE=affine,
            SUM_DX=sum_dx,
            SUM_SCALE=needs_scale,
            INT64=_launch.needs_int64(x),
            BLOCK_R=tile.block_r,
            BLOCK_C=tile.block_c,
            N_BLOCKS=tile.n_blocks,
            **_launch.row_options(x, tile.num_warps),
        )
        _launch.sum_partials(partials, (d_weight, d_bias, d_third), (channels,) * 3)
    return dx, d_weight, d_bias, d_third, dresidual
