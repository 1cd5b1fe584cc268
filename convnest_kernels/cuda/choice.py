"""Where "auto" leaves a call that the CUDA kernels can run to Triton: where they are slower.

By prediction, for no GPU has run either: `choice.csv`, beside this file, holds the time of a
training step, Triton's being 1, as `python -m bench.predict_choice` worked it out (the figures
behind it: bench/results/cuda_choice.md; a test compares them). Pure functions: nothing here asks
for a GPU.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..backends import Call

PATH = Path(__file__).with_name("choice.csv")

# Two kinds of GPUs: these have so much bandwidth that arithmetic counts; on the others the bytes
# that a backend moves decide.
DATA_CENTRE, GRAPHICS = "data centre", "graphics"
_DATA_CENTRE = ((8, 0), (9, 0), (10, 0), (10, 3))


class Case(NamedTuple):
    """What the prediction tells apart."""

    gpus: str
    operator: str
    bits: int  # of an element
    kernel_size: int  # 0 of operators over rows
    small_map: bool  # where the image is the tile (csrc/common/depthwise_small.h)


def gpus_of(capability: tuple[int, int]) -> str:
    return DATA_CENTRE if capability in _DATA_CENTRE else GRAPHICS


def case_of(call: Call, capability: tuple[int, int]) -> Case:
    bits = 8 * call.dtype.itemsize
    size = call.kernel_size or 0
    small = size > 0 and bits == 16 and call.channels % 8 == 0
    if small:
        images, height, width, _ = call.shape
        small = takes_small_map(images, height, width, size)
    return Case(gpus_of(capability), call.operator, bits, size, small)


def takes_small_map(images: int, height: int, width: int, kernel_size: int) -> bool:
    """The kernels' own choice by the shape: csrc/common/depthwise_small.h says why."""
    if not images or not 0 < height <= 8 or not 0 < width <= 8:
        return False
    small = -(-images // 16) * 16 * 64
    if kernel_size > 9:
        return small <= 6 * images * height * width
    radius = kernel_size // 2
    beside = min((124 + radius) // (width + radius), images)
    rows = -(-images // beside) * (height + radius)
    return small < -(-rows // 4) * 4 * 128


def reason_against(call: Call, capability: tuple[int, int]) -> str | None:
    """Why Triton should run a call on a GPU of this compute capability, or None."""
    case = case_of(call, capability)
    ratio = read().get(case)
    if ratio is None or ratio <= 1:
        return None
    kernel = f", {case.kernel_size}×{case.kernel_size}" if case.kernel_size else ""
    maps = " on small maps" if case.small_map else ""
    return (
        f"predicted {ratio:.2f} times Triton's time: {case.operator}{kernel} in {case.bits} bits"
        f"{maps}, on {case.gpus} GPUs"
    )


@functools.cache
def read() -> Mapping[Case, float]:
    """The predicted times on file, Triton's being 1."""
    with PATH.open(newline="") as file:
        return {
            Case(
                row["gpus"],
                row["operator"],
                int(row["bits"]),
                int(row["kernel_size"]),
                row["small_map"] == "1",
            ): float(row["ratio"])
            for row in csv.DictReader(file)
        }


def write(ratios: Mapping[Case, float]) -> None:
    """Put predicted times on file."""
    with PATH.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Case._fields, "ratio"])
        for case, ratio in sorted(ratios.items()):
            writer.writerow([*case[:-1], int(case.small_map), f"{ratio:.2f}"])
    read.cache_clear()
