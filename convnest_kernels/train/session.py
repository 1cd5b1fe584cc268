"""A run from start to closing table: saving, resuming, stopping."""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convnest_kernels import __version__
from convnest_kernels.train import checkpoint, compare, stages
from convnest_kernels.train.backend import describe_backend
from convnest_kernels.train.config import Config
from convnest_kernels.train.data import open_data
from convnest_kernels.train.display import Display
from convnest_kernels.train.errors import TrainError, UsageError
from convnest_kernels.train.loop import DivergedError, Progress, Step, Trainer
from convnest_kernels.train.signals import StopRequest

LAST = "last.safetensors"  # everything that --resume needs
BEST = "best.safetensors"  # the weights alone, of the best epoch

# What a checkpoint fixes: another value would not continue the run, but be another one.
_FIXED = ("model", "image_size", "batch_size", "seed")


class StoppedError(TrainError):
    """Ctrl-C or SIGTERM; the message says what was saved and how to go on."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


@dataclass(frozen=True)
class Saved:
    """A checkpoint as read from `path`."""

    path: Path
    config: Config
    data: dict[str, Any]
    progress: Progress
    tensors: dict[str, Tensor]


def read_saved(path: Path) -> Saved:
    """Read a checkpoint to resume from. Raises TrainError naming the file and the reason."""
    tensors, metadata = checkpoint.read(path)
    try:
        config, progress = Config(**metadata["config"]), Progress(**metadata["progress"])
        return Saved(path, config, metadata["data"], progress, tensors)
    except (KeyError, TypeError) as error:
        raise TrainError(
            f"cannot resume from {path}: it holds weights without the state of a run ({error}); "
            f"resume from a {LAST}"
        ) from error


def continue_config(saved: Saved, given: Mapping[str, Any]) -> Config:
    """The configuration of a resumed run: the saved one, overridden by what was `given`."""
    for name in _FIXED:
        before = getattr(saved.config, name)
        if name in given and given[name] != before:
            raise UsageError(
                f"cannot resume from {saved.path}: it was trained with --{name.replace('_', '-')} "
                f"{before}, got {given[name]}"
            )
    return Config(**{**saved.config.to_json(), **given})


class Session:
    """One run, its files in `output`."""

    def __init__(
        self, config: Config, output: Path, display: Display, saved: Saved | None = None
    ) -> None:
        self.config, self.output, self.display = config, output, display
        self.data = open_data(config)
        if saved is not None:
            self._check_data(saved)
        self.trainer = Trainer(config, self.data, saved.progress if saved else None)
        self.backend = describe_backend(self.trainer)
        self._prepare_output(saved)
        if saved is not None:
            checkpoint.unpack(saved.path, saved.tensors, self.trainer.model, self.trainer.optimizer)
        self._announce(saved)

    def run(self, with_comparison: bool) -> dict[str, Any]:
        """Train, compare, and return what --json prints. Raises TrainError."""
        started = time.perf_counter()
        progress = self.trainer.progress
        if progress.epoch >= self.config.epochs:
            self.display.line(
                f"Nothing left to train: {progress.epoch} of {self.config.epochs} epochs are done. "
                "A larger --epochs goes on."
            )
        else:
            self._train()
        accuracy = progress.history[-1]["accuracy"]
        self.display.line(
            f"Held-out accuracy {accuracy:.2%} (best {progress.best:.2%}). "
            f"Weights: {self.output / BEST}"
        )
        comparison = None
        if with_comparison:
            comparison = self._compare()
        return {
            "version": __version__,
            "config": self.config.to_json(),
            "data": self.data.describe(),
            "backend": self.backend.to_json(),
            "accuracy": accuracy,
            "best_accuracy": progress.best,
            "history": progress.history,
            "checkpoint": str(self.output / LAST),
            "weights": str(self.output / BEST),
            "comparison": comparison,
            "seconds": round(time.perf_counter() - started, 3),
        }

    def _train(self) -> None:
        with StopRequest() as stop:
            self._save()  # shows a full disk or a forbidden folder now, not after an epoch
            try:
                while self.trainer.progress.epoch < self.config.epochs and stop.signal is None:
                    self._run_epoch(stop)
            except DivergedError as error:
                raise TrainError(f"{error}. {self._go_on_from_last()} --lr LOWER") from error
            except checkpoint.SaveError:
                raise
            except TrainError as error:
                self._save()
                raise TrainError(f"{error}\n{self._how_to_go_on()}") from error
            if stop.signal is not None:
                self._save()
                raise StoppedError(f"Stopped. {self._how_to_go_on()}", stop.signal)

    def _compare(self) -> dict[str, Any] | None:
        progress = self.trainer.progress
        try:
            figures = compare.run(self.config, self.data, self.backend, progress, self.display)
            if figures is not None:
                figures["stages"] = stages.run(self.config, self.backend.label, self.display)
            return figures
        except KeyboardInterrupt as error:
            message = f"Comparison stopped; the training is finished and saved in {self.output}."
            raise StoppedError(message, signal.SIGINT) from error

    def _run_epoch(self, stop: StopRequest) -> None:
        trainer = self.trainer
        images = seconds = 0.0

        def on_step(step: Step) -> bool:
            nonlocal images, seconds
            images, seconds = images + step.images, seconds + step.seconds
            self.display.update(advance=1)
            return stop.signal is None

        name = f"epoch {trainer.progress.epoch + 1}/{self.config.epochs}"
        with self.display.bar(name, trainer.steps_per_epoch, trainer.progress.step):
            if not trainer.train_epoch(on_step):
                return
            accuracy = trainer.validate(lambda: stop.signal is None)
        if accuracy is None:
            return
        best_before = trainer.progress.best
        epoch = trainer.finish_epoch(accuracy)
        speed = f"  {images / seconds:8,.0f} images/s" if seconds else ""
        self.display.line(f"{name:12} loss {epoch['loss']:.4f}  held-out {accuracy:7.2%}{speed}")
        self._save()
        if accuracy > best_before or trainer.progress.epoch == 1:
            self._write(BEST, self.trainer.model.state_dict(), {})

    # Files.

    def _save(self) -> None:
        tensors = checkpoint.pack(self.trainer.model, self.trainer.optimizer)
        self._write(LAST, tensors, {"progress": self.trainer.progress.to_json()})

    def _write(self, name: str, tensors: dict[str, Tensor], more: dict[str, Any]) -> None:
        metadata = {"config": self.config.to_json(), "data": self.data.describe(), **more}
        try:
            checkpoint.write(self.output / name, tensors, metadata)
        except checkpoint.SaveError as error:
            raise checkpoint.SaveError(
                f"{error}. Free space there, or give another --output. {self._go_on_from_last()}"
            ) from error

    def _go_on_from_last(self) -> str:
        """What a failure has left on the disk."""
        try:
            saved = read_saved(self.output / LAST)
        except TrainError:
            return "Nothing had been trained yet."
        done = f"{saved.progress.epoch} of {self.config.epochs} epochs"
        return f"The last checkpoint ({done}) is intact; go on from it with: {self._command()}"

    def _how_to_go_on(self) -> str:
        progress = self.trainer.progress
        where = f"epoch {progress.epoch + 1}, after step {progress.step} of "
        where += f"{self.trainer.steps_per_epoch}"
        return f"Saved in {where}: nothing is lost. Go on with: {self._command()}"

    def _command(self) -> str:
        path = shlex.quote(str(self.output / LAST))
        return f"python -m convnest_kernels train --resume {path}"

    def _prepare_output(self, saved: Saved | None) -> None:
        """Make the folder; never write over an unfinished run, and set a finished one aside."""
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make --output {self.output}: {error.strerror}") from error
        last = self.output / LAST
        if not last.exists() or (saved is not None and last.samefile(saved.path)):
            return
        there = read_saved(last)
        if there.progress.epoch < there.config.epochs and there.progress.seconds > 0:
            raise UsageError(
                f"{last} is an unfinished run ({there.progress.epoch} of {there.config.epochs} "
                f"epochs): go on with `{self._command()}`, or give another --output, or remove it"
            )
        if there.progress.seconds > 0:
            for name in (LAST, BEST):
                if (self.output / name).exists():
                    (self.output / name).replace(self.output / f"previous-{name}")
            self.display.line(f"The finished run in {self.output} is kept as previous-*.")

    # What the user is told.

    def _check_data(self, saved: Saved) -> None:
        before, now = saved.data, self.data.describe()
        if before["classes"] != now["classes"]:
            raise TrainError(
                f"cannot resume from {saved.path}: it was trained on {_classes(before)}, "
                f"{self.data.name} has {_classes(now)}"
            )
        if before["digest"] != now["digest"]:
            self.display.line(
                f"Note: the images have changed since the checkpoint ({before['train']} + "
                f"{before['val']} then, {now['train']} + {now['val']} now); training goes on."
            )

    def _announce(self, saved: Saved | None) -> None:
        config, data = self.config, self.data
        parameters = sum(p.numel() for p in self.trainer.model.parameters())
        size = f"{config.image_size}x{config.image_size}"
        threads = f", {torch.get_num_threads()} threads" if config.device == "cpu" else ""
        self.display.line(
            f"ConvNeSt {config.model} ({parameters / 1e6:.2f} M parameters) on {data.name}: "
            f"{len(data.train)} images to train on, {len(data.val)} held out, "
            f"{len(data.classes)} classes, {size}"
        )
        self.display.line(
            f"backend {self.backend.label}, {str(config.dtype).removeprefix('torch.')}, "
            f"device {config.device}{threads}, seed {config.seed}"
        )
        if saved is not None:
            progress = self.trainer.progress
            self.display.line(
                f"Resumed from {saved.path}: epoch {progress.epoch + 1} of {config.epochs}, "
                f"step {progress.step} of {self.trainer.steps_per_epoch}"
            )


def _classes(data: Mapping[str, Any]) -> str:
    names = list(map(str, data["classes"]))
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"{len(names)} classes ({shown})"
