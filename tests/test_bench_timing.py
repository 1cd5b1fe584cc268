"""The benchmark suite's clocks, memory and limits."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from bench import (
    calls,
    floors,
    limits,
    memory,
    timing,
    worker,
)
from bench.cells import Cell
from bench.work import build
from tests.bench_records import small


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    torch.set_num_threads(1)


def test_interleaving_takes_turns() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}

    class Clock:
        def sample(self, call: Any, repeats: int) -> tuple[float, float]:
            call()
            return 0.1, 3.0

    samples = timing.interleave(calls, Clock(), budget=60.0, wanted=7)
    assert order[2 * timing.WARM_UP :] == ["a", "b"] * 7
    assert samples["a"].as_dict()["page_faults"] == 3
    few = timing.interleave(calls, Clock(), budget=0.0, wanted=30)
    assert len(few["a"].seconds) == timing.MIN_SAMPLES


def test_long_calls_are_warmed_up_once() -> None:
    calls_made: list[int] = []

    class Clock:
        def sample(self, call: Any, repeats: int) -> tuple[float, None]:
            calls_made.append(repeats)
            return 2 * timing.LONG_CALL, None

    timing.interleave({"a": lambda: None}, Clock(), budget=0.0)
    assert len(calls_made) == 1 + timing.MIN_SAMPLES


def test_percentiles() -> None:
    samples = timing.Samples([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert (samples.percentile(0.2), samples.median, samples.percentile(0.8)) == (2.0, 3.5, 5.0)


def test_page_faults_are_counted() -> None:
    def touch() -> None:
        torch.empty(1 << 26, dtype=torch.uint8).fill_(1)

    _, faults = timing.CpuClock().sample(touch, 1)
    _, none = timing.CpuClock().sample(lambda: None, 1)
    assert none <= 16 < faults


def test_cuda_clock_flushes_before_it_starts() -> None:
    """Order of what the GPU is asked to do, on a stand-in that records it."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, stop: Event) -> float:
            return 6.0

    class Scratch:
        def zero_(self) -> None:
            log.append("flush")

    cuda = type("Cuda", (), {"Event": Event})
    clock = timing.CudaClock(cuda, Scratch())
    assert clock.sample(lambda: log.append("call"), 3) == (0.002, None)
    assert log == ["flush", "record", "call", "call", "call", "record", "wait"]


def test_rotation_goes_round() -> None:
    seen: list[int] = []
    run = timing.rotate([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(6):
        run()
    assert sorted(seen[:3]) == [0, 1, 2] and seen[:3] == seen[3:]


def test_calls_take_turns_on_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: every copy of the inputs is called, none twice in a row."""
    monkeypatch.setattr(calls, "copies_for", lambda device: 3)
    work = build(small("gelu_layernorm"))
    seen: list[int] = []

    class Spy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.data_ptr())
            return x

    call = worker._call(calls.run_torch(work, "nhwc", Spy()), work.cell)
    for _ in range(6):
        call()
    assert len(set(seen[:3])) == 3 and seen[:3] == seen[3:]


def test_memory_of_a_call() -> None:
    linear = torch.nn.Linear(64, 64)
    x = torch.randn(1024, 64, requires_grad=True)
    # The weight does not count, x does; backward of a GELU keeps its input as well.
    assert memory.kept_for_backward(linear, lambda: linear(x)) == x.nbytes
    kept = memory.kept_for_backward(linear, lambda: torch.nn.functional.gelu(linear(x)))
    assert kept == 2 * x.nbytes
    peak = memory.peak_allocated(lambda: torch.zeros(1 << 20) + 1, "cpu")
    assert peak is not None and 8 << 20 <= peak < 9 << 20
    resident = memory.peak_resident(lambda: torch.ones(1 << 24))
    assert resident is None or resident >= 60 << 20


def test_limits_and_floor() -> None:
    found = limits.measure()
    assert 1e9 < found.float32_flops < 1e13
    assert 1e7 < found.gelus < 1e12
    sizes = [size for size, _ in found.bandwidths]
    assert sizes == sorted(sizes) and len(sizes) == 4
    assert found.bandwidth(1) > found.bandwidth(1e9) > 1e8
    cost = build(Cell("gelu_layernorm", 4, 1)).cost
    assert cost is not None
    toy = limits.Limits(1e11, 2e11, 1e9, ((1 << 40, 1e9),))
    elements = 49 * 4608
    assert floors.cpu_floor(cost, toy, "infer", False) == pytest.approx(8 * elements / 1e9)
    quick = dataclasses.replace(toy, bandwidths=((1 << 40, 1e15),))
    assert floors.cpu_floor(cost, quick, "infer", False) == pytest.approx(elements / 1e9)
    both = limits.together([quick, quick])
    assert both.bandwidths == ((2 << 40, 2e15),)
    assert floors.cpu_floor(cost, both, "train", False) == pytest.approx(1.5 * elements / 1e9)


def test_limits_of_two_threads() -> None:
    """Both at once: rates and working sets are those of two cores together."""
    found = limits.measure(2)
    assert found.float32_flops > 1e9
    assert [size for size, _ in found.bandwidths] == [
        2 * size for size, _ in limits.measure().bandwidths
    ]
