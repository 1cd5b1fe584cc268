"""The compile report of the 14 models' kernels: registers, spills, shared memory, instructions.

`compile_report.csv`, beside this file, has a row for each kernel, dtype and launch configuration
that the models use on each architecture, as `python -m bench.triton_report` compiled it. A row
names what it was compiled from by two digests, `launch` and `source` (`aot.Launch.digest`,
`aot.source_digest`), so that a table out of step with heuristics or kernels shows (a test compares
them). Reading it takes no Triton and no GPU: `doctor --kernels` prints it anywhere.
"""

from __future__ import annotations

import collections
import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from . import heuristics

PATH = Path(__file__).with_name("compile_report.csv")
ARCHITECTURES = ("80", "90", "100", "120", "gfx942")

# Budgets of occupancy. What is not named may fill its registers with one program of 8 warps a
# multiprocessor: the FMA form and the backward convolution, whose accumulators are the point, and
# rows, which stay in registers whole.
_LEAST_OCCUPANCY = {
    "depthwise_fwd_matrix_kernel": 0.25,
    "nested_conv_finish_kernel": 0.19,
    "sum_partials_kernel": 1.0,
}


@dataclass(frozen=True)
class Row:
    """What the compiler made of one kernel with one launch configuration on one architecture."""

    arch: str
    kernel: str
    dtype: str
    tile: str  # its constexprs: "K=7 NORM ...", flags only where they are on
    options: str  # "num_warps=4 maxnreg=255"
    aligned: str  # sizes known to be multiples of 16
    registers: int  # a thread
    spills: int  # bytes of local memory (NVIDIA) or scratch memory (AMD) a thread
    shared: int  # bytes a program
    occupancy: float  # resident threads by registers and shared memory, of the most possible
    instructions: int  # in the machine code
    mix: str  # the most frequent of them: "FFMA:120 LDG:12 ..."
    launch: str
    source: str
    triton: str  # the version that compiled it

    @property
    def faults(self) -> list[str]:
        """The budgets that this kernel exceeds."""
        found = []
        if self.spills:
            found.append(f"spills {self.spills} bytes")
        limit = heuristics.SHARED_BYTES[self.arch]
        if self.shared > limit:
            found.append(f"takes {self.shared} bytes of shared memory, {limit} are there")
        least = _LEAST_OCCUPANCY.get(self.kernel, 0.12)
        if self.occupancy < least:
            found.append(f"occupancy {self.occupancy}, {least} is the least")
        return found


def read(path: Path = PATH) -> list[Row]:
    """The rows of a table; none if there is no such file."""
    if not path.exists():
        return []
    convert = {"int": int, "float": float, "str": str}
    types = {field.name: convert[str(field.type)] for field in fields(Row)}
    with path.open(newline="") as file:
        return [
            Row(**{name: types[name](value) for name, value in entry.items()})
            for entry in csv.DictReader(file)
        ]


def write(rows: Iterable[Row], path: Path = PATH) -> None:
    """Write a table, sorted, so that a new one differs by what changed alone."""
    order = {arch: i for i, arch in enumerate(ARCHITECTURES)}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in sorted(rows, key=lambda row: (order[row.arch], *list(asdict(row).values())[1:])):
            writer.writerow(asdict(row))


def summary(rows: Iterable[Row]) -> list[list[str]]:
    """The ranges over all tiles, a line for each kernel, dtype and architecture; header first."""
    groups: dict[tuple[str, str, str], list[Row]] = collections.defaultdict(list)
    for row in rows:
        groups[row.arch, row.kernel, row.dtype].append(row)
    measured = ("registers", "spills", "shared", "occupancy", "instructions")
    lines = [["arch", "kernel", "dtype", "tiles", *measured, "most frequent instructions"]]
    for key, group in groups.items():
        ranges = []
        for name in measured:
            values = [getattr(row, name) for row in group]
            low, high = min(values), max(values)
            ranges.append(f"{low:g}" if low == high else f"{low:g} to {high:g}")
        largest = max(group, key=lambda row: row.instructions)
        lines.append([*key, str(len(group)), *ranges, " ".join(largest.mix.split()[:6])])
    return lines
