"""What the host functions share: devices, index widths, parameters and the sum of partials."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

# One past the largest offset that a 32-bit kernel may form: masked lanes of the last tile reach at
# most a few tiles beyond the tensor, and must not wrap around.
INT32_ELEMENTS = 2**31 - 2**24


def needs_int64(x: Tensor) -> bool:
    """Whether offsets into x need 64 bits; a constexpr, so that the rest does not pay for it."""
    return x.numel() >= INT32_ELEMENTS


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU current: Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@functools.cache
def _architecture(device: torch.device) -> str:
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}{minor}"


def architecture(x: Tensor) -> str:
    """The compute capability without its dot ("90"), or AMD's name; "90" under the interpreter."""
    return _architecture(x.device) if x.is_cuda else "90"


def row_options(x: Tensor, num_warps: int) -> dict[str, int]:
    """The compiler options of a row kernel.

    The limit on registers is what a multiprocessor has for one program. Without it ptxas aims at
    a higher occupancy, and spills a register in a few of the many tiles to get there.
    """
    options = {"num_warps": num_warps}
    if not architecture(x).startswith("gfx"):
        options["maxnreg"] = min(255, 65536 // (32 * num_warps))
    return options


def parameter(p: Tensor | None) -> Tensor | None:
    """A parameter as the kernels read it: contiguous, in whatever floating dtype it has."""
    return None if p is None else p.detach().contiguous()


def new_output(x: Tensor, need: bool = True) -> Tensor:
    """An uninitialised contiguous tensor like x; empty if it is not needed."""
    return x.new_empty(x.shape if need else 0)


def new_float(x: Tensor, shape: Sequence[int], need: bool = True) -> Tensor:
    """An uninitialised float32 tensor on the device of x; empty if it is not needed."""
    return x.new_empty(shape if need else 0, dtype=torch.float32)


@triton.jit(do_not_specialize=["n_partials", "width"])
def sum_partials_kernel(
    partials,  # [n_partials, width] float32
    out_0,  # [end_0]               the columns of `partials`, cut in up to four tensors
    out_1,  # [end_1 - end_0]
    out_2,  # [end_2 - end_1]
    out_3,  # [width - end_2]
    end_0,
    end_1,
    end_2,
    n_partials,
    width,
    STORE_0: tl.constexpr,
    STORE_1: tl.constexpr,
    STORE_2: tl.constexpr,
    STORE_3: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """out[j] = sum_i partials[i, j], in an order that depends on the sizes alone.

    Reads the partials once, writes each output once. Grid: (blocks of columns,).
    """
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < width
    o_n = tl.arange(0, BLOCK_N)
    b_sum = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, n_partials, BLOCK_N):
        o_i = start + o_n
        mask = (o_i < n_partials)[:, None] & m_m[None, :]
        offsets = o_i[:, None].to(tl.int64) * width + o_m[None, :]
        b_sum += tl.load(partials + offsets, mask=mask, other=0.0)
    b_out = tl.sum(b_sum, 0)
    if STORE_0:
        tl.store(out_0 + o_m, b_out, mask=o_m < end_0)
    if STORE_1:
        tl.store(out_1 + o_m - end_0, b_out, mask=(o_m >= end_0) & (o_m < end_1))
    if STORE_2:
        tl.store(out_2 + o_m - end_1, b_out, mask=(o_m >= end_1) & (o_m < end_2))
    if STORE_3:
        tl.store(out_3 + o_m - end_2, b_out, mask=(o_m >= end_2) & m_m)


def sum_partials(partials: Tensor, outputs: Sequence[Tensor], widths: Sequence[int]) -> None:
    """Sum `partials` [n, sum(widths)] over n into up to four outputs; an empty one is skipped."""
    missing = 4 - len(outputs)
    stored = [out.numel() > 0 for out in outputs] + [False] * missing
    if not any(stored):
        return
    targets = [
        out if store else partials
        for out, store in zip([*outputs, *[partials] * missing], stored, strict=True)
    ]
    ends = [sum(widths[:i]) for i in (1, 2, 3)]
    n_partials, width = partials.shape
    block_m = 64
    sum_partials_kernel[(-(-width // block_m),)](
        partials,
        *targets,
        *ends,
        n_partials,
        width,
        *stored,
        BLOCK_N=16,
        BLOCK_M=block_m,
        num_warps=4,
    )
