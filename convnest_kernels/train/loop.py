"""Steps, validation and the learning rate."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convnest_kernels.models import ConvNeSt, parameter_groups
from convnest_kernels.train.config import Config, build_model
from convnest_kernels.train.data import steps_per_epoch, train_batches, val_batches
from convnest_kernels.train.errors import TrainError
from convnest_kernels.train.image_set import Data

WARM_UP = 0.1  # of all steps
LABEL_SMOOTHING = 0.1


@dataclass
class Progress:
    """How far a run is; with weights, optimizer and random state, all that a step depends on."""

    epoch: int = 0  # epochs finished: trained and validated
    step: int = 0  # steps done of the epoch under way
    loss_sum: float = 0.0  # of its images
    seconds: float = 0.0  # in training steps, over the whole run
    history: list[dict[str, Any]] = field(default_factory=list)  # of each epoch finished

    @property
    def best(self) -> float:
        """The best validation accuracy so far."""
        return max((epoch["accuracy"] for epoch in self.history), default=0.0)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Step:
    """One training step, as reported to whoever watches."""

    images: int
    seconds: float
    loss: float


class Trainer:
    """A model in training on `data`; the progress is where a checkpoint left it, or the start."""

    def __init__(self, config: Config, data: Data, progress: Progress | None = None) -> None:
        self.config, self.data = config, data
        self.progress = progress or Progress()
        self.model: ConvNeSt = build_model(config, len(data.classes), data.channels)
        groups = parameter_groups(self.model, config.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr)
        self.steps_per_epoch = steps_per_epoch(config, data)

    def train_epoch(self, on_step: Callable[[Step], bool]) -> bool:
        """Take the remaining steps of the epoch; False if `on_step` stopped it before its end.

        Raises TrainError, with the progress at a whole step, if a batch cannot be read, memory
        runs out or the loss is no longer finite.
        """
        progress = self.progress
        self.model.train()
        batches = train_batches(self.config, self.data, progress.epoch, progress.step)
        for x, y in batches:
            started = time.perf_counter()
            loss = self._step(x, y)
            seconds = time.perf_counter() - started
            progress.step += 1
            progress.seconds += seconds
            progress.loss_sum += loss * len(y)
            if not on_step(Step(len(y), seconds, loss)):
                return False
        return True

    def finish_epoch(self, accuracy: float) -> dict[str, Any]:
        """Enter the epoch into the history and go on to the next."""
        progress = self.progress
        epoch = {
            "epoch": progress.epoch + 1,
            "loss": progress.loss_sum / len(self.data.train),
            "accuracy": accuracy,
        }
        progress.history.append(epoch)
        progress.epoch += 1
        progress.step, progress.loss_sum = 0, 0.0
        return epoch

    @torch.no_grad()
    def validate(self, goes_on: Callable[[], bool] = lambda: True) -> float | None:
        """Accuracy on the held-out images; None if `goes_on` stopped it."""
        self.model.eval()
        right = 0
        for x, y in val_batches(self.config, self.data):
            if not goes_on():
                return None
            right += int((self.logits(x).argmax(1) == y).sum())
        return right / len(self.data.val)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(x), y, label_smoothing=LABEL_SMOOTHING)

    def logits(self, x: Tensor) -> Tensor:
        with self._autocast():
            logits: Tensor = self.model(2 * x - 1)
        return logits.float()

    def _step(self, x: Tensor, y: Tensor) -> float:
        lr = self.learning_rate(self.progress.epoch * self.steps_per_epoch + self.progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        try:
            loss = self.loss(x, y)
            self.optimizer.zero_grad()
            loss.backward()
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            raise TrainError(
                f"out of memory at --batch-size {self.config.batch_size}: take fewer, or --amp, or "
                f"--recompute all ({str(error).splitlines()[0]})"
            ) from error
        value = loss.item()
        if not math.isfinite(value):
            raise DivergedError(
                f"the loss became {value} in epoch {self.progress.epoch + 1}, step "
                f"{self.progress.step + 1}: lower --lr ({self.config.lr:g})"
            )
        self.optimizer.step()
        if x.is_cuda:
            torch.cuda.synchronize()
        return value

    def learning_rate(self, step: int) -> float:
        """Linear warm-up over the first tenth of all steps, then a half cosine down to zero."""
        total = self.config.epochs * self.steps_per_epoch
        warm_up = max(1, round(WARM_UP * total))
        if step < warm_up:
            return self.config.lr * (step + 1) / warm_up
        done = (step - warm_up) / max(1, total - warm_up)
        return self.config.lr * 0.5 * (1 + math.cos(math.pi * done))

    def _autocast(self) -> AbstractContextManager[Any]:
        if not self.config.amp:
            return nullcontext()
        return torch.autocast(torch.device(self.config.device).type, torch.bfloat16)


class DivergedError(TrainError):
    """The loss is no longer finite: the state is not worth saving."""


def _is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        "can't allocate memory" in str(error)
    )
