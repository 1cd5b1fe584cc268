"""Images in class folders: FOLDER/class/*.png, or FOLDER/{train,val}/class/*.png."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convnest_kernels.train.errors import TrainError, UsageError, need
from convnest_kernels.train.image_set import Batch, BrokenImage, Data

VAL_FRACTION = 0.2

# Up to this many images are decoded before training starts, so that all broken ones are named at
# once. Of a larger set only the headers are read; a broken one then shows in the first epoch.
DECODE_UP_TO = 20_000

_LISTED = 10  # broken images named in one message

_Item = tuple[Path, int]  # path, label


class FileImages:
    """Images on disk, decoded when they are asked for."""

    def __init__(self, items: list[_Item], image_size: int) -> None:
        self.items, self.image_size = items, image_size

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, indices: list[int]) -> Batch | BrokenImage:
        paths, labels = zip(*(self.items[i] for i in indices), strict=True)
        images = []
        for path in paths:
            image = read_image(path, self.image_size)
            if isinstance(image, BrokenImage):
                return image
            images.append(image)
        return torch.stack(images), torch.tensor(labels)


def load(folder: str, image_size: int, seed: int) -> Data:
    """Find, check and split the images of a folder.

    With `train` and `val` subfolders these are the split; otherwise a seeded fifth of each class
    is held out. A file belongs to one side by its name, so that removing others does not move it
    across (but for the last one of the fifth).

    Raises TrainError or UsageError naming the folder, class or images that are at fault.
    """
    need("PIL.Image", "Pillow", "--data FOLDER")
    root = Path(folder)
    if not root.is_dir():
        raise UsageError(f"--data must be 'digits' or a folder of class folders, got {folder}")
    train_root, val_root = root / "train", root / "val"
    if train_root.is_dir() and val_root.is_dir():
        train, val = _find(train_root), _find(val_root)
        if train.keys() != val.keys():
            differ = ", ".join(sorted(train.keys() ^ val.keys()))
            raise TrainError(f"{train_root} and {val_root} must hold the same classes: {differ}")
    else:
        train, val = _split(_find(root), root, seed)
    classes = sorted(train)
    if len(classes) < 2:
        raise TrainError(
            f"{root} holds one class only, {classes[0]!r}: there is nothing to tell apart; "
            "put the images of each class into a folder of its own"
        )
    sides = [_label(side, classes) for side in (train, val)]
    _check([path for side in sides for path, _ in side])
    return Data(
        name=str(root.resolve()),
        classes=classes,
        channels=3,
        train=FileImages(sides[0], image_size),
        val=FileImages(sides[1], image_size),
        digest=_digest(root, sides),
    )


def read_image(path: Path, size: int) -> Tensor | BrokenImage:
    """Decode an image to RGB [3, size, size] in [0, 1]: shorter side to `size`, centre crop."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            opened.draft("RGB", (size, size))  # lets a JPEG decoder skip what is scaled away
            image: Any = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip to white
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    except _broken() as error:
        return BrokenImage(str(path), _reason(error))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _find(root: Path) -> dict[str, list[Path]]:
    """The images of each class folder, sorted."""
    from PIL import Image

    # Of the many suffixes that Pillow knows some are no pictures (.pdf, .eps need other programs).
    suffixes = {s for s, f in Image.registered_extensions().items() if f not in ("PDF", "EPS")}
    folders = [p for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    if not folders:
        raise TrainError(
            f"{root} holds no class folders: each class needs a folder of its own with its images"
        )
    found = {}
    for folder in folders:
        found[folder.name] = sorted(
            file
            for file in folder.rglob("*")
            if file.suffix.lower() in suffixes and not file.name.startswith(".")
        )
    empty = [str(root / name) for name, files in found.items() if not files]
    if empty:
        raise TrainError(
            f"no images in the class folder {', '.join(empty)}: add some, or remove the folder"
        )
    return found


def _split(
    found: dict[str, list[Path]], root: Path, seed: int
) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    train, val = {}, {}
    for name, files in found.items():
        if len(files) < 2:
            raise TrainError(
                f"the class folder {root / name} holds one image only: one to train on and one to "
                "hold out are the least"
            )
        drawn = sorted(files, key=lambda file: _draw(seed, file.relative_to(root)))
        held_out = max(1, round(VAL_FRACTION * len(files)))
        val[name], train[name] = sorted(drawn[:held_out]), sorted(drawn[held_out:])
    return train, val


def _draw(seed: int, name: Path) -> bytes:
    return hashlib.sha256(f"{seed}/{name.as_posix()}".encode()).digest()


def _label(side: dict[str, list[Path]], classes: list[str]) -> list[_Item]:
    return [(path, label) for label, name in enumerate(classes) for path in side[name]]


def _digest(root: Path, sides: list[list[_Item]]) -> str:
    digest = hashlib.sha256()
    for side in sides:
        for path, label in side:
            name, size = path.relative_to(root).as_posix(), path.stat().st_size
            digest.update(f"{name}\0{label}\0{size}\n".encode())
        digest.update(b"\n")
    return digest.hexdigest()[:16]


def _check(paths: list[Path]) -> None:
    """Raise TrainError naming the images that cannot be read."""
    decode = len(paths) <= DECODE_UP_TO
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        reasons = pool.map(lambda path: _check_image(path, decode), paths)
        broken = [(path, why) for path, why in zip(paths, reasons, strict=True) if why]
    if broken:
        lines = [f"  {path}: {why}" for path, why in broken[:_LISTED]]
        if len(broken) > _LISTED:
            lines.append(f"  and {len(broken) - _LISTED} more")
        raise TrainError(
            f"{len(broken)} of {len(paths)} images cannot be read (remove or replace them; nothing "
            "was trained or written):\n" + "\n".join(lines)
        )


def _check_image(path: Path, decode: bool) -> str | None:
    from PIL import Image

    try:
        with Image.open(path) as image:
            if decode:
                image.load()
    except _broken() as error:
        return _reason(error)
    return None


def _broken() -> tuple[type[Exception], ...]:
    """What Pillow raises for a file that is no image, truncated, damaged or suspiciously huge."""
    from PIL import Image

    return (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image, or damaged"
    return str(error) or type(error).__name__
