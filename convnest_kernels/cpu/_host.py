"""What the CPU host functions share: dtype codes, addresses, parameters as the core reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from convnest_kernels import _extension
from convnest_kernels.reference.common import accumulate_dtype, new_statistics

__all__ = [
    "DTYPE_CODES",
    "_C",
    "address",
    "new_gradient",
    "new_output",
    "new_statistics",
    "parameter",
]

_C: Any = _extension.module  # None where it could not be built; no kernel is ever selected then

if _C is not None:
    DTYPE_CODES = {
        torch.float32: _C.float32,
        torch.float64: _C.float64,
        torch.bfloat16: _C.bfloat16,
        torch.float16: _C.float16,
    }


def parameter(p: Tensor | None, x: Tensor) -> Tensor | None:
    """A parameter as the core reads it: contiguous, in the dtype that x is accumulated in."""
    if p is None:
        return None
    return p.detach().to(accumulate_dtype(x.dtype)).contiguous()


def address(tensor: Tensor | None) -> int:
    """Where a tensor's elements start; 0 (null) for None and for an empty tensor."""
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def new_gradient(x: Tensor, shape: tuple[int, ...], need: bool) -> Tensor:
    """An uninitialised parameter gradient; empty, and so null to the core, if it is not needed."""
    return x.new_empty(shape if need else 0, dtype=accumulate_dtype(x.dtype))


def new_output(x: Tensor, need: bool = True) -> Tensor:
    """An uninitialised contiguous tensor like x; empty if it is not needed."""
    return x.new_empty(x.shape if need else 0)
