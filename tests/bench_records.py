"""Small cells and made-up records, for the tests of the benchmark suite."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from bench import limits
from bench.cells import Cell
from convnest_kernels import _extension

# A small model's last stage, of 32² images: 1×1 maps are the second case.
SMALL: dict[str, Any] = {"variant": "convnest_atto", "image_size": 64, "stage": 2, "batch": 2}
LIMITS = dataclasses.asdict(limits.Limits(1e11, 2e11, 3e9, ((1 << 15, 1e11), (1 << 28, 1e10))))

needs_core = pytest.mark.skipif(_extension.module is None, reason="the native module is not built")


def small(subject: str, mode: str = "infer", **options: Any) -> Cell:
    return Cell(**{**SMALL, "subject": subject, "mode": mode, **options})


def a_record(cell: Cell, **medians: float) -> dict[str, Any]:
    found = {
        name.replace("_", "-"): {
            "median": m, "p20": 0.98 * m, "p80": 1.02 * m, "samples": [m], "page_faults": 0
        }
        for name, m in medians.items()
    }  # fmt: skip
    return {"cell": dataclasses.asdict(cell), "contenders": found, "floor": 0.5, "cost": None}
