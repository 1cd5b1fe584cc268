"""How host functions of native kernels (cpu, cuda) hand tensors to the core: as addresses."""

from __future__ import annotations

from torch import Tensor

from .reference.common import accumulate_dtype


def parameter(p: Tensor | None, x: Tensor) -> Tensor | None:
    """A parameter as the core reads it: contiguous, in the dtype that x is accumulated in."""
    if p is None:
        return None
    dtype = accumulate_dtype(x.dtype)
    if p.dtype == dtype and p.is_contiguous():  # nearly always, and each call of torch's takes time
        return p
    return p.detach().to(dtype).contiguous()


def address(tensor: Tensor | None) -> int:
    """Where a tensor's elements start; 0 (null) for None and for an empty tensor."""
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def new_gradient(x: Tensor, shape: tuple[int, ...], need: bool) -> Tensor:
    """An uninitialised parameter gradient; empty, and so null to the core, if it is not needed."""
    return x.new_empty(shape if need else 0, dtype=accumulate_dtype(x.dtype))


def new_output(x: Tensor, need: bool = True) -> Tensor:
    """An uninitialised contiguous tensor like x; empty if it is not needed."""
    return x.new_empty(x.shape if need else 0)
