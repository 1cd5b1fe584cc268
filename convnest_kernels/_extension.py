"""Load the native module `_C`, once, and hand it torch's thread pool.

`import convnest_kernels` must work where no extension could be built; then `module` is None and
`error` says why, and the backends that need it repeat that reason.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from pathlib import Path
from types import ModuleType

import torch

_THREAD_POOL_SYMBOLS = ("torch_parallel_for", "torch_get_num_threads")


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        from . import _C
    except ImportError as error:
        return None, f"the native module convnest_kernels._C could not be imported ({error})"
    return _C, None


def _share_torch_threads(core: ModuleType) -> bool:
    """Run the kernels on torch's own pool: a second one would fight it for the cores.

    torch 2.10 and newer export two C symbols for that (torch/csrc/stable/c/shim.h). Without them
    the core uses its own pool.
    """
    name = {"nt": "torch_cpu.dll", "posix": "libtorch_cpu.so"}[os.name]
    path = Path(torch.__file__).parent / "lib" / name
    if not path.exists():
        path = path.with_suffix(".dylib")
    try:
        library = ctypes.CDLL(str(path))
        addresses = [
            ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value
            for symbol in _THREAD_POOL_SYMBOLS
        ]
    except (OSError, AttributeError):
        return False
    core.cpu.use_thread_pool(*addresses)
    return True


def _force_instruction_set(core: ModuleType) -> str | None:
    """Take the instruction set that CONVNEST_CPU_ISA names; return what is wrong with it, if so."""
    name = os.environ.get("CONVNEST_CPU_ISA")
    if not name:
        return None
    try:
        core.cpu.set_isa(name)
    except ValueError as problem:
        reason = f"CONVNEST_CPU_ISA={name}: {problem}"
        warnings.warn(f"{reason}; the cpu backend is off", stacklevel=2)
        return reason
    return None


module, error = _load()
shares_torch_threads = module is not None and _share_torch_threads(module)
if module is not None:
    # A wrong name is a reason against the backend, not a crash of the import.
    error = _force_instruction_set(module)
