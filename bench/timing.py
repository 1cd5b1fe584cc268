"""Timing: contenders in turn (A B C, A B C, …), so that a slow moment hits them all.

On the CPU a sample is a wall-clock time with the page faults it took. On a GPU it is between two
CUDA events around a call, or around a replay of its graph; before the first event the L2 cache is
overwritten, outside of what is timed.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

MIN_SAMPLES, WANTED_SAMPLES = 5, 30
WARM_UP = 2
LONG_CALL = 0.5  # seconds: one warm-up is enough, each has run before to be checked
SHORTEST_SAMPLE = 2e-4  # seconds: shorter calls are repeated within a sample


@dataclass
class Samples:
    """Seconds of each call, in the order taken, and page faults beside them (CPU)."""

    seconds: list[float] = field(default_factory=list)
    faults: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def percentile(self, part: float) -> float:
        """Linear between the two nearest samples."""
        ordered = sorted(self.seconds)
        position = part * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    def as_dict(self) -> dict[str, Any]:
        return {
            "median": self.median,
            "p20": self.percentile(0.2),
            "p80": self.percentile(0.8),
            "page_faults": statistics.median(self.faults) if self.faults else None,
            "samples": [float(f"{s:.4g}") for s in self.seconds],
        }


class CpuClock:
    """Wall clock and minor page faults."""

    def sample(self, call: Callable[[], Any], repeats: int) -> tuple[float, float]:
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        seconds = (time.perf_counter() - start) / repeats
        after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        return seconds, (after - faults) / repeats


class CudaClock:
    """CUDA events around one call; the L2 cache is overwritten before the first."""

    def __init__(self, cuda: Any = torch.cuda, scratch: Any = None) -> None:
        self.cuda = cuda
        if scratch is None:
            l2 = cuda.get_device_properties(cuda.current_device()).L2_cache_size
            scratch = torch.empty(max(2 * l2, 1 << 26), dtype=torch.uint8, device="cuda")
        self.scratch = scratch

    def sample(self, call: Callable[[], Any], repeats: int) -> tuple[float, None]:
        start = self.cuda.Event(enable_timing=True)
        stop = self.cuda.Event(enable_timing=True)
        # A write of twice the L2's size also keeps the GPU busy until the call is queued.
        self.scratch.zero_()
        start.record()
        for _ in range(repeats):
            call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / repeats, None


def as_graph(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph, to be replayed without launch times.

    Raises RuntimeError where the call cannot be captured (it synchronises, or allocates elsewhere).
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def rotate(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """One call after the other, so that no buffer is warm from the sample before."""
    if len(calls) == 1:
        return calls[0]
    turn = 0

    def run() -> Any:
        nonlocal turn
        turn += 1
        return calls[turn % len(calls)]()

    return run


def interleave(
    calls: dict[str, Callable[[], Any]], clock: Any, budget: float, wanted: int = WANTED_SAMPLES
) -> dict[str, Samples]:
    """Sample every call in turn: `wanted` rounds, fewer where `budget` seconds are up."""
    repeats = {}
    for name, call in calls.items():
        for _ in range(WARM_UP):
            seconds, _ = clock.sample(call, 1)
            if seconds > LONG_CALL:
                break
        repeats[name] = max(1, round(SHORTEST_SAMPLE / max(seconds, 1e-9)))
    samples = {name: Samples() for name in calls}
    deadline = time.perf_counter() + budget
    for taken in range(wanted):
        if taken >= MIN_SAMPLES and time.perf_counter() > deadline:
            break
        for name, call in calls.items():
            seconds, faults = clock.sample(call, repeats[name])
            samples[name].seconds.append(seconds)
            if faults is not None:
                samples[name].faults.append(faults)
    return samples
