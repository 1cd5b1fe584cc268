"""Depthwise k×k convolution of an image, NHWC, with what nested_conv does around it; forward.

    z = LN(GELU(x)) with NORM, else x;  zero outside the image, after the norm
    s[n, y, x, c] = sum_{ky, kx} weight[c, ky, kx] z[n, y + ky - R, x + kx - R, c],  R = K // 2
    s += bias;  s += GELU(x) with SHORTCUT
    STORE_SUM writes s, STORE_GELU writes GELU(s)

A program owns one strip of rows for BLOCK_P segments of BLOCK_W pixels (of any image) and BLOCK_C
channels. It marches down the rows: z of an input row is made once, for the segment and its halo of
R pixels on both sides, and meets all K kernel rows, in a ring of K accumulators of which number k
belongs to output row r - R + k. The ring moves by renaming values, not by copying them.

`fma` form: a pixel is a value of its own, so that shifts along the row are names, too: no shared
memory, no barrier. `matrix` form (half dtypes): per channel, [16 segments x 16 inputs] by a banded
[16 inputs x 8 outputs] per kernel row, a batched tl.dot with float32 accumulation; z and the
weights are rounded to the activation's dtype, as eager autocast does.

    reads x once plus the halo: (1 + 2R/BLOCK_W) per row, of which the matrix form reads 2, from
    L1; (1 + 2R/rows) rows; GELU(x) of the shortcut reads it again, from L1. Writes s and GELU(s).
    grid: (channel blocks * strips * groups of segments,), channel blocks fastest
"""

# mypy: disable-error-code="assignment, misc, var-annotated, operator, arg-type"
# Kernels are Triton's language: blocks and tuples of blocks that Python's types do not describe.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import _launch, autotune, heuristics
from .math import gelu, load_parameter

_SIZES = ["N", "H", "W", "strip"]


