"""What the CUDA host functions share: the launch on the caller's stream and device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import _extension
from .._native import address, new_gradient, new_output, parameter
from ..reference.common import new_statistics

__all__ = [
    "core",
    "launch",
    "new_gradient",
    "new_output",
    "new_statistics",
    "parameter",
    "workspace",
    "workspace_bytes",
]


class Emulation(Protocol):
    """The kernels on the host: tests/emulation."""

    core: Any  # what `_C.cuda` is in the real build: the same bindings

    def watch(self, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor | None]) -> None:
        """The next launch may read `inputs`, and read and write `outputs`, and nothing else."""


# Set by the tests alone, which hold the emulation; nothing in this package can. While it is set,
# the backend runs on CPU tensors and on nothing else.
emulation: Emulation | None = None


def core() -> Any:
    """The kernels: `_C.cuda`, or the emulation's."""
    return _extension.module.cuda if emulation is None else emulation.core  # type: ignore[union-attr]


def launch(
    function: str,
    inputs: Sequence[Tensor | None],
    outputs: Sequence[Tensor | None],
    *numbers: float,
) -> None:
    """Call a function of the core: addresses of inputs and outputs, numbers, dtype and stream.

    It runs on the first input's device, on the caller's current stream there. The workspace, if
    there is one, is the last output: torch's allocator hands its memory to nobody else before what
    is queued on that stream is done.
    """
    x = inputs[0]
    assert x is not None
    if emulation is not None:
        emulation.watch(inputs, outputs)
    kernels = core()
    dtype = dtype_code(x)
    addresses = [address(tensor) for tensor in (*inputs, *outputs)]
    with _device_of(x):
        getattr(kernels, function)(*addresses, *numbers, dtype, _stream_of(x))


def dtype_code(x: Tensor) -> int:
    """The core's number for the dtype of x."""
    code: int = getattr(core(), str(x.dtype).removeprefix("torch."))
    return code


def workspace_bytes(function: str, tensors: Sequence[Tensor | None], *numbers: int) -> int:
    """What a function of the core says of these tensors on the first one's device."""
    x = tensors[0]
    assert x is not None
    addresses = [address(tensor) for tensor in tensors]
    with _device_of(x):
        size: int = getattr(core(), function)(*addresses, *numbers, dtype_code(x))
    return size


def workspace(x: Tensor, size: int) -> Tensor:
    """Uninitialised memory of `size` bytes beside x, aligned for any access."""
    return x.new_empty(size, dtype=torch.uint8)


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _stream_of(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
