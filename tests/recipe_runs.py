"""The scripts of examples/ on small data: what their tests share.

They need timm, torchvision and pycocotools, which `make test-zoo` installs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")

from convnest_kernels.models import create_model
from tests import recipe_data

EXAMPLES = Path(__file__).parents[1] / "examples"

WARNINGS = [
    # pycocotools passes NumPy a keyword that it has deprecated, and timm leaves files open.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:pycocotools"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def script(name: str) -> ModuleType:
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return __import__(name)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("data")
    weights = root / "weights.safetensors"
    torch.manual_seed(3)
    save_file(create_model("convnest_atto", 10).state_dict(), weights)
    teacher = root / "teacher.safetensors"
    from timm import create_model as create_timm_model

    save_file(create_timm_model("test_convnext", num_classes=3).state_dict(), teacher)
    return {
        "folders": recipe_data.class_folders(root / "folders"),
        "masks": recipe_data.mask_folders(root / "masks"),
        "coco": recipe_data.coco_folders(root / "coco"),
        "weights": weights,
        "teacher": teacher,
    }


COMMON = ["--model", "convnest_atto", "--workers", "0", "--device", "cpu"]
FOLDERS = [*COMMON, "--batch", "8", "--image-size", "64", "--mix-batch", "4", "--epochs", "4"]
DENSE = [*COMMON, "--warmup-steps", "1", "--lr", "1e-3"]
IMAGENET = [*FOLDERS, "--warmup-epochs", "1", "--lr", "5e-4"]
MASKS = ["--image-size", "64", "--batch", "8", "--count-zero", "--classes", "4", "--channels", "64"]
COCO = ["--min-sizes", "48", "64", "--max-size", "80", "--batch", "2", "--channels", "32"]
RUNS = {
    "imagenet": IMAGENET,
    "finetune": [*FOLDERS, "--lr", "5e-4", "--ema", "0.9"],
    "distill": IMAGENET,
    "segment": [*DENSE, *MASKS, "--steps", "8", "--ema", "0.9"],
    "detect": [*DENSE, *COCO, "--epochs", "12", "--eval-every", "0"],
}
DATA = {"segment": "masks", "detect": "coco"}
# With the augmentation of 300 epochs nothing is learned in a dozen steps.
PLAIN = ["--randaugment", "", "--mixup", "0", "--cutmix", "0", "--erasing", "0", "--ema", "0.5"]
# Of a whole run; of detection's 12 epochs, the first.
STEPS = {"imagenet": 12, "finetune": 12, "distill": 12, "segment": 8, "detect": 6}


def arguments(name: str, data: dict[str, Path], output: Path, *more: str) -> list[str]:
    folder = data[DATA.get(name, "folders")]
    found = ["--data", str(folder), "--output", str(output), *RUNS[name], *more]
    if name == "finetune":
        found += ["--weights", str(data["weights"])]
    if name == "distill":
        found += ["--teacher", "test_convnext", "--teacher-weights", str(data["teacher"])]
    return found


def run(name: str, data: dict[str, Path], output: Path, *more: str) -> list[dict[str, Any]]:
    """Run a script in this process; returns its log."""
    script(name).main(arguments(name, data, output, *more))
    return read_log(output)


def read_log(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def run_on_a_rank(name: str, arguments: list[str]) -> None:
    import warnings

    warnings.filterwarnings("ignore", category=DeprecationWarning, module="pycocotools")
    script(name).main(arguments)


MICRO = {"detect": "1"}


def captured(name: str, given: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The arguments and the task of a script that is not run."""
    module = script(name)
    from recipe import loop

    found: list[Any] = []
    monkeypatch.setattr(loop, "train", lambda args, ranks, task: found.extend((args, task)))
    module.main(given)
    return found[0], found[1]
