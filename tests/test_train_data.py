"""`train --data FOLDER`: what is found, how it is split and read; and that it trains."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from convnest_kernels.train import folder, session
from convnest_kernels.train.config import Config
from convnest_kernels.train.data import open_data, val_batches
from tests.training import one_thread, paint, train, two_classes

__all__ = ["one_thread"]  # a fixture for every test here


def items(images: object) -> set[Path]:
    assert isinstance(images, folder.FileImages)
    return {path for path, _ in images.items}


def read(path: Path, size: int) -> torch.Tensor:
    image = folder.read_image(path, size)
    assert isinstance(image, torch.Tensor)
    return image


def test_learns_to_tell_folders_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = two_classes(tmp_path / "images", images=20)
    options = ["--epochs", "6", "--batch-size", "8", "--lr", "0.005", "--json"]
    assert train("--data", data, "--output", tmp_path / "out", *options) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["data"]["classes"] == ["dark", "light"]
    assert (result["data"]["train"], result["data"]["val"]) == (32, 8)
    assert result["accuracy"] == 1.0


def test_worker_processes_give_the_same_bits(tmp_path: Path) -> None:
    data = two_classes(tmp_path / "images")
    for workers in ("0", "2"):
        output = tmp_path / workers
        options = ["--workers", workers, "--batch-size", "3"]
        assert train("--data", data, "--output", output, *options) == 0
    expected = load_file(tmp_path / "0" / session.LAST)
    for name, tensor in load_file(tmp_path / "2" / session.LAST).items():
        assert torch.equal(tensor, expected[name]), name


def test_train_and_val_folders_are_the_split(tmp_path: Path) -> None:
    two_classes(tmp_path / "train", images=3)
    two_classes(tmp_path / "val", images=1)
    data = folder.load(str(tmp_path), 8, seed=0)
    assert data.classes == ["dark", "light"]
    assert len(items(data.train)) == 6
    assert items(data.val) == {tmp_path / "val" / name / "0.png" for name in data.classes}


def test_a_seeded_fifth_of_each_class_is_held_out(tmp_path: Path) -> None:
    two_classes(tmp_path, images=20)
    data = folder.load(str(tmp_path), 8, seed=0)
    held_out = items(data.val)
    assert sorted(path.parent.name for path in held_out) == ["dark"] * 4 + ["light"] * 4
    assert not held_out & items(data.train)
    assert held_out == items(folder.load(str(tmp_path), 8, seed=0).val)
    assert held_out != items(folder.load(str(tmp_path), 8, seed=1).val)


def test_removing_an_image_moves_none_across_the_split(tmp_path: Path) -> None:
    two_classes(tmp_path, images=20)
    before = folder.load(str(tmp_path), 8, seed=0)
    removed = min(items(before.train))
    removed.unlink()
    after = folder.load(str(tmp_path), 8, seed=0)
    assert items(after.val) == items(before.val)
    assert items(after.train) == items(before.train) - {removed}
    assert after.digest != before.digest


def test_what_counts_as_an_image(tmp_path: Path) -> None:
    two_classes(tmp_path, images=2)
    paint(tmp_path / "dark" / "deeper" / "3.JPG")
    paint(tmp_path / "dark" / ".hidden.png")
    paint(tmp_path / ".cache" / "0.png")
    (tmp_path / "dark" / "notes.txt").write_text("")
    (tmp_path / "labels.csv").write_text("")
    data = folder.load(str(tmp_path), 8, seed=0)
    assert data.classes == ["dark", "light"]
    names = {path.name for path in items(data.train) | items(data.val)}
    assert names == {"0.png", "1.png", "3.JPG"}


def test_images_are_cropped_to_the_centre(tmp_path: Path) -> None:
    pixels = np.zeros((4, 12, 3), np.uint8)
    pixels[:, 4:8] = (255, 0, 51)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    image = read(tmp_path / "wide.png", 4)
    expected = torch.tensor([1.0, 0.0, 0.2])[:, None, None].expand(3, 4, 4)
    torch.testing.assert_close(image, expected, atol=0.01, rtol=0)


def test_other_modes_become_rgb(tmp_path: Path) -> None:
    half = np.full((4, 4), 32768, np.uint16)
    Image.fromarray(half).save(tmp_path / "16-bit.png")
    Image.new("L", (4, 4), 128).save(tmp_path / "grey.png")
    Image.new("P", (4, 4), 0).save(tmp_path / "palette.png")
    Image.new("RGBA", (4, 4), (128, 128, 128, 255)).save(tmp_path / "alpha.png")
    for name, value in (("16-bit", 128), ("grey", 128), ("palette", 0), ("alpha", 128)):
        image = read(tmp_path / f"{name}.png", 4)
        assert torch.equal(image, torch.full((3, 4, 4), value / 255)), name


def test_the_camera_s_rotation_is_undone(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255  # light above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    image = read(tmp_path / "turned.png", 8)
    assert image[:, :3].max() < 0.1
    assert image[:, 5:].min() > 0.9


def test_labels_follow_the_folders(tmp_path: Path) -> None:
    config = Config(data=str(two_classes(tmp_path)), image_size=8, batch_size=64)
    ((x, y),) = val_batches(config, open_data(config))
    assert x.shape == (2, 3, 8, 8)
    assert torch.equal((x.mean((1, 2, 3)) > 0.5).long(), y)
