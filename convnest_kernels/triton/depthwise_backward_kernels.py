"""Depthwise k×k convolution of an image, NHWC, with what nested_conv does around it; backward
kernels (depthwise_backward.py launches them).

    dz[n, y, x, c] = sum_{ky, kx} weight[c, ky, kx] ds[n, y - ky + R, x - kx + R, c]
    dweight[c, ky, kx] = sum_{n, y, x} z[n, y, x, c] ds[n, y - ky + R, x - kx + R, c]
    NORM      z = what forward convolved, LN(GELU(x)) (ghat before weight and bias);
              ds = dy GELU'(s);  out = rstd w dz (+ ds with SHORTCUT);
              dln_weight = sum dz ghat;  dln_bias = sum dz;  dbias = sum ds;
              row_sums[block, :, n, y, x] = sum over the block's channels of (w dz, w dz ghat)
    not NORM  z = x;  ds = dy;  out = dz

A program marches down the rows of ds, as forward does over z: one row of ds with its halo meets K
accumulators of dz (a ring; number k is row r - R + k and takes kernel row k) and the last K rows of
z (another ring, the same rows), whose products are the weight gradient, in registers until the
program ends. Large kernels take the two halves in two launches, and wgrad_rows kernel rows at once.

    reads ds' sources (dy, and s with NORM) once plus the halo, x once; NORM reads all three again
    for the row that it finishes, R rows later, from L1; writes out once, row_sums 8 bytes per
    pixel and channel block
    partials: [n_chunks, C*K*K + 3*C] float32 of (dweight, dbias, dln_weight, dln_bias)
    grid: (channel blocks * n_chunks * groups of kernel rows,); chunk i takes strips i,
    i + n_chunks, ...
"""

# mypy: disable-error-code="assignment, misc, var-annotated, operator, arg-type"
# Kernels are Triton's language: blocks and tuples of blocks that Python's types do not describe.

from __future__ import annotations

import triton
import triton.language as tl

from .depthwise import locate, normalise
from .math import gelu, gelu_gradient, load_parameter

_SIZES = ["N", "H", "W", "strip", "n_strips", "n_chunks"]


