"""Batches of images in an order, and with an augmentation, that only seed, epoch and step decide.

So a run that was stopped anywhere goes on with the very batches it would have seen.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from convnest_kernels.train import digits, folder
from convnest_kernels.train.config import DIGITS, Config
from convnest_kernels.train.errors import TrainError
from convnest_kernels.train.image_set import Batch, BrokenImage, Data, ImageSet


def open_data(config: Config) -> Data:
    """Open the data of a run; TrainError says what is wrong with a folder."""
    if config.data == DIGITS:
        return digits.load(config.image_size)
    return folder.load(config.data, config.image_size, config.seed)


def steps_per_epoch(config: Config, data: Data) -> int:
    return -(-len(data.train) // config.batch_size)


def train_batches(config: Config, data: Data, epoch: int, first_step: int) -> Iterator[Batch]:
    """The batches of an epoch from `first_step` on, shuffled and augmented, on the device."""
    order = torch.randperm(len(data.train), generator=_generator(config.seed, epoch)).tolist()
    groups = _groups(order, config.batch_size)[first_step:]
    for step, (x, y) in enumerate(_load(config, data.train, groups), first_step):
        yield augment(x, _generator(config.seed, epoch, step)), y


def val_batches(config: Config, data: Data) -> Iterator[Batch]:
    """All validation images once, in order, on the device."""
    return _load(config, data.val, _groups(list(range(len(data.val))), config.batch_size))


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Turn (±10°), scale (±10%) and shift (±6%) each image; edges are repeated. [N, C, H, W]."""
    draws = (2 * torch.rand(4, x.shape[0], generator=generator) - 1).to(x.device)
    turn, scale = 0.175 * draws[0], 1 + 0.1 * draws[1]
    cos, sin = scale * turn.cos(), scale * turn.sin()
    rows = (cos, -sin, 0.12 * draws[2]), (sin, cos, 0.12 * draws[3])  # axes run from -1 to 1
    matrix = torch.stack([torch.stack(row, 1) for row in rows], 1)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _load(config: Config, images: ImageSet, groups: list[list[int]]) -> Iterator[Batch]:
    loader: DataLoader[Any] = DataLoader(
        images,  # type: ignore[arg-type]  # a protocol of our own, not a Dataset
        batch_size=None,
        sampler=groups,  # whole batches, each one index for us
        num_workers=config.workers,
        worker_init_fn=_ignore_interrupt,
        # The loader seeds its workers from this; from the global one it would shift every draw.
        generator=torch.Generator(),
        pin_memory=config.device.startswith("cuda"),
    )
    try:
        for batch in loader:
            if isinstance(batch, BrokenImage):
                raise TrainError(f"cannot read the image {batch.path}: {batch.reason}")
            x, y = batch
            yield x.to(config.device, non_blocking=True), y.to(config.device, non_blocking=True)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise TrainError(f"a process of --workers {config.workers} died: {error}") from error


def _ignore_interrupt(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal; only the main one decides what to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _groups(order: list[int], size: int) -> list[list[int]]:
    return [order[i : i + size] for i in range(0, len(order), size)]


def _generator(*key: int) -> torch.Generator:
    """Random numbers that depend on the key alone: (seed, epoch) or (seed, epoch, step)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
