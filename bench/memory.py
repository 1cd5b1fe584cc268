"""Memory of one call: kept for backward, peak allocated by torch, peak of the process."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def kept_for_backward(module: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward; a storage counts once.

    Parameters do not count, nor do the inputs' own storages where they are parameters.
    """
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = forward()
    del y  # lived until here, so that no two tensors were at one address
    return sum(storages.values())


def peak_allocated(call: Callable[[], Any], device: str) -> int | None:
    """The most that torch had allocated during a call, above what it had before.

    On the CPU from the profiler's events: what a kernel allocates by itself does not count.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def peak_resident(call: Callable[[], Any]) -> int | None:
    """How far a call raises the resident size of the process; None where it is not known.

    Free heap memory goes back to the system first, so that what is reused counts.
    """
    gc.collect()
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status("VmRSS")
    call()
    return max(_status("VmHWM") - before, 0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")