@triton.jit
def place(
    ln_weight, ln_bias, row_sums, N, H, W, C, n_chunks,
    HAS_LN_WEIGHT: tl.constexpr, HAS_LN_BIAS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program's channel block, chunk and group of kernel rows; its channels, LayerNorm's weight
    and bias for them, its part of row_sums, and the pixels of an image batch."""
    n_blocks = tl.cdiv(C, BLOCK_C)
    i_block = tl.program_id(0) % n_blocks
    i_rest = tl.program_id(0) // n_blocks
    o_c = i_block * BLOCK_C + tl.arange(0, BLOCK_C)
    b_lw = load_parameter(ln_weight, o_c, o_c < C, 1.0, HAS_LN_WEIGHT)
    b_lb = load_parameter(ln_bias, o_c, o_c < C, 0.0, HAS_LN_BIAS)
    pixels = N.to(tl.int64) * H * W
    p_sums = row_sums + i_block * 2 * pixels
    return i_block, i_rest % n_chunks, i_rest // n_chunks, o_c, b_lw, b_lb, p_sums, pixels


@triton.jit
def load_ds(dy, total, offsets, mask, NORM: tl.constexpr):
    """The gradient of the convolution's sum, in float32."""
    b_ds = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        b_ds *= gelu_gradient(tl.load(total + offsets, mask=mask, other=0.0).to(tl.float32))
    return b_ds


@triton.jit
def finish_row(
    b_dz, x, dy, total, out, p_sums, sums_stride, mean, rstd, b_lw, offsets, mask, pixel, m_pixel,
    NORM: tl.constexpr, SHORTCUT: tl.constexpr, STORE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write a finished row of dz as `out`; returns (dz, dz ghat, ds) for the parameters' sums."""
    b_dzg = b_dz
    b_ds = b_dz
    if NORM:
        b_dz = tl.where(mask, b_dz, 0.0)
        b_rstd = tl.load(rstd + pixel, mask=m_pixel, other=0.0)
        b_shift = tl.expand_dims(-b_rstd * tl.load(mean + pixel, mask=m_pixel, other=0.0), CHANNELS)
        b_rstd = tl.expand_dims(b_rstd, CHANNELS)
        b_x = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        b_dzg = b_dz * (gelu(b_x) * b_rstd + b_shift)
        b_ds = load_ds(dy, total, offsets, mask, True)
        if STORE:
            tl.store(p_sums + pixel, tl.sum(b_dz * b_lw, CHANNELS), mask=m_pixel)
            p_dots = p_sums + sums_stride
            tl.store(p_dots + pixel, tl.sum(b_dzg * b_lw, CHANNELS), mask=m_pixel)
            b_out = b_dz * b_lw * b_rstd
            if SHORTCUT:
                b_out += b_ds
            tl.store(out + offsets, b_out.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(out + offsets, b_dz.to(out.dtype.element_ty), mask=mask)
    return b_dz, b_dzg, b_ds


@triton.jit(do_not_specialize=_SIZES)
def depthwise_bwd_fma_kernel(
    dy,  # [N, H, W, C]
    x,  # [N, H, W, C]
    total,  # [N, H, W, C], s, or unused
    mean,  # [N, H, W] float32 or unused
    rstd,  # [N, H, W] float32 or unused
    ln_weight,  # [C] or unused
    ln_bias,  # [C] or unused
    weight,  # [C, K * K]
    out,  # [N, H, W, C] or unused
    row_sums,  # [channel blocks, 2, N, H, W] float32 or unused
    partials,  # [n_chunks, C * K * K + 3 * C] float32
    N,
    H,
    W,
    C,
    strip,
    n_strips,
    n_chunks,
    NORM: tl.constexpr,
    SHORTCUT: tl.constexpr,
    HAS_LN_WEIGHT: tl.constexpr,
    HAS_LN_BIAS: tl.constexpr,
    DGRAD: tl.constexpr,
    STORE: tl.constexpr,
    SUM: tl.constexpr,
    WGRAD_ROWS: tl.constexpr,
    INT64: tl.constexpr,
    K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    R: tl.constexpr = K // 2
    WINDOW: tl.constexpr = BLOCK_W + 2 * R
    i_block, i_chunk, i_group, o_c, b_lw, b_lb, p_sums, pixels = place(
        ln_weight, ln_bias, row_sums, N, H, W, C, n_chunks, HAS_LN_WEIGHT, HAS_LN_BIAS, BLOCK_C
    )
    b_lw = b_lw[None, :]
    b_lb = b_lb[None, :]
    m_c = o_c < C
    ky_0 = i_group * WGRAD_ROWS
    zero = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    d_bias = zero
    d_ln_weight = zero
    d_ln_bias = zero
    d_taps = ()
    for _ in tl.static_range(WGRAD_ROWS * K):
        d_taps += (zero,)

    for i_strip in range(i_chunk, n_strips, n_chunks):
        o_n, o_w, m_p, h0, h1, _ = locate(
            N, H, W, C, strip, BLOCK_P, BLOCK_W, BLOCK_C, i_block, i_strip, INT64
        )
        ring = ()
        rows = ()
        if DGRAD:
            for _ in tl.static_range(K * BLOCK_W):
                ring += (zero,)
        for _ in tl.static_range(WGRAD_ROWS * BLOCK_W):
            rows += (zero,)
        for r in range(h0 - R, h1 + R):
            o_row = (o_n * H + r) * W + o_w
            window = ()
            for j in tl.static_range(WINDOW):
                o_x = o_w + j - R
                m_x = m_p & (o_x >= 0) & (o_x < W) & (r >= 0) & (r < H)
                offsets = (o_row + j - R)[:, None] * C + o_c[None, :]
                window += (load_ds(dy, total, offsets, m_x[:, None] & m_c[None, :], NORM),)
            if WGRAD_ROWS > 0:
                # The newest row of z: only this strip's own rows count, each of them once.
                r_z = r - R + ky_0 + WGRAD_ROWS - 1
                moved_rows = ()
                for i in tl.static_range(BLOCK_W, WGRAD_ROWS * BLOCK_W):
                    moved_rows += (rows[i],)
                for j in tl.static_range(BLOCK_W):
                    m_x = m_p & (o_w + j < W) & (r_z >= h0) & (r_z < h1)
                    pixel_z = (o_n * H + r_z) * W + o_w + j
                    mask_z = m_x[:, None] & m_c[None, :]
                    b_x = tl.load(
                        x + pixel_z[:, None] * C + o_c[None, :], mask=mask_z, other=0.0
                    ).to(tl.float32)
                    moved_rows += (normalise(b_x, mean, rstd, pixel_z, m_x, b_lw, b_lb, NORM, 1),)
                rows = moved_rows
                moved_taps = ()
                for i in tl.static_range(WGRAD_ROWS):
                    for kx in tl.static_range(K):
                        b_tap = d_taps[i * K + kx]
                        for j in tl.static_range(BLOCK_W):
                            b_tap += rows[i * BLOCK_W + j] * window[j - kx + 2 * R]
                        moved_taps += (b_tap,)
                d_taps = moved_taps
            if DGRAD:
                moved = ()
                for k in tl.static_range(K):
                    sums = ()
                    for j in tl.static_range(BLOCK_W):
                        if k + 1 < K:
                            sums += (ring[(k + 1) * BLOCK_W + j],)
                        else:
                            sums += (zero,)
                    for kx in tl.static_range(K):
                        # Loaded where it is used, from L1: two K x K sets do not fit in registers.
                        p_tap = weight + k * K + kx
                        b_tap = load_parameter(p_tap, o_c * (K * K), m_c, 0.0, True)[None, :]
                        added = ()
                        for j in tl.static_range(BLOCK_W):
                            added += (sums[j] + window[j - kx + 2 * R] * b_tap,)
                        sums = added
                    moved += sums
                ring = moved
                if r - R >= h0:
                    for j in tl.static_range(BLOCK_W):
                        m_out = m_p & (o_w + j < W)
                        pixel = o_row - R * W + j
                        b_dz, b_dzg, b_ds = finish_row(
                            ring[j], x, dy, total, out, p_sums, pixels, mean, rstd, b_lw,
                            pixel[:, None] * C + o_c[None, :], m_out[:, None] & m_c[None, :],
                            pixel, m_out, NORM, SHORTCUT, STORE, 1,
                        )  # fmt: skip
                        if SUM:
                            d_ln_bias += b_dz
                            d_ln_weight += b_dzg
                            d_bias += b_ds

    base = partials + i_chunk.to(tl.int64) * C * (K * K + 3)
    for i in tl.static_range(WGRAD_ROWS):
        for kx in tl.static_range(K):
            m_tap = m_c & (ky_0 + i < K)
            p_tap = base + o_c * (K * K) + (ky_0 + i) * K + kx
            tl.store(p_tap, tl.sum(d_taps[i * K + kx], 0), mask=m_tap)
    if SUM:
        base += C * K * K
        tl.store(base + o_c, tl.sum(d_bias, 0), mask=m_c)
        tl.store(base + C + o_c, tl.sum(d_ln_weight, 0), mask=m_c)
        tl.store(base + 2 * C + o_c, tl.sum(d_ln_bias, 0), mask=m_c)


@triton.jit
def load_rows(
    dy, total, x, o_n, o_in, m_in, o_out, m_out, o_c, m_c, H, W, C, r, R, h1,
    NORM: tl.constexpr, WGRAD: tl.constexpr,
):  # fmt: skip
    """Row r of dy and of s with the halo, and row r + R of x, of the strip's own rows alone."""
    mask = (m_in & (r >= 0) & (r < H))[None, :, :] & m_c
    offsets = ((o_n * H + r)[:, None] * W + o_in)[None, :, :] * C + o_c
    b_dy = tl.load(dy + offsets, mask=mask, other=0.0)
    b_s = b_dy
    if NORM:
        b_s = tl.load(total + offsets, mask=mask, other=0.0)
    b_x = 0.0
    if WGRAD:
        mask = (m_out & (r + R < h1))[None, :, :] & m_c
        offsets = ((o_n * H + (r + R))[:, None] * W + o_out)[None, :, :] * C + o_c
        b_x = tl.load(x + offsets, mask=mask, other=0.0)
    return b_dy, b_s, b_x


@triton.jit(do_not_specialize=_SIZES)
def depthwise_bwd_matrix_kernel(
    dy,  # [N, H, W, C]
    x,  # [N, H, W, C]
    total,  # [N, H, W, C], s, or unused
    mean,  # [N, H, W] float32 or unused
    rstd,  # [N, H, W] float32 or unused
    ln_weight,  # [C] or unused
    ln_bias,  # [C] or unused
    weight,  # [C, K * K]
    out,  # [N, H, W, C] or unused
    row_sums,  # [channel blocks, 2, N, H, W] float32 or unused
    partials,  # [n_chunks, C * K * K + 3 * C] float32
    N,
    H,
    W,
    C,
    strip,
    n_strips,
    n_chunks,
    NORM: tl.constexpr,
    SHORTCUT: tl.constexpr,
    HAS_LN_WEIGHT: tl.constexpr,
    HAS_LN_BIAS: tl.constexpr,
    DGRAD: tl.constexpr,
    STORE: tl.constexpr,
    SUM: tl.constexpr,
    WGRAD_ROWS: tl.constexpr,
    INT64: tl.constexpr,
    K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    R: tl.constexpr = K // 2
    HALF: tl.constexpr = dy.dtype.element_ty
    i_block, i_chunk, i_group, o_c1, b_lw, b_lb, p_sums, pixels = place(
        ln_weight, ln_bias, row_sums, N, H, W, C, n_chunks, HAS_LN_WEIGHT, HAS_LN_BIAS, BLOCK_C
    )
    b_lw = b_lw[:, None, None]
    b_lb = b_lb[:, None, None]
    o_c = o_c1[:, None, None]
    m_c = o_c < C
    o_j = tl.arange(0, BLOCK_J)[:, None]
    o_b = tl.arange(0, BLOCK_W)[None, :]
    # Input j is ds at o_w + j - R, output b is dz at o_w + b: tap kx = b - j + 2R.
    kx = o_b - o_j + 2 * R
    m_band = ((kx >= 0) & (kx < K))[None, :, :]
    zero = tl.zeros((BLOCK_C, BLOCK_P, BLOCK_W), tl.float32)
    bands = ()
    d_bands = ()
    for ky in tl.static_range(K):
        if DGRAD:
            p_band = weight + o_c * (K * K) + (ky * K + kx)[None, :, :]
            bands += (tl.load(p_band, mask=m_band & m_c, other=0.0).to(HALF),)
        if WGRAD_ROWS > 0:
            d_bands += (tl.zeros((BLOCK_C, BLOCK_J, BLOCK_W), tl.float32),)
    d_bias = zero
    d_ln_weight = zero
    d_ln_bias = zero

    for i_strip in range(i_chunk, n_strips, n_chunks):
        o_n, o_w, m_p, h0, h1, _ = locate(
            N, H, W, C, strip, BLOCK_P, BLOCK_W, BLOCK_C, i_block, i_strip, INT64
        )
        o_in = o_w[:, None] + tl.arange(0, BLOCK_J)[None, :] - R
        m_in = m_p[:, None] & (o_in >= 0) & (o_in < W)
        o_out = o_w[:, None] + o_b
        m_out = m_p[:, None] & (o_out < W)
        ring = ()
        rows = ()
        for _ in tl.static_range(K):
            if DGRAD:
                ring += (zero,)
            if WGRAD_ROWS > 0:
                rows += (zero.to(HALF),)
        # The next row is under way while this one is computed: few warps fit beside each other
        # here, so that nothing else would hide the latency of memory.
        n_dy, n_s, n_x = load_rows(
            dy, total, x, o_n, o_in, m_in, o_out, m_out, o_c, m_c, H, W, C, h0 - R, R, h1,
            NORM, WGRAD_ROWS > 0,
        )  # fmt: skip
        for r in range(h0 - R, h1 + R):
            b_dy, b_s, b_x = n_dy, n_s, n_x
            n_dy, n_s, n_x = load_rows(
                dy, total, x, o_n, o_in, m_in, o_out, m_out, o_c, m_c, H, W, C, r + 1, R, h1,
                NORM, WGRAD_ROWS > 0,
            )  # fmt: skip
            if NORM:
                b_dy = (b_dy.to(tl.float32) * gelu_gradient(b_s.to(tl.float32))).to(HALF)
            b_ds = b_dy
            if WGRAD_ROWS > 0:
                # The newest row of z: only this strip's own rows count, each of them once.
                m_z = m_out & (r + R < h1)
                pixel_z = (o_n * H + (r + R))[:, None] * W + o_out
                b_z = normalise(
                    b_x.to(tl.float32), mean, rstd, pixel_z, m_z, b_lw, b_lb, NORM, 0
                ).to(HALF)
                moved_rows = ()
                moved_bands = ()
                b_dst = tl.permute(b_ds, (0, 2, 1))
                for k in tl.static_range(K):
                    if k + 1 < K:
                        moved_rows += (rows[k + 1],)
                    else:
                        moved_rows += (b_z,)
                    moved_bands += (tl.dot(b_dst, moved_rows[k], d_bands[k]),)
                rows = moved_rows
                d_bands = moved_bands
            if DGRAD:
                moved = ()
                for k in tl.static_range(K):
                    b_sum = zero
                    if k + 1 < K:
                        b_sum = ring[k + 1]
                    moved += (tl.dot(b_ds, bands[k], b_sum),)
                ring = moved
                if r - R >= h0:
                    pixel = (o_n * H + (r - R))[:, None] * W + o_out
                    b_dz, b_dzg, b_dsr = finish_row(
                        ring[0], x, dy, total, out, p_sums, pixels, mean, rstd, b_lw,
                        pixel[None, :, :] * C + o_c, m_out[None, :, :] & m_c,
                        pixel, m_out, NORM, SHORTCUT, STORE, 0,
                    )  # fmt: skip
                    if SUM:
                        d_ln_bias += b_dz
                        d_ln_weight += b_dzg
                        d_bias += b_dsr

    m_c1 = o_c1 < C
    base = partials + i_chunk.to(tl.int64) * C * (K * K + 3)
    if WGRAD_ROWS > 0:
        for ky in tl.static_range(K):
            for t in tl.static_range(K):
                b_diagonal = tl.where((kx == t)[None, :, :], d_bands[ky], 0.0)
                p_tap = base + o_c1 * (K * K) + ky * K + t
                tl.store(p_tap, tl.sum(tl.sum(b_diagonal, 2), 1), mask=m_c1)
    if SUM:
        base += C * K * K
        tl.store(base + o_c1, tl.sum(tl.sum(d_bias, 2), 1), mask=m_c1)
        tl.store(base + C + o_c1, tl.sum(tl.sum(d_ln_weight, 2), 1), mask=m_c1)
        tl.store(base + 2 * C + o_c1, tl.sum(tl.sum(d_ln_bias, 2), 1), mask=m_c1)
