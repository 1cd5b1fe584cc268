"""`train`: every error says what is wrong and how to go on, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from convnest_kernels import backends
from convnest_kernels.__main__ import main
from convnest_kernels.train import folder, session
from convnest_kernels.train.checkpoint import read
from tests.training import one_thread, paint, resume, train, truncate, two_classes

__all__ = ["one_thread"]  # a fixture for every test here


def make_missing(root: Path) -> Path:
    return root / "missing"


def make_file(root: Path) -> Path:
    paint(root / "image.png")
    return root / "image.png"


def make_empty(root: Path) -> Path:
    return root


def make_flat(root: Path) -> Path:
    paint(root / "image.png")
    return root


def make_class_without_images(root: Path) -> Path:
    two_classes(root)
    (root / "grey").mkdir()
    (root / "grey" / "notes.txt").write_text("nothing yet")
    return root


def make_one_class(root: Path) -> Path:
    paint(root / "dark" / "0.png")
    paint(root / "dark" / "1.png")
    return root


def make_single_image(root: Path) -> Path:
    return two_classes(root, images=1)


def make_differing_split(root: Path) -> Path:
    two_classes(root / "train")
    two_classes(root / "val")
    paint(root / "val" / "grey" / "0.png")
    return root


def make_broken_images(root: Path) -> Path:
    two_classes(root)
    truncate(root / "dark" / "2.png")
    (root / "light" / "3.png").write_text("no image")
    return root


@pytest.mark.parametrize(
    ("make", "code", "expected"),
    [
        (make_missing, 2, r"--data must be 'digits' or a folder of class folders, got .*missing"),
        (make_file, 2, r"--data must be 'digits' or a folder of class folders, got .*image\.png"),
        (make_empty, 1, r"holds no class folders"),
        (make_flat, 1, r"holds no class folders"),
        (make_class_without_images, 1, r"no images in the class folder .*grey"),
        (make_one_class, 1, r"holds one class only, 'dark'"),
        (make_single_image, 1, r"class folder .*dark holds one image only"),
        (make_differing_split, 1, r"train and .*val must hold the same classes: grey"),
        (
            make_broken_images,
            1,
            r"(?s)2 of 10 images cannot be read.*dark/2\.png: .*3\.png: not an",
        ),
    ],
)
def test_a_folder_that_will_not_do(
    make: Callable[[Path], Path],
    code: int,
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "images").mkdir()
    data = make(tmp_path / "images")
    assert train("--data", data, "--output", tmp_path / "out") == code
    assert re.search(expected, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "convnest_tyni"], r"--model .*did you mean 'convnest_tiny'"),
        (["--model", "convnest_atto"], r"--image-size must be at least 32, .* got 8"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--batch-size", "-1"], "--batch-size must be at least 1, got -1"),
        (["--lr", "nan"], "--lr must be above 0, got nan"),
        (["--weight-decay", "-1"], "--weight-decay must be 0 or more, got -1"),
        (["--drop-path", "1"], r"--drop-path must be in \[0, 1\), got 1"),
        (["--device", "cuda:77"], "--device cuda:77 cannot be used here"),
        (["--device", "abacus"], "--device abacus cannot be used here"),
    ],
)
def test_an_option_that_will_not_do(
    arguments: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--output", tmp_path, *arguments) == 2
    assert re.search(expected, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_a_backend_that_cannot_run_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backends.select.cache_clear()
    monkeypatch.setattr("convnest_kernels._extension.error", "the native module is not built")
    assert train("--output", tmp_path, "--backend", "cpu") == 2
    said = capsys.readouterr().err
    assert "backend='cpu' cannot run nested_conv on cpu" in said
    assert "the native module is not built" in said

    monkeypatch.setattr(backends, "_requested", "gpu")
    assert train("--output", tmp_path) == 2
    assert "CONVNEST_BACKEND must be one of" in capsys.readouterr().err


def test_an_output_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert train("--output", tmp_path / "file" / "out") == 2
    assert "cannot make --output" in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_image_that_breaks_at_load_stops_the_run_and_loses_nothing(
    workers: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(folder, "DECODE_UP_TO", 0)  # as in a large set: headers alone
    data = two_classes(tmp_path / "images", images=10)
    train_set = folder.load(str(data), 8, seed=0).train
    assert isinstance(train_set, folder.FileImages)
    broken = train_set.items[0][0]
    truncate(broken)
    options = ["--data", str(data), "--output", str(tmp_path / "out"), "--workers", workers]
    assert train(*options, "--batch-size", "1") == 1
    said = capsys.readouterr().err
    assert f"cannot read the image {broken}: " in said
    assert "nothing is lost" in said
    assert "Traceback" not in said
    _, metadata = read(tmp_path / "out" / session.LAST)
    assert f"after step {metadata['progress']['step']} of 16" in said

    broken.unlink()
    assert resume(tmp_path / "out") == 0
    assert (
        "the images have changed since the checkpoint (16 + 4 then, 15" in capsys.readouterr().out
    )


class FullDisk:
    """os.fsync that fails as a full disk does, from the given call on."""

    def __init__(self, first: int) -> None:
        self.calls, self.first = 0, first

    def __call__(self, handle: int) -> None:
        self.calls += 1
        if self.calls >= self.first:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_checkpoint_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--output", tmp_path / "whole") == 0
    # File and folder are synced: twice at the start, four times in the first epoch (last, best).
    with monkeypatch.context() as context:
        context.setattr(os, "fsync", FullDisk(first=7))
        assert train("--output", tmp_path / "full") == 1
    said = capsys.readouterr().err
    assert re.search(
        r"could not save .*last\.safetensors: No space left on device \(it takes \d+\.\d MB; "
        r".* MB are free on that disk\)\. Free space there",
        said,
    )
    assert "The last checkpoint (1 of 2 epochs) is intact" in said
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == [session.BEST, session.LAST]
    assert resume(tmp_path / "full") == 0
    for name, tensor in load_file(tmp_path / "whole" / session.LAST).items():
        assert torch.equal(load_file(tmp_path / "full" / session.LAST)[name], tensor), name


def test_a_disk_that_is_full_from_the_start_shows_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "fsync", FullDisk(first=1))
    assert train("--output", tmp_path) == 1
    out, err = capsys.readouterr()
    assert "Nothing had been trained yet" in err
    assert "epoch 1" not in out
    assert not list(tmp_path.iterdir())


def test_a_loss_that_diverges_is_not_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--output", tmp_path, "--lr", "1e30") == 1
    said = capsys.readouterr().err
    assert re.search(r"the loss became (nan|inf) in epoch 1, step \d: lower --lr \(1e\+30\)", said)
    assert "--lr LOWER" in said
    for name, tensor in load_file(tmp_path / session.LAST).items():
        assert tensor.isfinite().all(), name


# Checkpoints to resume from.


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished")
    assert train("--output", output) == 0
    return output


def rewrite(finished: Path, path: Path, **metadata: str) -> None:
    """Save the checkpoint again with other metadata."""
    tensors, before = read(finished / session.LAST)
    texts = {name: json.dumps(value) for name, value in before.items()}
    kind = {"format": "convnest_kernels.train", "format_version": "1"}
    save_file(tensors, path, {**kind, **texts, **metadata})


def damaged(finished: Path, path: Path) -> None:
    content = (finished / session.LAST).read_bytes()
    path.write_bytes(content[: len(content) // 2])


def empty(finished: Path, path: Path) -> None:
    path.write_bytes(b"")


def text(finished: Path, path: Path) -> None:
    path.write_text("no checkpoint at all, but long enough for a header")


def foreign(finished: Path, path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)


def newer(finished: Path, path: Path) -> None:
    rewrite(finished, path, format_version="2")


def weights_alone(finished: Path, path: Path) -> None:
    path.write_bytes((finished / session.BEST).read_bytes())


def not_json(finished: Path, path: Path) -> None:
    rewrite(finished, path, progress="{")


def other_classes(finished: Path, path: Path) -> None:
    _, metadata = read(finished / session.LAST)
    rewrite(finished, path, data=json.dumps({**metadata["data"], "classes": ["cat", "dog"]}))


def other_shape(finished: Path, path: Path) -> None:
    tensors, _ = read(finished / session.LAST)
    tensors["model.head.fc.bias"] = torch.zeros(7)
    texts = {name: json.dumps(value) for name, value in read(finished / session.LAST)[1].items()}
    kind = {"format": "convnest_kernels.train", "format_version": "1"}
    save_file(tensors, path, {**kind, **texts})


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (damaged, "cannot read the checkpoint .*x.safetensors: truncated or damaged"),
        (empty, "cannot read the checkpoint .*x.safetensors: truncated or damaged"),
        (text, "cannot read the checkpoint .*x.safetensors: truncated or damaged"),
        (not_json, "cannot read the checkpoint .*x.safetensors: truncated or damaged"),
        (foreign, "x.safetensors: a safetensors file, but not a checkpoint of"),
        (newer, "x.safetensors: its format is 2, this version reads 1"),
        (weights_alone, "x.safetensors: it holds weights without the state of a run"),
        (other_classes, r"trained on 2 classes \(cat, dog\), digits has 10 classes \(0, 1, "),
        (other_shape, r"head.fc.bias is \[7\], the model's is \[10\]"),
    ],
)
def test_a_checkpoint_that_will_not_do(
    make: Callable[[Path, Path], None],
    expected: str,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "x.safetensors"
    make(finished, path)
    before = path.read_bytes()
    assert main(["train", "--resume", str(path)]) == 1
    assert re.search(expected, capsys.readouterr().err)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "convnest_atto"], "it was trained with --model mini, got convnest_atto"),
        (["--batch-size", "7"], "it was trained with --batch-size 256, got 7"),
        (["--seed", "7"], "it was trained with --seed 0, got 7"),
        (["--image-size", "64"], "it was trained with --image-size 8, got 64"),
    ],
)
def test_what_a_resumed_run_cannot_change(
    arguments: list[str], expected: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--resume", str(finished), *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_a_checkpoint_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--output", str(tmp_path), "--resume"]) == 1
    assert f"no checkpoint at {tmp_path / session.LAST}" in capsys.readouterr().err


def test_a_package_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["train"]) == 1
    said = capsys.readouterr().err
    assert "training needs rich" in said
    assert "pip install 'convnest-kernels[train]'" in said
