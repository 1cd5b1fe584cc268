"""`train`: a run from start to end, resumed wherever it was stopped, with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from convnest_kernels.__main__ import main
from convnest_kernels.train import session
from convnest_kernels.train.checkpoint import read
from convnest_kernels.train.config import Config
from convnest_kernels.train.data import open_data, train_batches, val_batches
from convnest_kernels.train.display import Display
from convnest_kernels.train.loop import Trainer
from convnest_kernels.train.signals import StopRequest
from tests.training import STEPS_PER_EPOCH, TINY, one_thread, resume, train

__all__ = ["one_thread"]  # a fixture for every test here


def last(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / session.LAST)


def assert_same_run(output: Path, expected: Path) -> None:
    """Weights, moments and random state are equal to the bit, and so is the history."""
    (ours, ours_metadata), (theirs, metadata) = (
        read(folder / session.LAST) for folder in (output, expected)
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    for each in (ours_metadata, metadata):
        del each["progress"]["seconds"]
    assert ours_metadata["progress"] == metadata["progress"]


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Send Ctrl-C to this process after the given number of training steps."""

    def install(step: int) -> None:
        done = 0
        update = Display.update

        def counted(self: Display, **fields: Any) -> None:
            nonlocal done
            done += 1
            if done == step:
                signal.raise_signal(signal.SIGINT)
            update(self, **fields)

        monkeypatch.setattr(Display, "update", counted)

    return install


def test_trains_and_writes_weights_that_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--image-size", "8", "--batch-size", "64", "--epochs", "3", "--lr", "0.006"]
    assert main(["train", "--json", "--no-compare", "--output", str(tmp_path), *options]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert "epoch 3/3" in err
    assert result["accuracy"] > 0.7
    assert result["comparison"] is None
    assert [epoch["epoch"] for epoch in result["history"]] == [1, 2, 3]
    losses = [epoch["loss"] for epoch in result["history"]]
    assert losses == sorted(losses, reverse=True)

    config = Config(**result["config"])
    trainer = Trainer(config, open_data(config))
    trainer.model.load_state_dict(load_file(result["weights"]))
    assert trainer.validate() == result["best_accuracy"]
    assert not list(tmp_path.glob(".*")), "a temporary file was left"


def test_the_seed_decides_the_run(tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert train("--output", tmp_path / name, "--seed", seed, "--epochs", "1") == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")
    weights = [last(tmp_path / name)["model.head.fc.weight"] for name in "ac"]
    assert not torch.equal(*weights)


@pytest.mark.parametrize("step", [1, 4, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 2])
def test_a_stopped_run_goes_on_with_the_same_bits(
    step: int,
    tmp_path: Path,
    stop_at: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ["--drop-path", "0.3", "--seed", "5", "--epochs", "3"]
    assert train("--output", tmp_path / "whole", *options) == 0

    with monkeypatch.context() as context:
        stop_at(step)
        assert train("--output", tmp_path / "stopped", *options) == 130
        context.undo()
    said = capsys.readouterr().err
    epoch, done = divmod(step, STEPS_PER_EPOCH)
    if done:
        assert f"epoch {epoch + 1}, after step {done} of {STEPS_PER_EPOCH}" in said
    assert f"train --resume {tmp_path / 'stopped' / session.LAST}" in said

    torch.manual_seed(99)  # what the process has drawn before must not matter
    assert resume(tmp_path / "stopped") == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_a_run_stopped_while_it_validates_repeats_only_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--output", tmp_path / "whole", "--amp") == 0
    validate = Trainer.validate

    def interrupted(self: Trainer, goes_on: Callable[[], bool]) -> float | None:
        signal.raise_signal(signal.SIGINT)
        return validate(self, goes_on)

    with monkeypatch.context() as context:
        context.setattr(Trainer, "validate", interrupted)
        assert train("--output", tmp_path / "stopped", "--amp") == 130
    assert f"after step {STEPS_PER_EPOCH} of {STEPS_PER_EPOCH}" in capsys.readouterr().err
    assert resume(tmp_path / "stopped" / session.LAST) == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_from_outside_saves(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "convnest_kernels", "train", *TINY, "--epochs", "100000"]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 2"):
            process.send_signal(number)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "nothing is lost" in err
    assert "Traceback" not in out + err
    _, metadata = read(tmp_path / session.LAST)
    assert metadata["progress"]["epoch"] >= 2


def test_a_second_ctrl_c_stops_at_once() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_finished_run_goes_on_with_more_epochs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--output", tmp_path, "--epochs", "1") == 0
    assert resume(tmp_path) == 0
    assert "Nothing left to train: 1 of 1 epochs are done" in capsys.readouterr().out
    assert resume(tmp_path, "--epochs", "2") == 0
    _, metadata = read(tmp_path / session.LAST)
    assert metadata["config"]["epochs"] == 2
    assert len(metadata["progress"]["history"]) == 2


def test_a_bare_resume_finds_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: Callable[[int], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    stop_at(3)
    assert train() == 130
    assert main(["train", "--resume", "--no-compare"]) == 0
    _, metadata = read(tmp_path / "runs" / "mini-digits" / session.LAST)
    assert metadata["progress"]["epoch"] == 2


def test_other_runs_in_the_output_are_safe(
    tmp_path: Path, stop_at: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--output", tmp_path / "a", "--epochs", "1") == 0
    before = (tmp_path / "a" / session.LAST).read_bytes()
    assert train("--output", tmp_path / "a", "--epochs", "1", "--seed", "1") == 0
    assert (tmp_path / "a" / f"previous-{session.LAST}").read_bytes() == before

    stop_at(2)
    assert train("--output", tmp_path / "b") == 130
    before = (tmp_path / "b" / session.LAST).read_bytes()
    assert train("--output", tmp_path / "b") == 2
    assert "unfinished run (0 of 2 epochs)" in capsys.readouterr().err
    assert (tmp_path / "b" / session.LAST).read_bytes() == before


def test_batches_depend_on_seed_epoch_and_step_alone() -> None:
    config = Config(image_size=8, batch_size=500, workers=0)
    data = open_data(config)
    whole = list(train_batches(config, data, 4, 0))
    tail = list(train_batches(config, data, 4, 1))
    assert [len(y) for _, y in whole] == [500, 500, 437]
    for (x, y), (expected_x, expected_y) in zip(tail, whole[1:], strict=True):
        assert torch.equal(x, expected_x)
        assert torch.equal(y, expected_y)
    other = next(train_batches(config, data, 5, 0))
    assert not torch.equal(other[1], whole[0][1])
    assert sum(len(y) for _, y in whole) == len(data.train) == 1437
    seen = sum(len(y) for _, y in val_batches(config, data))
    assert seen == len(data.val) == 360


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    config = Config(image_size=8, batch_size=1437, epochs=40, lr=0.1)
    trainer = Trainer(config, open_data(config))
    rates = [trainer.learning_rate(step) for step in range(40)]
    assert rates[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    assert rates[4] == 0.1
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[22] == pytest.approx(0.05)
    assert 0 < rates[-1] < 0.001


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        (["--version"], "convnest_kernels 0."),
        (["--help"], "doctor"),
        (["train", "--help"], "--resume"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        assert expected in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2


@pytest.mark.slow
def test_the_default_run_passes_97_percent(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "convnest_kernels", "train", "--json"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout)
    assert result["accuracy"] > 0.97
    if result["comparison"] is not None:
        ours, eager = result["comparison"]["ours"], result["comparison"]["eager"]
        assert abs(ours["accuracy"] - eager["accuracy"]) <= 0.02
        assert ours["kept_for_backward"] < eager["kept_for_backward"]
