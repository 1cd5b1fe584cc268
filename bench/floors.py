"""The least time that a cell can take by the measured limits of the machine."""

from __future__ import annotations

import time
from typing import Any

import torch

from bench.limits import Limits
from bench.work import Cost


def cpu_floor(cost: Cost, limits: Limits, mode: str, bfloat16: bool) -> float:
    """Arithmetic at the measured rates, or the bytes at their level's bandwidth if that is more.

    Arithmetic: linear layers (bfloat16 dots where the dtype has them), taps inside the image, and
    erf GELUs, of which a core does one thing at a time. Training counts as three times it. The
    limits are those of as many cores at once as the cell has threads.
    """
    rate = (bfloat16 and limits.bfloat16_flops) or limits.float32_flops
    seconds = cost.linear_flops / rate + cost.conv_flops / limits.float32_flops
    seconds += cost.gelus / limits.gelus
    moved = cost.of(mode)["bytes"]
    times = 3 if mode == "train" else 1
    return max(times * seconds, moved / limits.bandwidth(moved))


def gpu_limits() -> dict[str, float]:
    """Copy bandwidth and matmul rates of this GPU, measured with torch: best of 20."""

    def best(call: Any) -> float:
        seconds = []
        for _ in range(20):
            start = torch.cuda.Event(enable_timing=True)
            stop = torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            stop.record()
            stop.synchronize()
            seconds.append(start.elapsed_time(stop) / 1e3)
        return min(seconds)

    source = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    limits = {"copy": 2 * source.nbytes / best(lambda a=target, b=source: a.copy_(b))}
    del source, target
    size = 8192
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
        seconds = best(lambda a=a, b=b: a @ b)
        limits[str(dtype).removeprefix("torch.")] = 2 * size**3 / seconds
    limits["measured_at"] = time.time()
    return limits


def gpu_floor(cost: Cost, limits: dict[str, float], mode: str, dtype: str) -> float:
    """The larger of the linear layers at the matmul rate and the bytes at copy bandwidth.

    Depthwise taps and GELU have no rate of their own measured here, so they do not count.
    """
    times = 3 if mode == "train" else 1
    return max(times * cost.linear_flops / limits[dtype], cost.of(mode)["bytes"] / limits["copy"])
