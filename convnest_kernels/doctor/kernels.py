"""`doctor --kernels`: what the compiler made of the Triton kernels for a GPU, from its report."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from convnest_kernels.doctor.text import table
from convnest_kernels.triton import aot_table


def architecture(name: str | None) -> str:
    """The table's name of an architecture ("sm_90" or "90"), or of this machine's first GPU.

    Raises ValueError if there is no GPU and no name, or no report for it.
    """
    known = ", ".join(_spoken(arch) for arch in aot_table.ARCHITECTURES)
    if name is None:
        if not torch.cuda.is_available():
            raise ValueError(f"this machine has no GPU: name one with --arch, of {known}")
        properties = torch.cuda.get_device_properties(0)
        if torch.version.hip:
            name = str(properties.gcnArchName).split(":")[0]
        else:
            name = f"sm_{properties.major}{properties.minor}"
    found = name.removeprefix("sm_")
    if found not in aot_table.ARCHITECTURES:
        raise ValueError(f"--arch must be one of {known}, for which there are reports, got {name}")
    return found


def collect(arch: str) -> dict[str, Any]:
    """Every row of the report for an architecture, and what exceeds a budget."""
    rows = [row for row in aot_table.read() if row.arch == arch]
    return {
        "arch": _spoken(arch),
        "triton": sorted({row.triton for row in rows}),
        "kernels": [asdict(row) for row in rows],
        "faults": [
            f"{row.kernel} {row.dtype} ({row.tile}) {f}" for row in rows for f in row.faults
        ],
    }


def show(found: dict[str, Any]) -> list[str]:
    rows = [aot_table.Row(**entry) for entry in found["kernels"]]
    header, *body = aot_table.summary(rows)
    return [
        f"{found['arch']}: {len(rows)} kernels of the 14 models, compiled ahead of time by Triton "
        f"{', '.join(found['triton'])}; ranges over all tiles",
        *table([line[1:] for line in (header, *body)]),
        *(f"OVER BUDGET: {fault}" for fault in found["faults"]),
    ]


def _spoken(arch: str) -> str:
    return arch if arch.startswith("gfx") else f"sm_{arch}"
