"""The CUDA C++ backend: kernels of `csrc/*.cu`, for NVIDIA GPUs of capability 8.0 and newer.

Its kernels run on CPU tensors too, in the host emulation that the tests hold (tests/emulation),
and nowhere else: `_host.emulation` is None outside of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from .. import _extension
from ..backends import Call
from . import _host

name = "cuda"

# What there are kernels for; tests hold the core's own checks against it.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "nested_conv": FLOATS,
    "dwconv_gelu_layernorm": FLOATS,
    "gelu_layernorm": FLOATS,
    "layernorm_residual": FLOATS,
}
KERNEL_SIZES = dict.fromkeys(("nested_conv", "dwconv_gelu_layernorm"), (3, 5, 7, 9, 11, 13))
MAX_CHANNELS = 8192  # what the backward of a norm holds in the registers of a block
MAX_ROWS = 2**31  # pixels are counted in 32 bits


def reasons_against(call: Call) -> list[str]:
    return [*_reasons_against_machine(call.device), *_reasons_against_kernel(call)]


def reasons_against_auto(call: Call) -> list[str]:
    """In its emulation it is a tool for tests."""
    return [] if _host.emulation is None else ["in its emulation it runs by name alone"]


def _reasons_against_machine(device: str) -> list[str]:
    if _host.emulation is not None:
        return [] if device == "cpu" else [f"its emulation runs on CPU tensors, got {device}"]
    reasons = []
    if (error := _build_error()) is not None:
        reasons.append(error)
    if device != "cuda":
        reasons.append(f"it runs on CUDA tensors, got {device}")
    elif torch.version.hip:
        reasons.append("it runs on NVIDIA GPUs, this torch is built for ROCm")
    elif not torch.cuda.is_available():
        reasons.append("torch sees no GPU (a CPU build of torch, no driver, or no device)")
    elif error is None:
        reasons += _reasons_against_gpus()
    return reasons


def _build_error() -> str | None:
    """Why the native module has no CUDA kernels, or None."""
    if _extension.module is None:
        return _extension.error
    info = _extension.module.build_info()
    if not info["cuda"]:
        return f"the native module was built without CUDA kernels ({info['cuda_reason']})"
    return None


@functools.cache
def _reasons_against_gpus() -> list[str]:
    """Why the driver or one of the GPUs cannot run the kernels that were built."""
    core = _host.core()
    found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    archs = [int(arch) for arch in _extension.module.build_info()["cuda_archs"]]  # type: ignore[union-attr]
    reasons = [reason_against_capability(capability, archs) for capability in sorted({*found})]
    built, driver = core.runtime_version(), core.driver_version()
    if driver // 1000 < built // 1000:
        reasons.append(
            f"it was built with CUDA {_version(built)}, the driver runs CUDA {_version(driver)}"
        )
    return [reason for reason in reasons if reason is not None]


def reason_against_capability(capability: tuple[int, int], archs: Sequence[int]) -> str | None:
    """Why code for `archs` (90 is capability 9.0) does not run on a GPU, or None.

    Machine code runs on its own generation, from its own capability on; of the newest architecture
    there is PTX, which the driver compiles for any newer GPU.
    """
    major, minor = capability
    if major < 8:
        return f"it needs compute capability 8.0 or newer, a GPU here has {major}.{minor}"
    number = 10 * major + minor
    if any(arch // 10 == major and arch <= number for arch in archs) or number >= max(archs):
        return None
    built = ", ".join(f"{arch // 10}.{arch % 10}" for arch in archs)
    return (
        f"it was built for compute capability {built}, a GPU here has {major}.{minor} "
        "(CONVNEST_CUDA_ARCHS chooses when building)"
    )


def _reasons_against_kernel(call: Call) -> list[str]:
    if call.operator not in DTYPES:
        return [f"it has no {call.operator} yet"]
    reasons = []
    if call.dtype not in DTYPES[call.operator]:
        reasons.append(f"its {call.operator} has no kernel for {call.dtype}")
    sizes = KERNEL_SIZES.get(call.operator, ())
    if call.kernel_size is not None and call.kernel_size not in sizes:
        listed = ", ".join(map(str, sizes))
        reasons.append(f"its kernel sizes are {listed}, got {call.kernel_size}")
    if call.channels > MAX_CHANNELS:
        reasons.append(f"it holds rows of up to {MAX_CHANNELS} channels, got {call.channels}")
    if (rows := math.prod(call.shape[:-1])) >= MAX_ROWS:
        reasons.append(f"it counts pixels in 31 bits, got {rows}")
    return reasons


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
