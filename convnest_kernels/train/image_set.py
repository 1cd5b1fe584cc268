"""What a data set is to the training loop: images by the batch, and what identifies them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Batch = tuple[Tensor, Tensor]  # images [N, C, H, W] in [0, 1], labels [N]


@dataclass(frozen=True)
class BrokenImage:
    """An image that could not be read; it travels as a value, since workers lose tracebacks."""

    path: str
    reason: str


class ImageSet(Protocol):
    """Images in memory or on disk, asked for by the batch."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: list[int]) -> Batch | BrokenImage: ...


@dataclass(frozen=True)
class Data:
    """A data set and what identifies it in a checkpoint."""

    name: str
    classes: list[str]
    channels: int
    train: ImageSet
    val: ImageSet
    digest: str  # of the training and validation images: their names and sizes

    def describe(self) -> dict[str, object]:
        """What a checkpoint keeps of the data to know it again."""
        return {
            "name": self.name,
            "classes": self.classes,
            "train": len(self.train),
            "val": len(self.val),
            "digest": self.digest,
        }
