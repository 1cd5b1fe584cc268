"""Two processes on this machine that talk through gloo, and run what a test hands them."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

WORLD = 2
# Long enough for a machine that does other work, short enough for a test that hangs.
TIMEOUT = 120


def _join(store: str, rank: int) -> None:
    warnings.simplefilter("error")
    torch.set_warn_always(True)  # a warning that C++ gives once would hide from all tests but one
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # uninitialised memory is NaN, as in every test
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=TIMEOUT),
    )


class Ranks:
    """Calls a function of a test module in both processes at once, with the same arguments."""

    def __init__(self, store: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pools = [
            ProcessPoolExecutor(1, context, initializer=_join, initargs=(store, rank))
            for rank in range(WORLD)
        ]

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(*args)` returns on each rank; an exception of either is raised."""
        futures = [pool.submit(function, *args) for pool in self._pools]
        return [future.result(TIMEOUT) for future in futures]

    def stop(self) -> None:
        for pool in self._pools:
            for process in pool._processes.values():
                process.kill()  # one that waits for the other would wait for its time-out
            pool.shutdown(wait=True, cancel_futures=True)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two ranks, started once for a module: torch takes seconds to import."""
    started = Ranks(str(tmp_path_factory.mktemp("ranks") / "store"))
    yield started
    started.stop()
