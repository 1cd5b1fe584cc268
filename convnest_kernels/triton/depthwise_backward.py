"""The host side of the depthwise convolution's backward (depthwise_backward_kernels.py)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import _launch, autotune, heuristics
from .depthwise_backward_kernels import (
    depthwise_bwd_fma_kernel,
    depthwise_bwd_matrix_kernel,
)


def backward(
    dy: Tensor,
    x: Tensor,
    conv_weight: Tensor,
    *,
    total: Tensor | None = None,
    norm: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None = None,
    shortcut: bool = False,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns (out, row_sums, dweight, dbias, dln_weight, dln_bias), empty where not needed.

    `needs` is of (x, weight, bias, ln_weight, ln_bias); the last three go with `norm`, as `total`
    does. Workspace: `row_sums`, 8 bytes per pixel and channel block, and the partials
    (heuristics.conv_chunks).
    """
    n, h, w, channels = x.shape
    kernel_size = conv_weight.shape[2]
    taps = kernel_size * kernel_size
    mean, rstd, ln_weight, ln_bias = norm or (None, None, None, None)
    weight = conv_weight.detach().reshape(channels, taps).contiguous()
    ln_weight, ln_bias = map(_launch.parameter, (ln_weight, ln_bias))
    needs_x, needs_weight, *needs_vectors = needs
    dgrad = needs_x or any(needs_vectors)
    out = _launch.new_output(x, needs_x)
    d_weight = _launch.new_float(x, conv_weight.shape, needs_weight)
    d_vectors = [_launch.new_float(x, (channels,), need) for need in needs_vectors]

    def pointer(tensor: Tensor | None) -> Tensor:
        return x if tensor is None else tensor

    def launch(tile: heuristics.ConvTile) -> tuple[Tensor, Tensor]:
        groups = -(-n * heuristics.segments(w, tile) // tile.block_p)
        blocks = -(-channels // tile.block_c)
        strip = heuristics.strip_rows(groups, blocks, h, kernel_size, target=1024)
        strips = groups * -(-h // strip)
        chunks = heuristics.conv_chunks(strips, blocks)
        row_sums = _launch.new_float(x, (blocks, 2, n, h, w), needs_x and norm is not None)
        partials = _launch.new_float(
            x, (chunks, channels * (taps + 3)), needs_weight or any(needs_vectors)
        )
        kernel = depthwise_bwd_matrix_kernel if tile.matrix else depthwise_bwd_fma_kernel
        fused = tile.wgrad_rows >= kernel_size
        halves = [(dgrad, needs_weight)] if fused else [(dgrad, False), (False, needs_weight)]
        for with_dgrad, with_wgrad in halves:
            if not with_dgrad and not with_wgrad:
                continue
            wgrad_rows = tile.wgrad_rows if with_wgrad else 0
            row_groups = -(-kernel_size // wgrad_rows) if with_wgrad else 1
            kernel[(blocks * chunks * row_groups,)](
                dy,
                x,
                pointer(total),
                pointer(mean),
                pointer(rstd),
                pointer(ln_weight),
                pointer(ln_bias),
                weight,
                out,
                row_sums,
                partials,
                n,
                h,
                w,
                channels,
                strip,
                strips,
                chunks,
                NORM=norm is not None,
                SHORTCUT=shortcut,
                HAS_LN_WEIGHT=ln_weight is not None,
                HAS_LN_BIAS=ln_bias is not None,
                DGRAD=with_dgrad,
                STORE=needs_x,
                SUM=with_dgrad and any(needs_vectors),
                WGRAD_ROWS=wgrad_rows,
                INT64=_launch.needs_int64(x),
                K=kernel_size,
                BLOCK_P=tile.block_p,
                BLOCK_W=tile.block_w,
                **({"BLOCK_J": tile.block_j} if tile.matrix else {}),
                BLOCK_C=tile.block_c,
                **tile.options,
            )
        return row_sums, partials

    with _launch.device_of(x):
        arch = _launch.architecture(x)
        tile = heuristics.conv_tile(kernel_size, x.dtype, arch, backward=True)
        tile = autotune.choose("depthwise_bwd", x, kernel_size, tile, launch)
        row_sums, partials = launch(tile)
        if partials.numel():
            widths = (channels * taps, channels, channels, channels)
            _launch.sum_partials(partials, (d_weight, *d_vectors), widths)
    return out, row_sums, d_weight, d_vectors[0], d_vectors[1], d_vectors[2]
