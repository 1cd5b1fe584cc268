"""What a training run is: model, data, schedule; and the built-in small model."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from convnest_kernels.models import ConvNeSt, create_model
from convnest_kernels.train.errors import UsageError

# Two stages, on an 8×8 and a 4×4 map of 32×32 digits: about a minute on two CPU cores, with the
# comparison.
MINI = "mini"
_MINI_MODEL: dict[str, Any] = {
    "dims": (32, 64),
    "depths": (1, 2),
    "patch_size": 4,
    "res_scale": (None, 1.0),
}

DIGITS = "digits"
RECOMPUTE = ("none", "conv", "all")


@dataclass(frozen=True)
class Config:
    """A run. Everything but `workers`, `device` and `backend` decides the numbers it gives."""

    data: str = DIGITS  # or the absolute path of a folder
    model: str = MINI
    image_size: int = 32
    epochs: int = 10
    batch_size: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.05
    drop_path: float = 0.0
    seed: int = 0
    amp: bool = False
    recompute: str = "none"
    backend: str | None = None  # None follows CONVNEST_BACKEND
    device: str = "cpu"
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("image_size", "epochs", "batch_size"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        _require("lr", self.lr, math.isfinite(self.lr) and self.lr > 0, "above 0")
        for name in ("weight_decay", "workers", "seed"):
            value = getattr(self, name)
            _require(name, value, math.isfinite(value) and value >= 0, "0 or more")
        _require("drop_path", self.drop_path, 0 <= self.drop_path < 1, "in [0, 1)")
        _require("recompute", self.recompute, self.recompute in RECOMPUTE, "none, conv or all")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that activations are computed in."""
        return torch.bfloat16 if self.amp else torch.float32

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise UsageError(f"--{name.replace('_', '-')} must be {expected}, got {value}")


def default_image_size(data: str, model: str) -> int:
    """32 for the digits, and for folders 64 with the small model, 224 with the paper's."""
    if data == DIGITS:
        return 32
    return 64 if model == MINI else 224


def use_device(name: str) -> None:
    """Make a device the current one. Raises UsageError if it is not there."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch asserts that CUDA was compiled in
        raise UsageError(
            f"--device {name} cannot be used here: {str(error).splitlines()[0]}"
        ) from error
    if torch.device(name).type == "cuda":
        torch.cuda.set_device(name)


def build_model(config: Config, classes: int, channels: int) -> ConvNeSt:
    """Build the model of a run on its device, initialised from its seed alone.

    Raises UsageError for an unknown name and for images smaller than the model's stride.
    """
    torch.manual_seed(config.seed)
    arguments: dict[str, Any] = {
        "num_classes": classes,
        "in_chans": channels,
        "drop_path_rate": config.drop_path,
        "backend": config.backend,
        "recompute": config.recompute,
    }
    if config.model == MINI:
        model = ConvNeSt(**_MINI_MODEL, **arguments)
    else:
        try:
            model = create_model(config.model, **arguments)
        except ValueError as error:
            raise UsageError(f"--model must be {MINI!r} or a model's name: {error}") from error
    if config.image_size < model.reduction:
        raise UsageError(
            f"--image-size must be at least {model.reduction}, the total stride of "
            f"{config.model}, got {config.image_size}"
        )
    return model.to(config.device)
