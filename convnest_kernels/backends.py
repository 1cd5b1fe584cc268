"""Which backend runs a call, and why the others do not.

Every backend is a package that answers `reasons_against(call) -> list[str]` (an empty list means
that it can run the call) and holds one module per operator stem with `forward` and `backward`.
One that "auto" should pass over at times has `reasons_against_auto(call)` too.
The doctor and `explain` (explanation.py) print the very lists that `select` uses.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch

# In the order in which "auto" asks them.
BACKENDS = ("cuda", "triton", "cpu", "eager")

_PACKAGES = {"eager": "reference"}  # every other backend is the package of its own name


class BackendError(RuntimeError):
    """No backend, or not the one that was asked for, can run a call."""


class Call(NamedTuple):
    """What a backend needs to know of a call to say whether it can run it."""

    operator: str
    device: str
    dtype: torch.dtype
    channels: int
    kernel_size: int | None
    shape: tuple[int, ...]  # of the activation


# Process-wide on purpose, like torch.backends' flags: torch.compile guards on a module global (not
# on a thread-local or a ContextVar), and autograd runs backward on threads of its own.
_requested: str = os.environ.get("CONVNEST_BACKEND") or "auto"


def _package(name: str) -> ModuleType:
    return importlib.import_module(f".{_PACKAGES.get(name, name)}", __package__)


def check_name(name: str, source: str = "backend") -> str:
    """Return `name`, or raise ValueError if no backend has that name."""
    if name != "auto" and name not in BACKENDS:
        expected = ", ".join(repr(known) for known in ("auto", *BACKENDS))
        raise ValueError(f"{source} must be one of {expected}, got {name!r}")
    return name


def requested(backend: str | None) -> str:
    """Resolve an operator's `backend=`: the argument, else `use_backend`, else the environment."""
    if backend is not None:
        return check_name(backend)
    return check_name(_requested, "CONVNEST_BACKEND")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operators called inside on `name` ("auto", "cuda", "triton", "cpu" or "eager").

    It overrides the environment variable CONVNEST_BACKEND and yields to an operator's own
    `backend=`. It holds for the whole process, as torch's own backend flags do; a backward pass
    runs on the backend of its forward pass, wherever it is called.

    Raises ValueError for an unknown name.
    """
    global _requested
    before, _requested = _requested, check_name(name)
    try:
        yield
    finally:
        _requested = before


def reasons_against(name: str, call: Call) -> list[str]:
    """Why backend `name` cannot run `call`; an empty list if it can."""
    return _package(name).reasons_against(call)


def reasons_against_auto(name: str, call: Call) -> list[str]:
    """Why "auto" passes over a backend that can run `call`; an empty list for most."""
    reasons: Callable[[Call], list[str]] | None
    reasons = getattr(_package(name), "reasons_against_auto", None)
    return reasons(call) if reasons is not None else []


@functools.lru_cache(maxsize=4096)
def select(call: Call, requested: str) -> str:
    """Return the backend that runs `call`; a backend asked for by name never falls back.

    Raises BackendError with every reason when there is none.
    """
    refused = {}
    for name in BACKENDS if requested == "auto" else (requested,):
        reasons = reasons_against(name, call)
        if requested == "auto":
            reasons = reasons or reasons_against_auto(name, call)
        if not reasons:
            return name
        refused[name] = reasons
    lines = [f"  {name}: {'; '.join(reasons)}" for name, reasons in refused.items()]
    raise BackendError(f"backend={requested!r} cannot run {_describe(call)}:\n" + "\n".join(lines))


@functools.cache
def _stem(name: str, operator: str) -> ModuleType:
    return importlib.import_module(f".{_PACKAGES.get(name, name)}.{operator}", __package__)


def implementation(call: Call, requested: str) -> ModuleType:
    """Return the module whose `forward` and `backward` run `call`."""
    return _stem(select(call, requested), call.operator)


def _describe(call: Call) -> str:
    kernel = "" if call.kernel_size is None else f", kernel size {call.kernel_size}"
    dtype = str(call.dtype).removeprefix("torch.")
    return f"{call.operator} on {call.device}, {dtype}, shape {list(call.shape)}{kernel}"


@dataclass(frozen=True)
class Explanation:
    """Which backend a call gets (None: none can run it) and the reasons against each of them."""

    call: Call
    backend: str | None
    reasons: dict[str, list[str]]
    auto: dict[str, list[str]]  # of those that can run it: why "auto" passes them over

    def __str__(self) -> str:
        lines = [f"{_describe(self.call)}: {self.backend or 'no backend can run it'}"]
        for name, reasons in self.reasons.items():
            passed_over = "".join(f"; auto: {reason}" for reason in self.auto[name])
            lines.append(f"  {name:7} {'; '.join(reasons) or 'can run it' + passed_over}")
        return "\n".join(lines)


def explain_call(call: Call, backend: str | None = None) -> Explanation:
    """Explain the choice for a `Call`, without tensors."""
    try:
        chosen: str | None = select(call, requested(backend))
    except BackendError:
        chosen = None
    reasons = {name: reasons_against(name, call) for name in BACKENDS}
    auto = {name: [] if reasons[name] else reasons_against_auto(name, call) for name in BACKENDS}
    return Explanation(call, chosen, reasons, auto)
