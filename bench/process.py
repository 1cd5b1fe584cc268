"""The processes that measure cells: one for each on a CPU, one for all on a GPU."""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, Any

COMMAND = [sys.executable, "-m", "bench.worker"]
RECORD = '{"cell":'  # how the line begins that is a record; what else is printed does not count

Measure = Callable[[dict[str, Any], Mapping[str, str], float], dict[str, Any]]


class EndedError(RuntimeError):
    """A process ended without a record."""


def alone(request: dict[str, Any], environment: Mapping[str, str], timeout: float) -> Any:
    """A cell's record, from a process of its own: its allocator and its memory are its own.

    Raises EndedError, and subprocess.TimeoutExpired after `timeout` seconds.
    """
    done = subprocess.run(
        [*COMMAND, json.dumps(request)],
        env=dict(environment), stdout=subprocess.PIPE, text=True, timeout=timeout,
    )  # fmt: skip
    if done.returncode:
        raise EndedError(f"its process ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


class Shared:
    """Measures cell after cell in one process; another one where that ended or took too long.

    To start one (torch, the GPU's context, its compilers) takes 10 s, as long as a cell.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def __call__(
        self, request: dict[str, Any], environment: Mapping[str, str], timeout: float
    ) -> Any:
        """As `alone`."""
        if self.process is None:
            self.process = subprocess.Popen(
                [*COMMAND, "--serve"],
                env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        found: list[str] = []
        reader = threading.Thread(target=_read_record, args=(self.process.stdout, found))
        reader.start()
        with suppress(BrokenPipeError):  # it has ended: the reader finds that too
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        reader.join(timeout)
        if reader.is_alive():
            self.process.kill()
            reader.join()
            self.end()
            raise subprocess.TimeoutExpired(COMMAND, timeout)
        if not found:
            code = self.process.wait()
            self.end()
            raise EndedError(f"its process ended with {code}")
        return json.loads(found[0])

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            with suppress(BrokenPipeError):
                self.process.communicate()  # closes its pipes
            self.process = None


def _read_record(stream: IO[str], found: list[str]) -> None:
    for line in stream:
        if line.startswith(RECORD):
            found.append(line)
            return


def end_with_parent() -> None:
    """Have this process killed when its parent ends, however that ends (Linux).

    Otherwise it goes on with its cell, beside whatever is measured next.
    """
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


@contextmanager
def measuring(device: str) -> Iterator[Measure]:
    """How the cells of a device are measured."""
    if device != "cuda":
        yield alone
        return
    shared = Shared()
    try:
        yield shared
    finally:
        shared.end()
