"""The CUDA kernels on the host: builds them against the emulation (cuda_model.h) and runs them.

`run` launches one entry of library.cpp on CPU tensors; what the emulation finds wrong is a `Fault`.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
COMPILER = os.environ.get("CXX", "g++")
# AVX2 makes the emulated matrix products fast; -O2 because everything hangs on inlining.
FLAGS = [
    *("-std=c++20", "-O2", "-march=x86-64-v3", "-fPIC", "-shared"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
]


class Fault(Exception):  # noqa: N818  (what CUDA's documents call it)
    """What a kernel did that the CUDA programming model does not allow."""


def missing() -> str | None:
    """Why the kernels cannot be emulated here, or None."""
    if os.uname().machine != "x86_64":
        return "the emulation switches fibers in x86-64 assembly"
    if shutil.which(COMPILER) is None:
        return f"the compiler {COMPILER} is not on PATH"
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """Compile (once for the same sources, in the user's cache folder) and load the kernels."""
    units = [*sorted(CSRC.glob("*.cu")), *sorted(HERE.glob("*.cpp")), *sorted(HERE.glob("*.cu"))]
    command = [COMPILER, *FLAGS, f"-I{CSRC}", f"-I{HERE}", "-x", "c++", *map(str, units)]
    digest = hashlib.sha256(" ".join(command).encode())
    headers = [*CSRC.rglob("*.cuh"), *CSRC.glob("*_cuda.h"), *HERE.glob("*.h")]
    for source in sorted([*units, *headers]):
        digest.update(source.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "convnest-kernels"
    cache.mkdir(parents=True, exist_ok=True)
    built = cache / f"emulation-{digest.hexdigest()[:16]}.so"
    with (cache / "emulation.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            for stale in cache.glob("emulation-*.so"):
                stale.unlink()
            unfinished = built.with_suffix(".tmp")
            subprocess.run([*command, "-o", str(unfinished)], check=True)
            unfinished.rename(built)
        loaded = ctypes.CDLL(str(built))
    loaded.emulation_error.restype = ctypes.c_char_p
    return loaded


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
    lib.emulation_configure(seed, skipped_barrier, int(check_races))
    for writable, tensors in enumerate((inputs, outputs)):
        for name, tensor in tensors.items():
            if tensor is not None:
                assert tensor.is_contiguous()
                lib.emulation_declare(
                    name.encode(),
                    ctypes.c_void_p(tensor.data_ptr()),
                    ctypes.c_size_t(tensor.numel() * tensor.element_size()),
                    writable,
                )
    if getattr(lib, entry)(*arguments):
        raise Fault(lib.emulation_error().decode())


def barrier_sites() -> int:
    """How many different barriers the last run came to."""
    return library().emulation_barrier_sites()
