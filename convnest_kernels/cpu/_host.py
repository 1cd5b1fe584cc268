"""What the CPU host functions share: dtype codes beside what every native backend shares."""

from __future__ import annotations

from typing import Any

import torch

from .. import _extension
from .._native import address, new_gradient, new_output, parameter
from ..reference.common import new_statistics

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
