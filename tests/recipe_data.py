"""Small data sets in the formats of the recipes, made of scikit-learn's digits and photographs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

CLASSES = 3
SCALE = 4  # a digit is 8 x 8
SIDE = 64


def class_folders(root: Path, train: int = 8, val: int = 3) -> Path:
    """root/{train,val}/{china,digit,flower}/<number>.png: pieces of two photographs, and digits."""
    draw = np.random.default_rng(0)
    digits = load_digits().images
    for i in range(train + val):
        pieces = {"digit": np.array(Image.fromarray(_grey(digits[i])).resize((SIDE, SIDE)))}
        for name in ("china", "flower"):
            photograph = load_sample_image(f"{name}.jpg")
            y, x = (draw.integers(side - SIDE) for side in photograph.shape[:2])
            pieces[name] = photograph[y : y + SIDE, x : x + SIDE]
        for name, pixels in pieces.items():
            path = root / ("train" if i < train else "val") / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).convert("RGB").save(path)
    return root


def mask_folders(root: Path, train: int = 8, val: int = 2) -> Path:
    """root/{images,annotations}/{training,validation}/<number>, 0 unlabelled, digit k as k + 1"""
    for split, first, last in (("training", 0, train), ("validation", train, train + val)):
        for number in range(first, last):
            image, digits = _scene(number)
            mask = np.zeros(image.shape[:2], np.uint8)
            for label, shape in digits:
                mask[shape] = label + 1
            for kind, content in (("images", image), ("annotations", mask)):
                path = root / kind / split / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(content).save(path)
    return root


def coco_folders(root: Path, train: int = 8, val: int = 2) -> Path:
    """root/{train,val}2017/<number>.png and root/annotations, with polygons, RLE and a crowd."""
    for split, first, last in (("train2017", 0, train), ("val2017", train, train + val)):
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        (root / split).mkdir(parents=True, exist_ok=True)
        for number in range(first, last + 1):
            image, digits = _scene(number)
            name = f"{number}.png"
            Image.fromarray(image).save(root / split / name)
            height, width = image.shape[:2]
            images.append({"id": number, "file_name": name, "height": height, "width": width})
            for i, (label, shape) in enumerate(digits):
                # The last image has nothing but a crowd: nothing to learn from.
                crowd = number == last
                rle = crowd or i % 2 == 1
                annotation = {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label + 1,
                    "iscrowd": int(crowd),
                    "area": int(shape.sum()),
                    "bbox": _box(shape),
                    "segmentation": _run_lengths(shape) if rle else _polygons(shape),
                }
                annotations.append(annotation)
        path = root / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        categories = [{"id": i + 1, "name": f"digit {i}"} for i in range(CLASSES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        path.write_text(json.dumps(content))
    return root


def _grey(digit: np.ndarray) -> np.ndarray:
    return (digit * 255 / 16).astype(np.uint8)


def _scene(number: int) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """A piece of a photograph with two digits on it: RGB, and (label, where it is) of each."""
    draw = np.random.default_rng(number)
    photograph = load_sample_image("china.jpg" if number % 2 else "flower.jpg")
    height, width = SIDE + 8 * (number % 3), SIDE + 16
    top = draw.integers(photograph.shape[0] - height)
    left = draw.integers(photograph.shape[1] - width)
    image = photograph[top : top + height, left : left + width].copy()
    digits = load_digits()
    placed = []
    for i in range(2):
        label = (number + i) % CLASSES
        of_label = digits.images[digits.target == label]
        digit = np.kron(of_label[number % len(of_label)], np.ones((SCALE, SCALE)))
        side = len(digit)
        y = draw.integers(height - side) // SCALE * SCALE
        x = i * (width // 2) + draw.integers(width // 2 - side + 1) // SCALE * SCALE
        shape = np.zeros((height, width), bool)
        shape[y : y + side, x : x + side] = digit > 4
        image[shape] = 255 - 60 * label
        placed.append((label, shape))
    return image, placed


def _box(shape: np.ndarray) -> list[int]:
    y, x = np.nonzero(shape)
    return [int(v) for v in (x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1)]


def _polygons(shape: np.ndarray) -> list[list[int]]:
    """One square for each dot of the digit."""
    corners = np.argwhere(shape[::SCALE, ::SCALE]) * SCALE
    return [[x, y, x + SCALE, y, x + SCALE, y + SCALE, x, y + SCALE] for y, x in corners.tolist()]


def _run_lengths(shape: np.ndarray) -> dict[str, Any]:
    """COCO's uncompressed run lengths: down the columns, zeros first."""
    flat = shape.flatten(order="F").astype(np.int8)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat]))).tolist()
    ends = [0, *edges, flat.size]
    counts = np.diff(ends).tolist()
    return {"size": list(shape.shape), "counts": counts}
