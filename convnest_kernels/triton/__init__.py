"""The Triton backend: GPU kernels compiled at run time, for NVIDIA sm_80 and newer, and AMD."""

from __future__ import annotations

import functools
import importlib.metadata
import os

import torch

from ..backends import Call
from .heuristics import KERNEL_SIZES, MAX_CHANNELS

name = "triton"

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MINIMUM_VERSION = (3, 6)


@functools.cache
def _installation_error() -> str | None:
    """Why Triton cannot be used, or None; from its metadata, since importing it takes 0.3 s."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "Triton is not installed (pip install triton)"
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_VERSION:
        return f"it needs Triton {'.'.join(map(str, MINIMUM_VERSION))} or newer, found {version}"
    return None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors, as TRITON_INTERPRET=1 asks.

    Triton reads the variable when a kernel is defined: set it before the first import.
    """
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _device_error() -> str | None:
    if torch.version.hip or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"it needs compute capability 8.0 or newer, this GPU has {major}.{minor}"
    return None


def reasons_against(call: Call) -> list[str]:
    reasons = []
    if (error := _installation_error()) is not None:
        reasons.append(error)
    if interpreted():
        if call.device not in ("cpu", "cuda"):
            reasons.append(f"its interpreter runs on CPU tensors, got {call.device}")
    elif call.device != "cuda":
        reasons.append(
            f"it runs on CUDA and ROCm tensors, got {call.device} "
            "(on CPU tensors only under its interpreter, TRITON_INTERPRET=1)"
        )
    elif (error := _device_error()) is not None:
        reasons.append(error)
    if call.dtype not in DTYPES:
        reasons.append(f"it has no kernel for {call.dtype}")
    if call.kernel_size is not None and call.kernel_size not in KERNEL_SIZES:
        sizes = ", ".join(map(str, KERNEL_SIZES))
        reasons.append(f"its kernel sizes are {sizes}, got {call.kernel_size}")
    if call.channels > MAX_CHANNELS:
        reasons.append(f"it holds rows of up to {MAX_CHANNELS} channels, got {call.channels}")
    return reasons


def reasons_against_auto(call: Call) -> list[str]:
    """In its interpreter it is a tool for tests; elsewhere, where it was measured to be slow."""
    if call.device == "cpu":
        return ["in its interpreter it runs by name alone"]
    slower = call.operator == "nested_conv" and call.dtype.itemsize == 2
    if slower and call.kernel_size in (5, 7) and not torch.version.hip:
        times = {5: 1.8, 7: 1.4}[call.kernel_size]
        return [f"a training step on an H200 took {times} times eager's"]
    return []
