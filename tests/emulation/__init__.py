"""The CUDA kernels on the host: builds them against the emulation (cuda_model.h) and runs them.

`run` launches one entry of library.cpp on CPU tensors; what the emulation finds wrong is a `Fault`.
`backend` puts the kernels behind `backend="cuda"` for a while, through the bindings of the real
build (csrc/bindings_cuda.cpp); there it is a RuntimeError, as CUDA's own errors are.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convnest_kernels import backends
from convnest_kernels.cuda import _host

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
COMPILER = os.environ.get("CXX", "g++")
# AVX2 makes the emulated matrix products fast; -O2 because everything hangs on inlining.
FLAGS = [
    *("-std=c++20", "-O2", "-march=x86-64-v3", "-fPIC", "-shared"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
]


# In the order of csrc/common/element_type.h.
TYPES = (torch.float32, torch.bfloat16, torch.float16)


class Fault(Exception):  # noqa: N818  (what CUDA's documents call it)
    """What a kernel did that the CUDA programming model does not allow."""


def missing() -> str | None:
    """Why the kernels cannot be emulated here, or None."""
    if os.uname().machine != "x86_64":
        return "the emulation switches fibers in x86-64 assembly"
    if shutil.which(COMPILER) is None:
        return f"the compiler {COMPILER} is not on PATH"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """Compile (once for the same sources, in the user's cache folder) and load the kernels."""
    import pybind11

    kernels = [*sorted(CSRC.glob("*.cu")), CSRC / "bindings_cuda.cpp"]
    units = [*kernels, *sorted(HERE.glob("*.cpp")), *sorted(HERE.glob("*.cu"))]
    folders = [CSRC, HERE, pybind11.get_include(), sysconfig.get_path("include")]
    includes = [f"-I{folder}" for folder in folders]
    command = [COMPILER, *FLAGS, *includes, "-x", "c++", *map(str, units)]
    digest = hashlib.sha256(" ".join(command).encode())
    headers = [*CSRC.rglob("*.cuh"), *CSRC.glob("*_cuda.h"), *HERE.glob("*.h")]
    headers += [CSRC / "bindings_cuda.h", *CSRC.glob("common/*.h")]
    for source in sorted([*units, *headers]):
        digest.update(source.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "convnest-kernels"
    cache.mkdir(parents=True, exist_ok=True)
    built = cache / f"emulation-{digest.hexdigest()[:16]}.so"
    with (cache / "emulation.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            # Several checkouts may take turns.
            known = sorted(cache.glob("emulation-*.so"), key=lambda path: path.stat().st_mtime)
            for stale in known[:-3]:
                stale.unlink()
            unfinished = built.with_suffix(".tmp")
            subprocess.run([*command, "-o", str(unfinished)], check=True)
            unfinished.rename(built)
        loaded = ctypes.CDLL(str(built))
    loaded.emulation_error.restype = ctypes.c_char_p
    return loaded


@functools.cache
def module() -> Any:
    """The kernels' Python bindings, as `_C.cuda`; of the same library, and so of the same state."""
    loader = importlib.machinery.ExtensionFileLoader("emulated", library()._name)
    spec = importlib.util.spec_from_loader("emulated", loader)
    assert spec is not None
    loaded = importlib.util.module_from_spec(spec)
    loader.exec_module(loaded)
    return loaded


@contextmanager
def device(shared_bytes: int) -> Iterator[None]:
    """Run on a device whose blocks can have so much shared memory (it is 227 KB otherwise)."""
    library().emulation_device_shared_bytes(shared_bytes)
    try:
        yield
    finally:
        library().emulation_device_shared_bytes(0)


def configure(seed: int = 0, skipped_barrier: int = -1, check_races: bool = True) -> None:
    """Set up the next run (see `run`), with no buffers declared."""
    library().emulation_configure(seed, skipped_barrier, int(check_races))


def declare(name: str, tensor: Tensor | None, writable: bool) -> None:
    """Let kernels read a tensor, or read and write it."""
    if tensor is None:
        return
    assert tensor.is_contiguous()
    library().emulation_declare(
        name.encode(),
        ctypes.c_void_p(tensor.data_ptr()),
        ctypes.c_size_t(tensor.numel() * tensor.element_size()),
        int(writable),
    )


class Backend:
    """What `convnest_kernels.cuda` runs on under `backend`."""

    def __init__(self, seed: int) -> None:
        self.core = module()
        self.seed = seed
        self.launches = 0

    def watch(self, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor | None]) -> None:
        configure(self.seed)
        self.launches += 1
        for kind, tensors in (("input", inputs), ("output", outputs)):
            for i, tensor in enumerate(tensors):
                declare(f"{kind} {i}", tensor, kind == "output")


@contextmanager
def backend(seed: int = 2) -> Iterator[Backend]:
    """Run `backend="cuda"` on CPU tensors, in the emulation."""
    assert _host.emulation is None
    _host.emulation = emulated = Backend(seed)
    backends.select.cache_clear()
    try:
        yield emulated
    finally:
        _host.emulation = None
        backends.select.cache_clear()


class Params(ctypes.Structure):
    """A parameter struct of the core; `of` takes tensors for its pointers."""

    @classmethod
    def of(cls, **values: Any) -> Params:
        params = cls()
        assert values.keys() == {name for name, _ in cls._fields_}
        for name, value in values.items():
            pointer = isinstance(value, Tensor)
            setattr(params, name, value.data_ptr() if pointer else value)
        return params


def fields(pointers: str, integers: str, *rest: tuple[str, Any]) -> list[tuple[str, Any]]:
    """The fields of a parameter struct: pointers, then ints, then the rest."""
    return [
        *((name, ctypes.c_void_p) for name in pointers.split()),
        *((name, ctypes.c_int) for name in integers.split()),
        *rest,
    ]


def run(
    entry: str,
    *arguments: Any,
    inputs: dict[str, Tensor | None],
    outputs: dict[str, Tensor | None],
    seed: int = 0,
    skipped_barrier: int = -1,
    check_races: bool = True,
) -> None:
    """Call an entry of library.cpp; kernels may read `inputs`, and read and write `outputs`.

    Args:
        seed: the order of threads and blocks: 0 ascending, 1 descending, others random.
        skipped_barrier: plant a fault: the barrier site of this number does nothing.
        check_races: off, only wrong numbers (or unwritten memory) can show a missing barrier.

    Raises:
        Fault: with the emulation's report.
    """
    lib = library()
    configure(seed, skipped_barrier, check_races)
    for writable, tensors in enumerate((inputs, outputs)):
        for name, tensor in tensors.items():
            declare(name, tensor, bool(writable))
    if getattr(lib, entry)(*arguments):
        raise Fault(lib.emulation_error().decode())


def barrier_sites() -> int:
    """How many different barriers the last run came to."""
    return library().emulation_barrier_sites()
