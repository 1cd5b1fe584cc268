"""Fixtures: every backend that can run on this machine, NaN-poisoned memory, seeds by test name."""

from __future__ import annotations

# First: it asks for Triton's interpreter, before anything imports triton.
import tests.triton_interpreter  # noqa: F401

# isort: split
import random
import signal
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from convnest_kernels import _extension, backends
from convnest_kernels.ops import _contract

# Tests run side by side and on small tensors; those of the thread count set it themselves.
torch.set_num_threads(1)

# A job in a shell's background starts with Ctrl-C ignored: the tests of Ctrl-C would see nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)

CPU_ISAS = _extension.module.cpu.isas() if _extension.module is not None else []

# "eager" is the eager backend inside the registered operators, with its hand-written backward.
BACKENDS = ["eager", *(f"cpu-{isa}" for isa in CPU_ISAS)]


@pytest.fixture(autouse=True)
def poison_uninitialized_memory() -> Iterator[None]:
    """Make torch fill every uninitialised tensor with NaN: what a kernel fails to write shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    number = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(number)
    # timm's augmentations draw from both of these.
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A backend by name, to be parametrized over (indirectly); "cpu-<isa>" forces that path."""
    name, _, isa = request.param.partition("-")
    if name == "eager":
        monkeypatch.setattr(_contract, "runs_eager", lambda call, requested: False)
    if not isa:
        yield name
        return
    core = _extension.module
    assert core is not None
    before = core.cpu.isa()
    core.cpu.set_isa(isa)
    yield name
    core.cpu.set_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore torch's thread count after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def fresh_selection() -> Iterator[None]:
    """Forget cached choices after each test: tests replace backends."""
    yield
    backends.select.cache_clear()
