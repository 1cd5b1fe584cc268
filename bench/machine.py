"""The machine of a run: processor or GPU, cores, clocks, driver, and every version that matters."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from convnest_kernels import __version__, _extension

PEERS = ("torchvision", "timm", "onnxruntime", "openvino", "zentorch", "triton", "numpy")


def processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def family() -> str | None:
    """Family and model of an x86 processor, which tell what a cloud's bare "EPYC" does not."""
    found = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    return f"family {found['cpu family']} model {found['model']}" if "cpu family" in found else None


def folder(name: str) -> str:
    """A machine's name as that of a results folder."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(device: str = "cpu") -> dict[str, Any]:
    """What is recorded beside results; call it in the process that measures."""
    core: Any = _extension.module
    versions = {"convnest_kernels": __version__, "torch": torch.__version__}
    for name in PEERS:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    machine: dict[str, Any] = {
        "processor": processor(),
        "family": family(),
        "cores": os.cpu_count(),
        "isa": core.cpu.isa() if core is not None else None,
        "compiler": core.build_info()["compiler"] if core is not None else None,
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": versions,
        "commit": commit(),
    }
    if device == "cuda":
        machine |= gpu()
    return machine


def commit() -> str | None:
    """The checkout's commit, with a + where files differ from it."""
    root = Path(__file__).parent.parent
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return None


def gpu() -> dict[str, Any]:
    """Name, memory, and what nvidia-smi says of driver and clocks at this moment."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    found: dict[str, Any] = {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
        found["nvidia-smi"] = dict(zip(fields.split(","), values, strict=True))
    return found


def conditions(device: str) -> dict[str, Any]:
    """What may differ from cell to cell: affinity, threads and their settings, load, clocks."""
    settings = ("OMP_", "MALLOC_", "KMP_", "MKL_", "ONEDNN_", "CONVNEST_", "CUDA_VISIBLE")
    return {
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(settings)},
        "affinity": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "clocks": gpu().get("nvidia-smi") if device == "cuda" else None,
    }
