"""The closing comparison: our backend against eager, each in a fresh process of its own.

Both train the same model from the same seed on the same batches. Eager trains to the end, so that
its accuracy can be set beside ours, unless that would take long; ours has its accuracy already and
takes as many steps as its speed and memory need.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from convnest_kernels.train.backend import Backend
from convnest_kernels.train.config import Config
from convnest_kernels.train.data import steps_per_epoch
from convnest_kernels.train.display import Display
from convnest_kernels.train.errors import TrainError
from convnest_kernels.train.image_set import Data
from convnest_kernels.train.loop import Progress

MEASURED_STEPS = 60

# Where our own training took longer than this, eager is not trained to the end.
FULL_RUN_UP_TO = 120.0  # seconds


def run(
    config: Config, data: Data, backend: Backend, progress: Progress, display: Display
) -> dict[str, Any] | None:
    """Measure both contenders, show the table and return its figures; None if there is no other.

    Raises TrainError if a contender fails.
    """
    if backend.is_eager:
        display.line("This run was on eager PyTorch itself: there is nothing to compare it with.")
        for name, reasons in backend.reasons.items():
            display.line(f"  {name}: {'; '.join(reasons)}")
        return None
    total = config.epochs * steps_per_epoch(config, data)
    steps = min(MEASURED_STEPS, total)
    trains_fully = progress.seconds <= FULL_RUN_UP_TO
    ours = _measure(config, steps, backend.label, display)
    eager_config = dataclasses.replace(config, backend="eager")
    eager = _measure(eager_config, total if trains_fully else steps, "eager", display)
    figures = {
        "ours": {**ours, "accuracy": progress.history[-1]["accuracy"]},
        "eager": eager,
        "speed_ratio": ours["images_per_second"] / eager["images_per_second"],
        "accuracy_noise": _noise(progress.history[-1]["accuracy"], len(data.val)),
    }
    _show(figures, config, backend, display)
    return figures


def _measure(config: Config, steps: int, label: str, display: Display) -> dict[str, Any]:
    """Run a contender, following its steps in a progress bar."""
    request = json.dumps({"config": config.to_json(), "steps": steps})
    command = [sys.executable, "-m", "convnest_kernels.train.contender", request]
    result: dict[str, Any] | None = None
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=_environment(),
            start_new_session=True,  # Ctrl-C reaches us alone; we end it
        ) as process,
        display.bar(f"comparing: {label}", steps),
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                message = json.loads(line)
                result = message.get("result", result)
                if "step" in message:
                    display.update(completed=message["step"])
            process.wait()
        except BaseException:
            process.kill()
            raise
        if result is None:
            errors.seek(0)
            raise TrainError(
                "the training is finished and saved, but the comparison failed (--no-compare "
                f"leaves it out): {label} ended with status {process.returncode}\n"
                f"{errors.read().strip()}"
            )
    return result


def _environment() -> dict[str, str]:
    """This process's, with this very package and as many threads."""
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def _noise(accuracy: float, images: int) -> float:
    """Two standard errors of the difference of two accuracies, each measured on `images`."""
    return 2 * math.sqrt(2 * accuracy * (1 - accuracy) / images)


def _show(figures: dict[str, Any], config: Config, backend: Backend, display: Display) -> None:
    ours, eager = figures["ours"], figures["eager"]
    rows = [
        _row("images/s in training steps", ours, eager, "images_per_second", "{:,.0f}"),
        _row("peak memory of the process, MB", ours, eager, "peak_memory", "{:,.0f}", 1e6),
        _row("  of it: in training, MB", ours, eager, "training_memory", "{:,.0f}", 1e6),
        _row("kept for backward, MB", ours, eager, "kept_for_backward", "{:,.2f}", 1e6),
    ]
    if eager["accuracy"] is not None:
        difference = 100 * (ours["accuracy"] - eager["accuracy"])
        rows.append(
            [
                "held-out accuracy",
                f"{ours['accuracy']:.2%}",
                f"{eager['accuracy']:.2%}",
                f"{difference:+.2f} points",
            ]
        )
    title = f"Same model, batches and seed, batch size {config.batch_size}"
    display.table(title, ["", backend.label, "eager", "ours / eager"], rows)
    display.line(_verdict(figures))


def _row(
    name: str, ours: dict[str, Any], eager: dict[str, Any], key: str, form: str, unit: float = 1.0
) -> list[str]:
    values = [ours[key], eager[key]]
    shown = ["not known" if v is None else form.format(v / unit) for v in values]
    ratio = f"{values[0] / values[1]:.2f}x" if all(values) else ""
    return [name, *shown, ratio]


def _verdict(figures: dict[str, Any]) -> str:
    ratio = figures["speed_ratio"]
    if ratio >= 1:
        speed = f"Ours trains {ratio:.2f} times as fast as eager here"
    else:
        speed = f"Ours is slower than eager here: {ratio:.2f} times its speed"
    eager = figures["eager"]["accuracy"]
    if eager is None:
        minutes = FULL_RUN_UP_TO / 60
        return (
            f"{speed}. Eager's accuracy was not measured, since the run took over {minutes:g} "
            "minutes; train with --backend eager for it."
        )
    difference = abs(figures["ours"]["accuracy"] - eager)
    noise = figures["accuracy_noise"]
    same = "the same within" if difference <= noise else "NOT the same within"
    return f"{speed}; accuracy is {same} the noise of the held-out set ({100 * noise:.2f} points)."
