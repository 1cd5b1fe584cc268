"""What the tests of `train` share: a run of a second, and folders of painted images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convnest_kernels.__main__ import main

# Six steps an epoch, on maps of 2×2 and 1×1.
TINY = ["--image-size", "8", "--batch-size", "256", "--epochs", "2", "--no-compare"]
STEPS_PER_EPOCH = 6


def train(*arguments: str | Path) -> int:
    return main(["train", *TINY, *map(str, arguments)])


def resume(path: Path, *arguments: str) -> int:
    return main(["train", "--no-compare", "--resume", str(path), *arguments])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tests run beside each other, and threads that wait for a core cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def paint(path: Path, shade: int = 128) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((12, 10, 3), shade, np.uint8)).save(path)


def two_classes(root: Path, images: int = 5) -> Path:
    for name, shade in (("dark", 20), ("light", 230)):
        for i in range(images):
            paint(root / name / f"{i}.png", shade + i)
    return root


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])
