"""`train`: the closing comparison with eager."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from convnest_kernels import _extension
from convnest_kernels.__main__ import main
from convnest_kernels.train import compare, contender, session, stages
from convnest_kernels.train.backend import Backend, describe_backend
from convnest_kernels.train.config import Config
from convnest_kernels.train.data import open_data
from convnest_kernels.train.display import Display
from convnest_kernels.train.errors import TrainError
from convnest_kernels.train.loop import Progress, Trainer
from tests.training import TINY, one_thread

__all__ = ["one_thread"]  # a fixture for every test here

CONFIG = Config(image_size=8, batch_size=256, epochs=2, backend="eager")

# What stands for "ours" here is eager as well, so that the tests need no native kernels.
NAMED_OURS = Backend(["cpu"], "cpu", {})


def trained(config: Config) -> tuple[Trainer, Progress]:
    trainer = Trainer(config, open_data(config))
    for _ in range(config.epochs):
        trainer.train_epoch(lambda step: True)
        accuracy = trainer.validate()
        assert accuracy is not None
        trainer.finish_epoch(accuracy)
    return trainer, trainer.progress


def test_both_contenders_train_as_the_run_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "MEASURED_STEPS", 8)
    trainer, progress = trained(CONFIG)
    figures = compare.run(CONFIG, trainer.data, NAMED_OURS, progress, Display(json=False))
    assert figures is not None
    assert (figures["ours"]["steps"], figures["eager"]["steps"]) == (8, 12)
    # Same seed, same backend: the process of its own reaches the very accuracy of the run.
    assert figures["eager"]["accuracy"] == progress.history[-1]["accuracy"]
    assert figures["ours"]["accuracy"] == progress.history[-1]["accuracy"]
    for name in ("ours", "eager"):
        assert figures[name]["images_per_second"] > 0
        assert figures[name]["peak_memory"] > figures[name]["training_memory"] > 0
    assert figures["ours"]["kept_for_backward"] == figures["eager"]["kept_for_backward"] > 0
    out = capsys.readouterr().out
    assert "images/s in training steps" in out
    assert "accuracy is the same within the noise" in out


def test_a_long_run_is_not_repeated_on_eager(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "MEASURED_STEPS", 3)
    trainer, progress = trained(dataclasses.replace(CONFIG, epochs=1))
    progress.seconds = compare.FULL_RUN_UP_TO + 1
    figures = compare.run(trainer.config, trainer.data, NAMED_OURS, progress, Display(json=False))
    assert figures is not None
    assert figures["eager"]["steps"] == 3
    assert figures["eager"]["accuracy"] is None
    assert "Eager's accuracy was not measured" in capsys.readouterr().out


def test_eager_is_not_compared_with_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [option for option in TINY if option != "--no-compare"]
    command = ["train", "--output", str(tmp_path), *options, "--epochs", "1"]
    assert main([*command, "--backend", "eager", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["comparison"] is None
    assert "This run was on eager PyTorch itself" in err


def test_ctrl_c_in_the_comparison_keeps_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(compare, "run", interrupt)
    options = [option for option in TINY if option != "--no-compare"]
    assert main(["train", "--output", str(tmp_path), *options, "--epochs", "1"]) == 130
    assert f"finished and saved in {tmp_path}" in capsys.readouterr().err
    assert (tmp_path / session.LAST).exists()


def test_a_contender_that_fails_says_why() -> None:
    trainer, progress = trained(dataclasses.replace(CONFIG, epochs=1))
    config = dataclasses.replace(CONFIG, model="mini2")
    with pytest.raises(TrainError, match=r"finished and saved.*\n.*--model must be 'mini'"):
        compare.run(config, trainer.data, NAMED_OURS, progress, Display(json=False))


def figures(speed: float, accuracy: float | None) -> dict[str, object]:
    return {
        "ours": {"accuracy": 0.98},
        "eager": {"accuracy": accuracy},
        "speed_ratio": speed,
        "accuracy_noise": 0.02,
    }


def test_the_verdict_is_plain() -> None:
    assert "Ours is slower than eager here: 0.80 times" in compare._verdict(figures(0.8, 0.98))
    assert "Ours trains 1.50 times as fast" in compare._verdict(figures(1.5, 0.97))
    assert "accuracy is the same within" in compare._verdict(figures(1.5, 0.97))
    assert "accuracy is NOT the same within" in compare._verdict(figures(1.5, 0.9))


def test_kept_for_backward_counts_storages_once_and_no_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Linear(4, 4)
    x = torch.randn(8, 4)

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = model(x)  # keeps x [8, 4] and the weight
        copy = h.detach().clone()
        return (h * copy).sum() + (h * h).sum() + (h.view(4, 8) * h.detach().view(4, 8)).sum()

    monkeypatch.setattr(contender, "train_batches", lambda *args: iter([(x, None)]))
    trainer = SimpleNamespace(model=model, config=None, data=None, loss=loss)
    # x, h (once for all its products and views) and its copy.
    assert contender.kept_for_backward(trainer) == 3 * x.nbytes  # type: ignore[arg-type]


def test_recomputing_keeps_less() -> None:
    kept = [
        contender.kept_for_backward(Trainer(config, open_data(config)))
        for config in (
            dataclasses.replace(CONFIG, recompute=recompute)
            for recompute in ("none", "conv", "all")
        )
    ]
    assert kept[0] > kept[1] > kept[2]


@pytest.mark.skipif(_extension.module is None, reason="needs the native module")
def test_the_native_kernels_keep_less_than_eager() -> None:
    eager, ours = (
        Trainer(config, open_data(config))
        for config in (CONFIG, dataclasses.replace(CONFIG, backend="cpu"))
    )
    assert contender.kept_for_backward(ours) < 0.7 * contender.kept_for_backward(eager)
    backend = describe_backend(ours)
    assert backend.names == ["cpu"]
    assert not backend.is_eager


def test_the_backend_is_the_dispatch_s_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convnest_kernels._extension.error", "not built")
    backend = describe_backend(Trainer(CONFIG, open_data(CONFIG)))
    assert backend.is_eager
    assert backend.reasons["cpu"] == ["not built"]


def test_blocks_at_the_stage_shapes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stages, "IMAGE_SIZE", 32)
    monkeypatch.setattr(stages, "BATCH_SIZE", 1)
    found = stages.run(CONFIG, "ours", Display(json=False))
    assert [(stage["size"], stage["dim"]) for stage in found] == [
        (8, 48),
        (4, 96),
        (2, 192),
        (1, 384),
    ]
    for stage in found:
        assert len(stage["samples"]["ours"]) == len(stage["samples"]["eager"]) == stages.ROUNDS
        assert stage["speed_ratio"] == pytest.approx(stage["eager"] / stage["ours"])
    shown = capsys.readouterr().out
    assert "8x8, 48 channels" in shown
    assert f"{found[0]['speed_ratio']:.2f}x" in shown
