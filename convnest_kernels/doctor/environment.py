"""Versions, processor, threads, GPUs, and what the native extension was built with."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from convnest_kernels import __version__, _extension, backends

# Of a processor's flags, those that kernels are chosen by or may one day be.
_CPU_FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "asimdhp", "bf16", "sve", "sve2",
)  # fmt: skip

_VARIABLES = ("CONVNEST_BACKEND", "CONVNEST_CPU_ISA", "OMP_NUM_THREADS")


def versions() -> dict[str, Any]:
    """Versions of this package and of what it stands on; of triton, or why it is not there."""
    triton, triton_error = _triton()
    return {
        "convnest_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "numpy": _numpy(),
        "triton": triton,
        "triton_error": triton_error,
        "platform": platform.platform(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "problems": _problems(),
    }


def _numpy() -> str | None:
    """Its version where it is installed: `train` needs it, the operators do not."""
    try:
        return importlib.metadata.version("numpy")
    except importlib.metadata.PackageNotFoundError:
        return None


def _triton() -> tuple[str | None, str | None]:
    try:
        return importlib.import_module("triton").__version__, None
    except ImportError as error:
        return None, str(error)


def _problems() -> list[str]:
    """Settings that would make every operator fail."""
    try:
        backends.requested(None)
    except ValueError as error:
        return [str(error)]
    return []


def show_versions(found: dict[str, Any]) -> list[str]:
    triton = found["triton"] or f"none ({found['triton_error']})"
    return [
        f"convnest_kernels {found['convnest_kernels']}, Python {found['python']}, "
        f"torch {found['torch']}, numpy {found['numpy'] or 'none'}, triton {triton}",
        found["platform"],
        *(f"{name}={value}" for name, value in found["variables"].items()),
        *(f"PROBLEM: {problem}" for problem in found["problems"]),
    ]


def extension() -> dict[str, Any]:
    """The native module: with what and for what it was built, or why it is missing."""
    core: Any = _extension.module
    if core is None:
        return {"built": False, "error": _extension.error}
    return {"built": True, "error": None, "path": core.__file__, **core.build_info()}


def show_extension(found: dict[str, Any]) -> list[str]:
    if not found["built"]:
        return [f"not there: {found['error']}"]
    cuda = "none"
    if found["cuda"]:
        cuda = f"{found['cuda']} for {', '.join(map(str, found['cuda_archs']))}"
    return [
        str(found["path"]),
        f"compiler {found['compiler']}; CUDA {cuda}",
        f"CPU kernels for {', '.join(found['isas'])}",
    ]


def processor() -> dict[str, Any]:
    """The processor, the instruction sets our kernels can and do use, and the thread pool."""
    core: Any = _extension.module
    info = _cpu_info()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    found: dict[str, Any] = {
        "model": info.get("model name") or platform.processor() or platform.machine(),
        "logical_cores": os.cpu_count(),
        "features": [name for name in _CPU_FEATURES if name in flags],
        "isa": None,
        "isas": [],
        "threads": torch.get_num_threads(),
        "thread_pool": None,
    }
    if core is not None:
        found["isa"], found["isas"] = core.cpu.isa(), core.cpu.isas()
        found["threads"] = core.cpu.num_threads()
        found["thread_pool"] = "torch" if _extension.shares_torch_threads else "own"
    return found


def _cpu_info() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    with suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        pairs = (line.partition(":") for line in first.splitlines())
        return {name.strip(): value.strip() for name, _, value in pairs}
    return {}


def show_processor(found: dict[str, Any]) -> list[str]:
    lines = [f"{found['model']}, {found['logical_cores']} logical cores"]
    if found["features"]:
        lines.append(f"has {' '.join(found['features'])}")
    if found["isas"]:
        lines.append(f"kernels use {found['isa']}; possible here: {', '.join(found['isas'])}")
        pool = "torch's thread pool" if found["thread_pool"] == "torch" else "their own thread pool"
        lines.append(f"on {pool}, {found['threads']} threads")
    return lines


def gpus() -> list[dict[str, Any]]:
    """The GPUs that torch sees."""
    if not torch.cuda.is_available():
        return []
    found = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory": properties.total_memory,
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return found


def show_gpus(found: list[dict[str, Any]]) -> list[str]:
    if not found:
        built = torch.version.cuda or torch.version.hip
        return ["none" if built else "none that torch could use: it was built for the CPU alone"]
    return [
        f"{i}: {gpu['name']}, compute capability {gpu['capability']}, "
        f"{gpu['memory'] / 2**30:.0f} GiB, {gpu['multiprocessors']} multiprocessors"
        for i, gpu in enumerate(found)
    ]