@triton.jit
def locate(N, H, W, C, strip, BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
           i_block, i_strip, INT64: tl.constexpr):  # fmt: skip
    """Image and first column of each segment, whether it exists, and the strip's rows."""
    n_segments = tl.cdiv(W, BLOCK_W)
    n_strips = tl.cdiv(H, strip)
    o_p = (i_strip // n_strips) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_n = o_p // n_segments
    o_w = (o_p % n_segments) * BLOCK_W
    m_p = o_n < N
    if INT64:
        o_n = o_n.to(tl.int64)
    h0 = (i_strip % n_strips) * strip
    h1 = tl.minimum(h0 + strip, H)
    o_c = i_block * BLOCK_C + tl.arange(0, BLOCK_C)
    return o_n, o_w, m_p, h0, h1, o_c


@triton.jit
def normalise(
    b_x, mean, rstd, pixel, m_pixel, b_w, b_b, NORM: tl.constexpr, CHANNELS: tl.constexpr
):
    """LN(GELU(x)) by kept statistics, zero outside the image; CHANNELS is the channels' axis."""
    if NORM:
        b_rstd = tl.load(rstd + pixel, mask=m_pixel, other=0.0)
        b_shift = -b_rstd * tl.load(mean + pixel, mask=m_pixel, other=0.0)
        b_rstd = tl.expand_dims(b_rstd, CHANNELS)
        b_shift = tl.expand_dims(b_shift, CHANNELS)
        b_z = (gelu(b_x) * b_rstd + b_shift) * b_w + b_b
        b_x = tl.where(tl.expand_dims(m_pixel, CHANNELS), b_z, 0.0)
    return b_x


@triton.jit(do_not_specialize=_SIZES)
def depthwise_fwd_fma_kernel(
    x,  # [N, H, W, C]
    mean,  # [N, H, W] float32 or unused
    rstd,  # [N, H, W] float32 or unused
    ln_weight,  # [C] or unused
    ln_bias,  # [C] or unused
    weight,  # [C, K * K]
    bias,  # [C] or unused
    total,  # [N, H, W, C], s, or unused
    activated,  # [N, H, W, C], GELU(s), or unused
    N,
    H,
    W,
    C,
    strip,
    NORM: tl.constexpr,
    SHORTCUT: tl.constexpr,
    HAS_LN_WEIGHT: tl.constexpr,
    HAS_LN_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE_SUM: tl.constexpr,
    STORE_GELU: tl.constexpr,
    INT64: tl.constexpr,
    K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    R: tl.constexpr = K // 2
    WINDOW: tl.constexpr = BLOCK_W + 2 * R
    HOLD_WEIGHTS: tl.constexpr = K <= 7  # in registers; larger kernels reload them, from L1
    n_blocks = tl.cdiv(C, BLOCK_C)
    o_n, o_w, m_p, h0, h1, o_c = locate(
        N, H, W, C, strip, BLOCK_P, BLOCK_W, BLOCK_C,
        tl.program_id(0) % n_blocks, tl.program_id(0) // n_blocks, INT64,
    )  # fmt: skip
    m_c = o_c < C
    b_lw = load_parameter(ln_weight, o_c, m_c, 1.0, HAS_LN_WEIGHT)[None, :]
    b_lb = load_parameter(ln_bias, o_c, m_c, 0.0, HAS_LN_BIAS)[None, :]
    b_bias = load_parameter(bias, o_c, m_c, 0.0, HAS_BIAS)[None, :]
    taps = ()
    if HOLD_WEIGHTS:
        for k in tl.static_range(K * K):
            taps += (load_parameter(weight + k, o_c * (K * K), m_c, 0.0, True)[None, :],)
    zero = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    ring = ()
    for _ in tl.static_range(K * BLOCK_W):
        ring += (zero,)

    for r in range(tl.maximum(h0 - R, 0), h1 + R):
        o_row = (o_n * H + r) * W + o_w
        window = ()
        for j in tl.static_range(WINDOW):
            o_x = o_w + j - R
            m_x = m_p & (o_x >= 0) & (o_x < W) & (r < H)
            pixel = o_row + j - R
            mask = m_x[:, None] & m_c[None, :]
            b_x = tl.load(x + pixel[:, None] * C + o_c[None, :], mask=mask, other=0.0)
            b_z = normalise(b_x.to(tl.float32), mean, rstd, pixel, m_x, b_lw, b_lb, NORM, 1)
            window += (b_z,)
        moved = ()
        for k in tl.static_range(K):
            for j in tl.static_range(BLOCK_W):
                b_sum = zero
                if k + 1 < K:
                    b_sum = ring[(k + 1) * BLOCK_W + j]
                for kx in tl.static_range(K):
                    if HOLD_WEIGHTS:
                        b_tap = taps[(K - 1 - k) * K + kx]
                    else:
                        p_tap = weight + (K - 1 - k) * K + kx
                        b_tap = load_parameter(p_tap, o_c * (K * K), m_c, 0.0, True)[None, :]
                    b_sum += window[j + kx] * b_tap
                moved += (b_sum,)
        ring = moved
        if r - R >= h0:
            o_out = o_row - R * W
            for j in tl.static_range(BLOCK_W):
                mask = (m_p & (o_w + j < W))[:, None] & m_c[None, :]
                offsets = (o_out + j)[:, None] * C + o_c[None, :]
                b_s = ring[j] + b_bias
                if SHORTCUT:
                    b_s += gelu(tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32))
                if STORE_SUM:
                    tl.store(total + offsets, b_s.to(total.dtype.element_ty), mask=mask)
                if STORE_GELU:
                    b_v = gelu(b_s).to(activated.dtype.element_ty)
                    tl.store(activated + offsets, b_v, mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def depthwise_fwd_matrix_kernel(
    x,  # [N, H, W, C]
    mean,  # [N, H, W] float32 or unused
    rstd,  # [N, H, W] float32 or unused
    ln_weight,  # [C] or unused
    ln_bias,  # [C] or unused
    weight,  # [C, K * K]
    bias,  # [C] or unused
    total,  # [N, H, W, C], s, or unused
    activated,  # [N, H, W, C], GELU(s), or unused
    N,
    H,
    W,
    C,
    strip,
    NORM: tl.constexpr,
    SHORTCUT: tl.constexpr,
    HAS_LN_WEIGHT: tl.constexpr,
    HAS_LN_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE_SUM: tl.constexpr,
    STORE_GELU: tl.constexpr,
    INT64: tl.constexpr,
    K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    R: tl.constexpr = K // 2
    n_blocks = tl.cdiv(C, BLOCK_C)
    o_n, o_w, m_p, h0, h1, o_c = locate(
        N, H, W, C, strip, BLOCK_P, BLOCK_W, BLOCK_C,
        tl.program_id(0) % n_blocks, tl.program_id(0) // n_blocks, INT64,
    )  # fmt: skip
    m_c = o_c < C
    b_lw = load_parameter(ln_weight, o_c, m_c, 1.0, HAS_LN_WEIGHT)[:, None, None]
    b_lb = load_parameter(ln_bias, o_c, m_c, 0.0, HAS_LN_BIAS)[:, None, None]
    b_bias = load_parameter(bias, o_c, m_c, 0.0, HAS_BIAS)[:, None, None]
    o_c = o_c[:, None, None]
    m_c = m_c[:, None, None]
    o_j = tl.arange(0, BLOCK_J)[:, None]
    o_b = tl.arange(0, BLOCK_W)[None, :]
    # The banded matrices [BLOCK_C, BLOCK_J, BLOCK_W]: input j is o_w + j - R, output b is o_w + b.
    kx = o_j - o_b
    m_band = ((kx >= 0) & (kx < K))[None, :, :] & m_c
    bands = ()
    for ky in tl.static_range(K):
        p_band = weight + o_c * (K * K) + (ky * K + kx)[None, :, :]
        bands += (tl.load(p_band, mask=m_band, other=0.0).to(x.dtype.element_ty),)
    zero = tl.zeros((BLOCK_C, BLOCK_P, BLOCK_W), tl.float32)
    ring = ()
    for _ in tl.static_range(K):
        ring += (zero,)

    o_in = o_w[:, None] + tl.arange(0, BLOCK_J)[None, :] - R
    m_in = m_p[:, None] & (o_in >= 0) & (o_in < W)
    o_out = o_w[:, None] + o_b
    m_out = (m_p[:, None] & (o_out < W))[None, :, :] & m_c
    for r in range(tl.maximum(h0 - R, 0), h1 + R):
        m_row = m_in & (r < H)
        pixel = (o_n * H + r)[:, None] * W + o_in
        b_x = tl.load(x + pixel[None, :, :] * C + o_c, mask=m_row[None, :, :] & m_c, other=0.0)
        if NORM:
            b_z = normalise(b_x.to(tl.float32), mean, rstd, pixel, m_row, b_lw, b_lb, True, 0)
            b_x = b_z.to(b_x.dtype)
        moved = ()
        for k in tl.static_range(K):
            b_sum = zero
            if k + 1 < K:
                b_sum = ring[k + 1]
            moved += (tl.dot(b_x, bands[K - 1 - k], b_sum),)
        ring = moved
        if r - R >= h0:
            offsets = ((o_n * H + (r - R))[:, None] * W + o_out)[None, :, :] * C + o_c
            b_s = ring[0] + b_bias
            if SHORTCUT:
                b_s += gelu(tl.load(x + offsets, mask=m_out, other=0.0).to(tl.float32))
            if STORE_SUM:
                tl.store(total + offsets, b_s.to(total.dtype.element_ty), mask=m_out)
            if STORE_GELU:
                b_v = gelu(b_s).to(activated.dtype.element_ty)
                tl.store(activated + offsets, b_v, mask=m_out)


def forward(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    *,
    norm: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None = None,
    shortcut: bool = False,
    store_sum: bool,
    store_gelu: bool,
) -> tuple[Tensor, Tensor]:
    """Convolve x; returns (s, GELU(s)), empty where not stored.

    `norm` is (mean, rstd, ln_weight, ln_bias) of LN(GELU(x)), or None to convolve x itself.
    """
    n, h, w, channels = x.shape
    kernel_size = conv_weight.shape[2]
    mean, rstd, ln_weight, ln_bias = norm or (None, None, None, None)
    total = _launch.new_output(x, store_sum)
    activated = _launch.new_output(x, store_gelu)
    weight = conv_weight.detach().reshape(channels, kernel_size * kernel_size).contiguous()
    bias, ln_weight, ln_bias = map(_launch.parameter, (conv_bias, ln_weight, ln_bias))

    def pointer(tensor: Tensor | None) -> Tensor:
        return x if tensor is None else tensor

    def launch(tile: heuristics.ConvTile) -> None:
        groups = -(-n * heuristics.segments(w, tile) // tile.block_p)
        blocks = -(-channels // tile.block_c)
        strip = heuristics.strip_rows(groups, blocks, h, kernel_size, target=1024)
        kernel = depthwise_fwd_matrix_kernel if tile.matrix else depthwise_fwd_fma_kernel
        kernel[(blocks * groups * -(-h // strip),)](
            x,
            pointer(mean),
            pointer(rstd),
            pointer(ln_weight),
            pointer(ln_bias),
            weight,
            pointer(bias),
            total,
            activated,
            n,
            h,
            w,
            channels,
            strip,
            NORM=norm is not None,
            SHORTCUT=shortcut,
            HAS_LN_WEIGHT=ln_weight is not None,
            HAS_LN_BIAS=ln_bias is not None,
            HAS_BIAS=bias is not None,
            STORE_SUM=store_sum,
            STORE_GELU=store_gelu,
            INT64=_launch.needs_int64(x),
            K=kernel_size,
            BLOCK_P=tile.block_p,
            BLOCK_W=tile.block_w,
            **({"BLOCK_J": tile.block_j} if tile.matrix else {}),
            BLOCK_C=tile.block_c,
            **tile.options,
        )

    with _launch.device_of(x):
        arch = _launch.architecture(x)
        tile = heuristics.conv_tile(kernel_size, x.dtype, arch, backward=False)
        launch(autotune.choose("depthwise_fwd", x, kernel_size, tile, launch))
    return total, activated
