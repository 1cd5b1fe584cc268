"""Batches that only seed, step and position decide: not the ranks, workers or interruptions.

A batch is cut into micro-batches, one forward and backward each; a rank takes its share of them.
Before a sample is drawn, and before a micro-batch is computed, all random numbers are seeded from
its place in the run. So a run goes on, after any stop and on any number of ranks, with what it
would have seen.
"""

from __future__ import annotations

import hashlib
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from convnest_kernels.train.errors import UsageError
from recipe.parallel import Ranks

Key = tuple[int, int]  # epoch, index


@dataclass(frozen=True)
class Plan:
    """How `images` are gone through: in epochs of whole batches, each cut into micro-batches."""

    images: int
    batch: int
    micro_batch: int
    world: int

    def __post_init__(self) -> None:
        together = self.micro_batch * self.world
        if self.batch % together:
            raise UsageError(
                f"--batch must be a multiple of --micro-batch times the number of ranks, "
                f"{self.micro_batch} * {self.world}, got {self.batch}"
            )
        if self.images < self.batch:
            raise UsageError(
                f"--batch must be at most the number of training images, {self.images}, "
                f"got {self.batch}"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.images // self.batch

    @property
    def accumulate(self) -> int:
        """Micro-batches that each rank computes for one step."""
        return self.batch // (self.micro_batch * self.world)


def seed_all(*key: int) -> None:
    """Seed Python's, NumPy's and torch's random numbers from a place in the run."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (timm and torchvision draw from the global one)
    torch.manual_seed(seed)


class _Keyed(Dataset[Any]):
    """(key, item) of a data set whose random augmentation depends on seed, epoch and index."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: Key) -> tuple[Key, Any]:
        seed_all(self.seed, *key)
        return key, self.dataset[key[1]]


class _Order(Sampler[list[Key]]):
    """The micro-batches of one rank, from `first` to `last` step."""

    def __init__(self, plan: Plan, seed: int, rank: int, first: int, last: int) -> None:
        self.plan, self.seed, self.rank = plan, seed, rank
        self.first, self.last = first, last

    def __len__(self) -> int:
        return (self.last - self.first) * self.plan.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        plan, epoch, order = self.plan, -1, []
        size = plan.micro_batch
        for step in range(self.first, self.last):
            if epoch != step // plan.steps_per_epoch:
                epoch = step // plan.steps_per_epoch
                generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
                order = torch.randperm(plan.images, generator=generator).tolist()
            start = (step % plan.steps_per_epoch) * plan.batch
            for i in range(plan.accumulate):
                at = start + (self.rank * plan.accumulate + i) * size
                yield [(epoch, index) for index in order[at : at + size]]


def micro_batches(
    dataset: Any,
    plan: Plan,
    ranks: Ranks,
    collate: Callable[[list[tuple[Key, Any]]], Any],
    *,
    seed: int,
    first: int,
    last: int,
    workers: int,
) -> Iterator[Any]:
    """This rank's micro-batches of the steps from `first` to `last`, one after the other."""
    loader: DataLoader[Any] = DataLoader(
        _Keyed(dataset, seed),
        batch_sampler=_Order(plan, seed, ranks.rank, first, last),
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=_ignore_interrupt,
        pin_memory=ranks.device.type == "cuda",
    )
    return iter(loader)


def _ignore_interrupt(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal; only the main one decides what to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of nested lists, tuples and dicts to a device."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
