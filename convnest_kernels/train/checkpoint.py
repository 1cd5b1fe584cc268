"""Checkpoints: one safetensors file each, replaced atomically.

    model.<parameter>                 weights
    optimizer.<parameter>.<state>     AdamW's moments and step
    rng.cpu, rng.cuda.<i>             states of torch's random number generators
    metadata                          format, and JSON: config, data, progress

A file is written beside its destination, synced and renamed over it: whatever happens meanwhile,
the destination holds either what it held or all that is new.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convnest_kernels.train.errors import TrainError, need

_FORMAT = "convnest_kernels.train"
_FORMAT_VERSION = 1


class SaveError(TrainError):
    """A file could not be written; what it would have replaced is as it was."""


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Save tensors and JSON-able metadata to `path`, atomically. Raises SaveError."""
    safetensors = need("safetensors.torch", "safetensors", "saving a checkpoint")
    texts = {name: json.dumps(value) for name, value in metadata.items()}
    content: bytes = safetensors.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        {"format": _FORMAT, "format_version": str(_FORMAT_VERSION), **texts},
    )
    try:
        _replace(path, content)
    except OSError as error:
        raise SaveError(_explain(path, error, len(content))) from error


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # there only if something failed
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where the system lets a folder be synced."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _explain(path: Path, error: OSError, size: int) -> str:
    message = f"could not save {path}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        message += f" (it takes {size / 1e6:.1f} MB"
        with suppress(OSError):
            message += f"; {shutil.disk_usage(path.parent).free / 1e6:.1f} MB are free on that disk"
        message += ")"
    return message


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write` saved. Raises TrainError naming the file and what is wrong with it."""
    safetensors = need("safetensors", "safetensors", "reading a checkpoint")
    if not path.is_file():
        raise TrainError(f"no checkpoint at {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
            _check_format(path, texts)
            # Cloned, so that the file itself may be replaced.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        del texts["format"], texts["format_version"]
        return tensors, {name: json.loads(text) for name, text in texts.items()}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise TrainError(
            f"cannot read the checkpoint {path}: truncated or damaged ({error})"
        ) from error


def _check_format(path: Path, texts: Mapping[str, str]) -> None:
    if texts.get("format") != _FORMAT:
        raise TrainError(
            f"cannot resume from {path}: a safetensors file, but not a checkpoint of "
            "`convnest_kernels train`"
        )
    if texts.get("format_version") != str(_FORMAT_VERSION):
        raise TrainError(
            f"cannot resume from {path}: its format is {texts.get('format_version')}, this version "
            f"reads {_FORMAT_VERSION}"
        )


# Between training objects and tensors.


def pack(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that a step depends on, by name."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        for i, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"rng.cuda.{i}"] = state
    return tensors


def unpack(
    path: Path, tensors: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Put what `pack` gave back in its place. Raises TrainError where it does not fit."""
    weights = {
        name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
        if name.startswith("model.")
    }
    expected = model.state_dict()
    for name in sorted(weights.keys() ^ expected.keys()):
        lacking = "the checkpoint" if name in expected else "the model"
        raise TrainError(f"cannot resume from {path}: {lacking} has no {name}")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise TrainError(
                f"cannot resume from {path}: {name} is {list(tensor.shape)}, the model's is "
                f"{list(expected[name].shape)}"
            )
    model.load_state_dict(weights)
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        found = {
            key.removeprefix(prefix): tensor
            for key, tensor in tensors.items()
            if key.startswith(prefix)
        }
        if found:  # none before the first step
            # AdamW keeps its step count on the CPU, and the moments beside the parameter.
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device)
                for key, value in found.items()
            }
    torch.set_rng_state(tensors["rng.cpu"])
    for i in range(torch.cuda.device_count()):
        if f"rng.cuda.{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng.cuda.{i}"], i)
