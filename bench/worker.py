"""Measures one cell, in a process of its own: its allocator, threads and memory are its own.

    python -m bench.worker '{"cell": {...}, "peers": [...], "budget": 10, "limits": {...},
                             "left_out": {}, "wanted": 30}'
    python -m bench.worker --serve    # for a GPU: one request a line of stdin, until it ends

The record is the last line of stdout, as JSON.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from bench import floors, machine, memory, process, timing
from bench.cells import Cell
from bench.contenders import CONTENDERS
from bench.limits import Limits
from bench.runtimes import Prepared, SkipError
from bench.verify import Checker, WrongNumbersError
from bench.work import Work, build


def measure(
    cell: Cell, peers: list[str], budget: float, limits: dict[str, Any] | None,
    tell: Callable[[str], None] = lambda text: None, wanted: int = timing.WANTED_SAMPLES,
    peer_seconds: float = 120.0,
) -> dict[str, Any]:  # fmt: skip
    """Check every contender, time those that are right in turn, measure their memory.

    Returns the record: the cell, its cost and floor, and by contender its times and memory, or
    "skipped" or "refused" with the reason. A refused contender of ours fails the run; a peer has
    `peer_seconds` to compile and be checked. With no samples wanted, each one runs once, however
    long that takes, which fills the compilers' caches.
    """
    begun = time.perf_counter()
    torch.set_num_threads(cell.threads)
    torch.manual_seed(0)
    work = build(cell)
    checker = Checker(work, work.forms[work.reference_form], work.inputs)
    record: dict[str, Any] = {
        "cell": dataclasses.asdict(cell),
        "conditions": machine.conditions(cell.device),
        "taken": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "cost": work.cost.of(cell.mode) if work.cost else None,
        "floor": _floor(work, limits),
        "checked": f"{len(work.checked)} of {cell.batch} images against float64",
        "contenders": {},
    }
    if wanted:
        checker.truth()
    ready: dict[str, Prepared] = {}
    for name in peers:
        started = time.perf_counter()
        found: dict[str, Any] = record["contenders"].setdefault(name, {})
        ours = CONTENDERS[name].ours
        try:
            with nullcontext() if ours or not wanted else _at_most(peer_seconds):
                prepared = CONTENDERS[name].prepare(work)
                with prepared.scope():
                    if wanted:
                        found["error"] = _check(prepared, checker, work, ours)
                    else:
                        prepared.results()
            ready[name] = prepared
        except SkipError as reason:
            found["skipped"] = str(reason)
        except WrongNumbersError as reason:
            found["refused"] = str(reason)
        except Exception as error:
            # A peer that cannot compile or export a cell is a finding; ours fails the run by it.
            text = str(error).strip() or "no message"
            state = "refused" if ours else "skipped"
            found[state] = f"{type(error).__name__}: {text.splitlines()[0][:160]}"
        found["prepared_in"] = round(time.perf_counter() - started, 2)
        tell(f"  {name}: {found.get('skipped') or found.get('refused') or 'ready'}")
    if not wanted:
        return record
    calls = {name: _call(prepared, cell) for name, prepared in ready.items()}
    clock = timing.CudaClock() if cell.device == "cuda" else timing.CpuClock()
    for name, samples in timing.interleave(calls, clock, budget, wanted).items():
        record["contenders"][name] |= samples.as_dict()
    for name, prepared in ready.items():
        record["contenders"][name] |= _memory(prepared, cell)
    record["conditions_after"] = machine.conditions(cell.device)
    record["took"] = round(time.perf_counter() - begun, 1)
    return record


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """SkipError in what takes longer: a compiler that goes on must not cost the whole cell."""

    def stop(number: int, frame: Any) -> None:
        raise SkipError(f"not ready after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _check(prepared: Prepared, checker: Checker, work: Work, ours: bool) -> float:
    if prepared.checked_by_itself:
        assert prepared.module is not None
        if not prepared.is_compiled:
            return 0.0  # it is its own formula
        inputs = work.inputs_for("nhwc")
        return Checker(work, prepared.module, inputs).check(prepared.results(), ours=False)
    return checker.check(prepared.results(), ours)


def _call(prepared: Prepared, cell: Cell) -> Callable[[], Any]:
    """What is timed: calls in their scope, on each copy of the inputs in turn.

    On a GPU an inference call is replayed from a graph, where it can be captured.
    """
    calls = []
    for call in (prepared.call, *prepared.others):

        def scoped(call: Callable[[], Any] = call) -> Any:
            with prepared.scope():
                return call()

        calls.append(
            _captured(scoped) if cell.device == "cuda" and cell.mode == "infer" else scoped
        )
    return timing.rotate(calls)


def _captured(call: Callable[[], Any]) -> Callable[[], Any]:
    try:
        return timing.as_graph(call)
    except RuntimeError:
        return call


def _floor(work: Work, limits: dict[str, Any] | None) -> float | None:
    if limits is None or work.cost is None:
        return None
    cell = work.cell
    if cell.device == "cuda":
        return floors.gpu_floor(work.cost, limits, cell.mode, cell.dtype)
    return floors.cpu_floor(work.cost, Limits(**limits), cell.mode, cell.dtype == "bfloat16")


def _memory(prepared: Prepared, cell: Cell) -> dict[str, int | None]:
    if prepared.module is None or prepared.forward is None:
        return {}
    found: dict[str, int | None] = {}
    with prepared.scope():
        if cell.mode == "train":
            found["kept_for_backward"] = memory.kept_for_backward(prepared.module, prepared.forward)
        found["peak_allocated"] = memory.peak_allocated(prepared.call, cell.device)
        if cell.device == "cpu":
            found["peak_resident"] = memory.peak_resident(prepared.call)
    return found


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The record of a request, which is also printed."""
    record = measure(
        Cell(**request["cell"]),
        request["peers"],
        request["budget"],
        request["limits"],
        tell=lambda text: print(text, file=sys.stderr, flush=True),
        wanted=request["wanted"],
        peer_seconds=request["peer_seconds"],
    )
    for name, reason in request["left_out"].items():
        record["contenders"][name] = {"skipped": reason}
    print(json.dumps(record), flush=True)
    return record


def serve() -> int:
    """Answer the requests on stdin, each with the GPU's memory and the compilers as new."""
    process.end_with_parent()
    for line in sys.stdin:
        answer(json.loads(line))
        torch.compiler.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # raises where a kernel broke the context, and ends this
            torch.cuda.empty_cache()
    return 0


def main() -> int:
    if sys.argv[1] == "--serve":
        return serve()
    answer(json.loads(sys.argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
