"""The cells of a benchmark run: what is computed, at which shape, dtype, mode and allocator."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from bench.cases import DTYPES, MEMORY_FORMATS, OPERATORS, VARIANTS, Stage, stages

BLOCKS = ("block",)
NETWORKS = ("model", "training")
SUBJECTS = (*OPERATORS, "convnext_half", *BLOCKS, *NETWORKS)
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
    """One line of a result: `subject` at a stage of a variant; networks have stage 0.

    `memory_format` is that of the activations which ours is given; a peer has its own.
    """

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
    memory_format: str = "channels_last"

    def __post_init__(self) -> None:
        _one_of("subject", self.subject, SUBJECTS)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("mode", self.mode, MODES)
        _one_of("allocator", self.allocator, ALLOCATORS)
        _one_of("device", self.device, ("cpu", "cuda"))
        _one_of("variant", self.variant, VARIANTS)
        _one_of("memory_format", self.memory_format, MEMORY_FORMATS)
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
            + ", contiguous"
            * (self.memory_format == "contiguous")
        )


def _one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    allowed = list(allowed)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def product(
    subjects: Iterable[str], stage_numbers: Iterable[int] | None, batches: Iterable[int],
    dtypes: Iterable[str], modes: Iterable[str], allocators: Iterable[str] = ("tuned",),
    variants: Iterable[str] = ("convnest_tiny",),
    memory_formats: Iterable[str] = ("channels_last",), **common: Any,
) -> list[Cell]:  # fmt: skip
    """Every combination; a network has one "stage", and training steps only train.

    Stages that a variant does not have (an isotropic one has one) are left out, unless none is
    left.
    """
    cells: dict[Cell, None] = {}  # in order, none twice
    wanted = None if stage_numbers is None else list(stage_numbers)
    grid = itertools.product(variants, subjects, allocators, memory_formats, dtypes, modes, batches)
    for variant, subject, allocator, memory_format, dtype, mode, batch in grid:
        if (subject == "training") != (mode == "train") and subject in NETWORKS:
            continue
        every = range(1, len(stages(variant)) + 1)
        chosen = [n for n in wanted or every if n in every] or wanted or every
        for number in [0] if subject in NETWORKS else chosen:
            cell = Cell(
                subject, number, batch, dtype, mode, variant=variant, allocator=allocator,
                memory_format=memory_format, **common,
            )  # fmt: skip
            cells[cell] = None
    return list(cells)
