"""The files of a run: a checkpoint that everything goes on from, and the trained weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from convnest_kernels.train import checkpoint
from convnest_kernels.train.errors import TrainError, UsageError
from recipe.batches import Plan
from recipe.parallel import Ranks, place, whole

# Arguments that may change when a run goes on: where and how it is computed, not what.
_FREE = {
    "data", "device", "dtype", "eval_every", "micro_batch", "output", "parallel", "recompute",
    "resume", "save_every", "stop_after", "teacher_weights", "weights", "workers",
}  # fmt: skip


class Files:
    """last.safetensors, to go on from; model.safetensors and ema.safetensors, the weights."""

    def __init__(
        self,
        args: argparse.Namespace,
        ranks: Ranks,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: ModelEmaV3 | None,
    ) -> None:
        self.args, self.ranks = args, ranks
        self.model, self.optimizer, self.ema = model, optimizer, ema
        self.last: Path = args.output / "last.safetensors"

    def begin(self) -> int:
        """Prepare the folder of a new run, which starts at step 0."""
        if self.last.exists():
            raise UsageError(f"{self.last} exists: add --resume, or take another --output")
        self.args.output.mkdir(parents=True, exist_ok=True)
        return 0

    def save(self, step: int, plan: Plan) -> None:
        """Write the checkpoint; every rank must call."""
        tensors = checkpoint.pack(self.model, self.optimizer)
        if self.ema is not None:
            for name, tensor in self.ema.module.state_dict().items():
                tensors[f"ema.{name}"] = tensor
        metadata = {"step": step, "run": self._run(plan)}
        self._write(self.last, {k: whole(v) for k, v in sorted(tensors.items())}, metadata)

    def save_weights(self) -> None:
        """Write the weights alone, and their average; every rank must call."""
        parts = {"model": self.model}
        if self.ema is not None:
            parts["ema"] = self.ema.module
        for name, part in parts.items():
            tensors = {key: whole(value) for key, value in part.state_dict().items()}
            self._write(self.args.output / f"{name}.safetensors", tensors, {})

    def load(self, plan: Plan) -> int:
        """Put the checkpoint's state in place; returns the step to go on with."""
        tensors, metadata = checkpoint.read(self.last)
        run = self._run(plan)
        for name, saved in metadata["run"].items():
            if run.get(name) != saved:
                raise UsageError(
                    f"cannot resume from {self.last}: --{name.replace('_', '-')} was {saved}, "
                    f"got {run.get(name)}"
                )
        weights = dict(self.model.state_dict())
        parameters = dict(self.model.named_parameters())
        for key, value in tensors.items():
            kind, name = key.split(".", 1)
            if kind == "model" and name in weights:
                tensors[key] = place(value, weights[name])
            elif kind == "optimizer" and value.dim():  # moments; the step count is a scalar
                tensors[key] = place(value, parameters[name.rpartition(".")[0]])
        checkpoint.unpack(self.last, tensors, self.model, self.optimizer)
        if self.ema is not None:
            averages = self.ema.module.state_dict()
            self.ema.module.load_state_dict(
                {name: place(tensors[f"ema.{name}"], like) for name, like in averages.items()}
            )
        return int(metadata["step"])

    def _run(self, plan: Plan) -> dict[str, Any]:
        """What decides the numbers of a run."""
        fixed = {name: value for name, value in vars(self.args).items() if name not in _FREE}
        return {**fixed, "images": plan.images}

    def _write(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        if self.ranks.first:
            checkpoint.write(path, tensors, metadata)


def load_weights(
    path: Path, model: nn.Module, reset: str = "head.fc.", without: str | None = None
) -> list[str]:
    """Load weights by name from a safetensors file.

    Parameters that begin with `reset` stay as they are where the file's have another shape; those
    that begin with `without` are not taken from the file. Returns the names that stay as they are.
    Raises TrainError for anything else that does not fit.
    """
    if not path.is_file():
        raise TrainError(f"no weights at {path}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise TrainError(f"cannot read the weights {path}: {error}") from error
    if without is not None:
        tensors = {name: t for name, t in tensors.items() if not name.startswith(without)}
    expected = model.state_dict()
    for name in sorted(tensors.keys() ^ expected.keys()):
        lacking = path if name in expected else "the model"
        raise TrainError(f"cannot load {path}: {lacking} has no {name}")
    other = [name for name, tensor in tensors.items() if tensor.shape != expected[name].shape]
    for name in other:
        if not name.startswith(reset):
            raise TrainError(
                f"cannot load {path}: {name} is {list(tensors[name].shape)}, "
                f"the model's is {list(expected[name].shape)}"
            )
        del tensors[name]
    model.load_state_dict(tensors, strict=False)
    return other
