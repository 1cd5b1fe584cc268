"""The native CPU backend: C++ kernels of `csrc/`, chosen at run time by instruction set."""

from __future__ import annotations

import torch

from .. import _extension
from ..backends import Call

name = "cpu"

KERNEL_SIZES = (3, 5, 7, 9, 11, 13)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def reasons_against(call: Call) -> list[str]:
    reasons = []
    if _extension.error is not None:
        reasons.append(_extension.error)
    if call.device != "cpu":
        reasons.append(f"it runs on CPU tensors, got {call.device}")
    if call.dtype not in DTYPES:
        reasons.append(f"it has no kernel for {call.dtype}")
    if call.kernel_size is not None and call.kernel_size not in KERNEL_SIZES:
        sizes = ", ".join(map(str, KERNEL_SIZES))
        reasons.append(f"its kernel sizes are {sizes}, got {call.kernel_size}")
    return reasons
