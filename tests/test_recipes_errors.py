"""The scripts of examples/: what cannot be is said, and by which argument."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save_file

from convnest_kernels.models import create_model
from convnest_kernels.train.errors import TrainError, UsageError
from tests.recipe_runs import WARNINGS, data, run
from tests.training import one_thread

__all__ = ["data", "one_thread"]  # fixtures

pytestmark = WARNINGS


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("imagenet", ["--model", "convnest_huge"], "--model must be one of convnest_atto"),
        (
            "imagenet",
            ["--micro-batch", "6", "--mix-batch", "2"],
            "--batch must be a multiple of --micro-batch",
        ),
        (
            "imagenet",
            ["--batch", "32", "--micro-batch", "8"],
            "--batch must be at most the number of training images",
        ),
        ("imagenet", ["--micro-batch", "8", "--mix-batch", "3"], "--mix-batch must be even"),
        ("imagenet", ["--micro-batch", "8", "--parallel", "fsdp"], "start it with torchrun"),
        ("imagenet", ["--micro-batch", "8", "--resume"], "no checkpoint at"),
        ("distill", ["--teacher-pretrained"], "either --teacher-pretrained or"),
        ("segment", ["--model", "convnest_iso_atto"], "--model must be a hierarchical one"),
        ("segment", ["--channels", "32"], "--channels must be a multiple of 64, got 32"),
        ("segment", ["--classes", "2", "--micro-batch", "4"], "--classes 2 is too few"),
        ("detect", ["--parallel", "fsdp"], "--parallel must be ddp for detection"),
    ],
)
def test_errors(
    name: str, more: list[str], message: str, data: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError if "checkpoint" not in message else TrainError, match=message):
        run(name, data, tmp_path / "output", *more)


def test_errors_of_folders(data: dict[str, Path], tmp_path: Path) -> None:
    wrong = {**data, "folders": data["folders"] / "train"}
    with pytest.raises(UsageError, match="--data must hold train/ and val/ class folders"):
        run("imagenet", wrong, tmp_path / "output", "--micro-batch", "8")
    options = ["--micro-batch", "8", "--stop-after", "1"]
    run("imagenet", data, tmp_path / "output", *options)
    with pytest.raises(UsageError, match=r"exists: add --resume, or take another --output"):
        run("imagenet", data, tmp_path / "output", *options)
    with pytest.raises(UsageError, match=r"cannot resume from .*: --lr was 0.0005, got 0.1"):
        run("imagenet", data, tmp_path / "output", *options, "--resume", "--lr", "0.1")
    with pytest.raises(TrainError, match=r"cannot load .*: the model has no stages.2.blocks.10"):
        path = tmp_path / "nano.safetensors"
        save_file(create_model("convnest_nano", 10).state_dict(), path)
        run("finetune", {**data, "weights": path}, tmp_path / "other", "--micro-batch", "8")
