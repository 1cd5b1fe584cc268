"""The CUDA C++ backend's seat: no kernel is there yet, and it says so."""

from __future__ import annotations

from convnest_kernels.backends import Call

name = "cuda"


def reasons_against(call: Call) -> list[str]:
    return ["the CUDA C++ kernels are not written yet"]
