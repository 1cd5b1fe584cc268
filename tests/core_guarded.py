"""Run every stem on arrays that end (or begin) at a page that must not be touched.

    python core_guarded.py PATH_OF_THE_NATIVE_MODULE

A kernel that reads or writes beyond a tensor dies of a segmentation fault. No torch in here.
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import sys

import core_reference as reference
import numpy as np

PAGE = mmap.PAGESIZE
PROT_NONE = 0


def guarded(x: np.ndarray, at_end: bool) -> np.ndarray:
    """A copy of x whose last (or first) byte has such a page beside it."""
    pages = -(-x.nbytes // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    offset = PAGE + (pages * PAGE - x.nbytes if at_end else 0)
    y = np.frombuffer(memory, x.dtype, x.size, offset).reshape(x.shape)
    y[...] = x
    libc = ctypes.CDLL(None, use_errno=True)
    for page in (0, pages + 1):
        assert libc.mprotect(ctypes.c_void_p(base + page * PAGE), PAGE, PROT_NONE) == 0
    return y


# N H W C D K; the last block is done in slices of channels.
SIZES = [
    (2, 7, 9, 17, 50, 7),
    (1, 12, 5, 3, 33, 3),
    (1, 3, 8, 16, 48, 5),
    (2, 3, 5, 3, 870, 3),
]


class Guarded(reference.Core):
    at_end = True

    def activation(self, x):
        return guarded(super().activation(x), self.at_end)

    def parameters(self, *values):
        return [v if v is None else guarded(v, self.at_end) for v in super().parameters(*values)]

    def empty(self, shape):
        return guarded(super().empty(shape), self.at_end)

    def empty_parameter(self, shape):
        return guarded(super().empty_parameter(shape), self.at_end)


def run(core: Guarded) -> None:
    rng = np.random.default_rng(0)
    for n, h, w, c, d, k in SIZES:
        p = [rng.standard_normal(s) for s in [(d, k * k), d, d, d]]
        wide, dwide = rng.standard_normal((2, n, h, w, d))
        rows, drows = wide.reshape(-1, d), dwide.reshape(-1, d)
        core.nested_conv(wide, *p, True, dwide)
        core.dwconv_gelu_layernorm(wide, *p, True, False, dwide)
        core.gelu_layernorm(rows, *p[2:], False, drows)
        core.layernorm_residual(rows, rows, *p[1:], drows)
        x, dy = rng.standard_normal((2, n, h, w, c))
        shapes = [(d, c), d, d, d, (d, k * k), d, (c, d), c, c, c, c]
        parameters = [rng.standard_normal(s) for s in shapes]
        for recompute in ("none", "conv", "all"):
            core.nested_block(x, parameters, True, dy, recompute)


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.cpu.set_num_threads(2)
    for isa in module.cpu.isas():
        module.cpu.set_isa(isa)
        for dtype in reference.STORAGE:
            for Guarded.at_end in (True, False):
                run(Guarded(module, dtype))
    print("stayed inside")
