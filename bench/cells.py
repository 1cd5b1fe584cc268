"""The cells of a benchmark run: what is computed, at which shape, dtype, mode and allocator."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from bench.cases import BATCHES, DTYPES, OPERATORS, Stage, stages

BLOCKS = ("block",)
NETWORKS = ("model", "training")
SUBJECTS = (*OPERATORS, *BLOCKS, *NETWORKS)
MODES = ("infer", "train")

# glibc as it comes, and told to keep what it has: fresh buffers over 32 MiB cost a page fault for
# each 4 KiB, which doubled eager's time. A setting must be there before the process starts.
ALLOCATORS: dict[str, dict[str, str]] = {
    "default": {},
    "tuned": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "8000000000",
        "MALLOC_TOP_PAD_": "67108864",
    },
}


@dataclass(frozen=True)
class Cell:
    """One line of a result: `subject` at a stage of a variant; networks have stage 0."""

    subject: str
    stage: int
    batch: int
    dtype: str = "float32"
    mode: str = "infer"
    variant: str = "convnest_tiny"
    allocator: str = "tuned"
    device: str = "cpu"
    threads: int = 1
    image_size: int = 224

    def __post_init__(self) -> None:
        _one_of("subject", self.subject, SUBJECTS)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("mode", self.mode, MODES)
        _one_of("allocator", self.allocator, ALLOCATORS)
        _one_of("device", self.device, ("cpu", "cuda"))
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")
        expected = range(1) if self.subject in NETWORKS else range(1, len(self._stages()) + 1)
        _one_of("stage", self.stage, expected)

    def _stages(self) -> list[Stage]:
        return stages(self.variant, self.image_size)

    @property
    def shape(self) -> Stage:
        """The stage's map and channels; of the first stage for a network."""
        return self._stages()[max(self.stage, 1) - 1]

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def key(self) -> str:
        """A name that no other cell has."""
        return "-".join(str(value) for value in dataclasses.astuple(self))

    @property
    def title(self) -> str:
        """For people: what differs from line to line."""
        shape = self.shape
        where = f"stage {self.stage} ({shape.height}², C {shape.dim})" if self.stage else "whole"
        return (
            f"{self.subject} {self.variant} {where}, batch {self.batch}, {self.dtype}, "
            f"{self.mode}, {self.threads} thread{'s' * (self.threads > 1)}, {self.allocator} malloc"
        )


def _one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    allowed = list(allowed)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def product(
    subjects: Iterable[str], stage_numbers: Iterable[int] | None, batches: Iterable[int],
    dtypes: Iterable[str], modes: Iterable[str], allocators: Iterable[str] = ("tuned",),
    **common: Any,
) -> list[Cell]:  # fmt: skip
    """Every combination; a network has one "stage", and training steps only train."""
    cells: list[Cell] = []
    variant = common.get("variant", "convnest_tiny")
    image_size = common.get("image_size", 224)
    every = range(1, len(stages(variant, image_size)) + 1)
    grid = itertools.product(subjects, allocators, dtypes, modes, batches)
    for subject, allocator, dtype, mode, batch in grid:
        if (subject == "training") != (mode == "train") and subject in NETWORKS:
            continue
        numbers = [0] if subject in NETWORKS else stage_numbers or every
        for number in numbers:
            cell = Cell(subject, number, batch, dtype, mode, allocator=allocator, **common)
            if cell not in cells:
                cells.append(cell)
    return cells


def full(device: str, threads: int) -> list[Cell]:
    """The set whose results are committed, what matters most first: time may run out."""
    common: dict[str, Any] = {"device": device, "threads": threads}
    if device == "cuda":
        common["allocators"] = ("default",)  # CUDA has its own
        half, single, modes = ("bfloat16",), ("float32",), MODES
        return [
            *product(BLOCKS, None, [128], half, modes, **common),
            *product(NETWORKS, None, [128], half, modes, **common),
            *product(["nested_conv"], None, [128], half, modes, **common),
            *product(OPERATORS[1:], [1, 3], [128], half, modes, **common),
            *product(BLOCKS, [1, 3], [128], single, modes, **common),
            *product(NETWORKS, None, [1], half, modes, **common),
        ]
    single, half = ["float32"], ["bfloat16"]
    return [
        *product(BLOCKS, None, [8], single, MODES, **common),
        *product(NETWORKS, None, [8], single, MODES, **common),
        *product(BLOCKS, None, [8], half, MODES, **common),
        *product(NETWORKS, None, [1], single, ["infer"], **common),
        *product(BLOCKS, None, [1], single, MODES, **common),
        *product(BLOCKS, [1], [8], single, MODES, ["default"], **common),
        *product(["nested_conv"], None, [8], single, MODES, **common),
        *product(OPERATORS[1:], [1, 3], [8], single, MODES, **common),
        *product(BLOCKS, None, [32], single, ["infer"], **common),
        *product(NETWORKS, None, [1, 8], half, MODES, **common),
        *product(BLOCKS, None, [1], half, MODES, **common),
        *product(BLOCKS, None, [32], half, ["infer"], **common),
    ]


__all__ = ["ALLOCATORS", "BATCHES", "BLOCKS", "MODES", "NETWORKS", "OPERATORS", "SUBJECTS", "Cell"]
