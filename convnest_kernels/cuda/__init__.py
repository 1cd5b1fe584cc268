"""The CUDA C++ backend's seat: its kernels (csrc/*.cu) are not built into `_C` yet."""

from __future__ import annotations

from convnest_kernels.backends import Call

name = "cuda"


def reasons_against(call: Call) -> list[str]:
    return ["its kernels are not built into this version yet"]
