"""What the native core does with memory: it stays inside its tensors, and reuses its workspace."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from convnest_kernels import _extension
from tests.core_reference import EPS, address, poisoned

if _extension.module is None:
    pytest.skip(f"no native core: {_extension.error}", allow_module_level=True)

MODULE = _extension.module


def test_stays_inside_its_tensors() -> None:
    script = Path(__file__).with_name("core_guarded.py")
    done = subprocess.run(
        [sys.executable, str(script), MODULE.__file__], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr}"
    assert done.stdout.strip() == "stayed inside"


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("shape", [(1, 28, 28, 24), (2, 7, 7, 192)], ids=str)
def test_calls_take_no_fresh_pages(shape: tuple[int, int, int, int], recompute: str) -> None:
    """A training step's own workspace, megabytes of it, is that of the step before."""
    n, h, w, c = shape
    d, k = 12 * c, 7
    rng = np.random.default_rng(0)
    shapes = [(d, c), d, d, d, (d, k * k), d, (c, d), c, c, c, c]
    x, dy = rng.standard_normal((2, *shape)).astype(np.float32)
    held = [(rng.standard_normal(s) / 10).astype(np.float32) for s in shapes]
    new = [poisoned(s, "float32") for s in [shape, *3 * [(n, h, w)], shape, *2 * [(n, h, w)]]]
    y, mean, rstd, _, t, post_mean, post_rstd = new
    wide = [poisoned((n, h, w, d), "float32") if recompute == "none" else None for _ in range(2)]
    grads = [np.zeros_like(p) for p in (x, *held)]
    options = (*shape, d, k, EPS, True, MODULE.float32)
    kept = [*wide, mean, rstd, t, post_mean, post_rstd]

    def step() -> None:
        MODULE.cpu.nested_block_forward(
            [*map(address, (x, *held)), 0], list(map(address, (y, *kept))), *options
        )
        read = (dy, x, *kept, *held[:7], held[8], held[10])
        MODULE.cpu.nested_block_backward(
            list(map(address, read)), list(map(address, grads)), *options
        )

    for _ in range(2):
        step()
    before = page_faults()
    for _ in range(5):
        step()
    # The interpreter takes a page now and then.
    assert page_faults() - before < 5 * 8
