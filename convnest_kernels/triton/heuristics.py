"""Launch configurations: pure functions of kernel size, dtype, shape and architecture.

What becomes a constexpr (and so a compiled kernel of its own) depends on the channels, the kernel
size, the dtype and the architecture; batch, height and width are ordinary arguments that Triton is
told not to specialise on. So a new batch or image size never recompiles, but for the one switch to
64-bit offsets. Chunk counts depend on the shape and the tile alone, never on how many programs a
device runs at once, so that a sum of partials is the same sum in every run.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

# What a multiprocessor has; keys are CUDA compute capabilities without the dot, or AMD names.
SHARED_BYTES = {
    "80": 163 * 1024,
    "86": 99 * 1024,
    "89": 99 * 1024,
    "90": 227 * 1024,
    "100": 227 * 1024,
    "103": 227 * 1024,
    "120": 99 * 1024,
    "gfx942": 64 * 1024,
}
KERNEL_SIZES = (3, 5, 7, 9, 11, 13)
MAX_CHANNELS = 32768  # a row lies in the registers of one program: 64 values a thread at 16 warps


@dataclass(frozen=True)
class ConvTile:
    """How a depthwise kernel is cut.

    matrix: the banded product on the tensor cores; False: FMAs with the window in registers.
    block_p: segments of an image row side by side; block_w: outputs of a segment; block_j: inputs
    of a segment (the matrix form's contraction); block_c: channels; wgrad_rows: kernel rows whose
    weight gradient one program keeps in registers (all: the fused backward kernel).
    """

    matrix: bool
    block_p: int
    block_w: int
    block_j: int
    block_c: int
    num_warps: int
    num_stages: int = 1
    wgrad_rows: int = 0
    max_registers: int | None = None  # a thread; None leaves it to the compiler

    @property
    def options(self) -> dict[str, int]:
        """The launch's compiler options."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options


@dataclass(frozen=True)
class RowTile:
    """How a row kernel is cut: block_r rows, all channels in n_blocks blocks of block_c."""

    block_r: int
    block_c: int
    n_blocks: int
    num_warps: int


def uses_matrix_form(kernel_size: int, dtype: torch.dtype, arch: str) -> bool:
    """Whether the convolution goes to the tensor cores (docs/performance.md has the counts)."""
    if dtype == torch.float32:
        return False  # TF32 would lose ten bits of the operands
    if arch.startswith("gfx"):
        return False  # MFMA has no 16x8 shape: half of each product would be thrown away
    # A segment of 8 outputs needs 8 + K - 1 inputs, and the product contracts over 16: K <= 9.
    # Three taps a row are cheaper as nine FMAs than as a product of which 3/16 is not zero.
    return 5 <= kernel_size <= 9


@functools.cache
def conv_tile(kernel_size: int, dtype: torch.dtype, arch: str, backward: bool) -> ConvTile:
    """Return the tile of the depthwise kernel, forward or backward."""
    if uses_matrix_form(kernel_size, dtype, arch):
        # 16 segments are the M of mma.m16n8k16, 8 outputs its N, 16 inputs its K. Channels are its
        # batch: 8 of them are the 16-byte vectors that ldmatrix moves; with 16 Triton falls back
        # to 2-byte shared loads (docs/triton.md).
        if backward:
            # Four accumulators a channel and kernel row in each of two products: one channel a
            # warp, not two. The kernel fetches the next row itself; Triton's pipeliner declines.
            # With no limit ptxas aims at 128 registers here and there, and spills one.
            return ConvTile(
                True, 16, 8, 16, 8, num_warps=8, wgrad_rows=kernel_size, max_registers=255
            )
        # Two stages fetch the next row with cp.async, at no cost in registers.
        return ConvTile(True, 16, 8, 16, 8, num_warps=4, num_stages=2)
    # A thread holds a segment of one channel: K * block_w accumulators, and K * K weights up to 7.
    # block_w outputs cost block_w + K - 1 prologues, so it is as wide as the registers allow.
    block_w = 8 if kernel_size <= 7 else 4
    wgrad_rows = 0
    if backward:
        block_w = 4 if kernel_size <= 9 else 2
        # K*K weight gradients stay in registers up to 7; beyond, a few kernel rows at a time.
        wgrad_rows = kernel_size if kernel_size <= 7 else 3
    # 64 channels by 2 segments are one element a thread at 4 warps of 32 lanes, or AMD's 2 of 64.
    block_j = block_w + kernel_size - 1
    num_warps = 2 if arch.startswith("gfx") else 4
    # Backward spills one register on sm_120 unless ptxas is told that it may use them all.
    limit = 255 if backward and not arch.startswith("gfx") else None
    return ConvTile(
        False, 2, block_w, block_j, 64, num_warps, wgrad_rows=wgrad_rows, max_registers=limit
    )


def segments(width: int, tile: ConvTile) -> int:
    """Segments of an image row."""
    return -(-width // tile.block_w)


def strip_rows(n_groups: int, n_blocks: int, height: int, kernel_size: int, target: int) -> int:
    """Image rows that a program marches down: as many as leave `target` programs.

    A strip reads K - 1 halo rows beside its own, so it is the whole column of the image unless the
    grid would be too small to fill a GPU (about 1000 programs are two waves on 132 SMs), and never
    less than two halos unless the image is.
    """
    columns = n_groups * n_blocks
    strips = max(1, min(-(-target // columns), -(-height // (2 * (kernel_size - 1)))))
    return -(-height // strips)


def conv_chunks(n_strips: int, n_blocks: int) -> int:
    """Programs per channel block of the backward kernel, each with partials of its own.

    Bounds the workspace: chunks * blocks * block_c * (K*K + 3) floats, 1024 programs' worth.
    """
    return min(n_strips, max(1, -(-1024 // n_blocks)))


@functools.cache
def row_tile(channels: int, tensors: int) -> RowTile:
    """Return the tile of a row kernel that holds `tensors` values per element in registers."""
    block_c = _channel_block(channels)
    n_blocks = -(-channels // block_c)
    row = block_c * n_blocks
    # Values a thread holds: about 32 forward (one tensor), 12 of each of four in backward.
    per_thread = 32 if tensors == 1 else 48 // tensors
    # Four warps hide latency with little to synchronise; a row that they cannot hold twice is
    # cheaper on more of them, with half the values (and no spills: 2560 channels on 4 warps do).
    num_warps = 4
    while num_warps < 16 and 2 * row > per_thread * 32 * num_warps:
        num_warps *= 2
    block_r = 1
    while 2 * block_r * row <= per_thread * 32 * num_warps and block_r < 32:
        block_r *= 2
    return RowTile(block_r, block_c, n_blocks, num_warps)


def _channel_block(channels: int) -> int:
    """The largest power of two whose multiple exceeds `channels` by an eighth at most.

    12 C is 3 times a power of two at best: padding 576 to 1024 would waste 44% of every
    instruction. The smallest block is a 32-byte sector of a half dtype.
    """
    block = 16 if channels <= 2048 else 64  # more than 32 blocks would unroll too far
    for candidate in (32, 64, 128, 256, 512, 1024, 2048):
        padded = -(-channels // candidate) * candidate
        if 8 * (padded - channels) <= channels:
            block = candidate
    return max(block, _power_of_two(-(-channels // 16)))


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def row_programs(rows: int, block_r: int, channels: int) -> int:
    """Programs of a row backward kernel, each with partials of its own: a bounded workspace.

    At most 1024 programs, and 4 MiB of float32 for each parameter that gets a gradient.
    """
    return min(-(-rows // block_r), 1024, max(64, (1 << 20) // channels))
