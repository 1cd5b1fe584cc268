"""The scripts of examples/: each trains, goes on with the same bits, and splits over ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from convnest_kernels.models import create_model
from convnest_kernels.train import checkpoint
from tests.ranks import Ranks, ranks
from tests.recipe_runs import (
    EXAMPLES,
    MICRO,
    PLAIN,
    RUNS,
    STEPS,
    WARNINGS,
    arguments,
    data,
    read_log,
    run,
    run_on_a_rank,
    script,
)
from tests.training import one_thread

__all__ = ["data", "one_thread", "ranks"]  # fixtures

pytestmark = WARNINGS


@pytest.mark.parametrize("name", RUNS)
def test_learns(name: str, data: dict[str, Path], tmp_path: Path) -> None:
    steps = STEPS[name]
    options = ["--micro-batch", MICRO.get(name, "8"), "--drop-path", "0.1"]
    options += ["--stop-after", str(steps)] if name == "detect" else []
    options += PLAIN if name in ("imagenet", "finetune", "distill") else []
    log = run(name, data, tmp_path, *options)
    assert [entry["step"] for entry in log] == list(range(1, steps + 1))
    losses = [entry["loss"] for entry in log]
    floor = 0.95 if name == "distill" else 0.9  # what a teacher is unsure of stays in the loss
    assert sum(losses[-3:]) < floor * sum(losses[:3]), losses
    if name in ("imagenet", "finetune", "distill"):
        assert log[-1]["top1"] > 0.5 and log[-1]["ema_top1"] > 0.5, log[-1]
        model = create_model("convnest_atto", num_classes=3)
        for kind in ("model", "ema"):
            model.load_state_dict(load_file(tmp_path / f"{kind}.safetensors"))


@pytest.mark.parametrize("name", RUNS)
def test_resumes_with_the_same_bits(name: str, data: dict[str, Path], tmp_path: Path) -> None:
    options = ["--micro-batch", MICRO.get(name, "4"), "--drop-path", "0.2"]
    if name == "imagenet":  # images drawn elsewhere leave this process's random numbers alone
        options += ["--workers", "1"]
    end = ["--stop-after", "4"]
    log = run(name, data, tmp_path / "whole", *options, *end)
    run(name, data, tmp_path / "parts", *options, "--stop-after", "2")
    parts = run(name, data, tmp_path / "parts", *options, "--resume", *end)
    for entry in (*log, *parts):
        del entry["seconds"]
    assert parts == log and len(log) == 4
    ours, metadata = checkpoint.read(tmp_path / "parts/last.safetensors")
    theirs, expected = checkpoint.read(tmp_path / "whole/last.safetensors")
    assert metadata == expected and metadata["step"] == 4
    assert ours.keys() == theirs.keys()
    assert any(key.startswith("ema.") for key in ours) == (name != "detect")
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_equal_one_with_twice_the_batch(
    name: str, data: dict[str, Path], tmp_path: Path, ranks: Ranks
) -> None:
    """In float64. Mask R-CNN's losses are means over what was found in a micro-batch: it takes
    the same micro-batches, one after the other; the others a micro-batch of twice the size."""
    alone = ["--micro-batch", MICRO.get(name, "8"), "--dtype", "float64", "--drop-path", "0"]
    together = ["--micro-batch", MICRO.get(name, "4"), "--dtype", "float64", "--drop-path", "0"]
    end = ["--stop-after", "3"]
    expected = run(name, data, tmp_path / "one", *alone, *end)
    ranks(run_on_a_rank, name, arguments(name, data, tmp_path / "two", *together, *end))
    assert len(expected) == 3
    assert_same_run(tmp_path / "two", expected)
    assert_same_weights(tmp_path / "two", tmp_path / "one")


def assert_same_run(ours: Path, expected: list[dict[str, Any]]) -> None:
    """Every figure of a log but the time that its steps took."""
    for entry, other in zip(read_log(ours), expected, strict=True):
        del entry["seconds"], other["seconds"]
        assert entry == pytest.approx(other, rel=1e-7)


def assert_same_weights(ours: Path, theirs: Path) -> None:
    """Adam divides by what may be almost 0, so weights differ more than gradients."""
    tensors, _ = checkpoint.read(ours / "last.safetensors")
    expected, _ = checkpoint.read(theirs / "last.safetensors")
    assert tensors.keys() == expected.keys()
    for key, value in expected.items():
        if not key.startswith("rng."):
            torch.testing.assert_close(tensors[key], value, rtol=1e-5, atol=1e-7, msg=key)


def test_segmentation_sharded_equals_one_rank(
    data: dict[str, Path], tmp_path: Path, ranks: Ranks
) -> None:
    """Two models in one: FSDP2 shards the body's blocks, and the head with the rest."""
    options = ["--dtype", "float64", "--ema", "0.9", "--stop-after", "2"]
    alone = [*options, "--micro-batch", "8"]
    expected = run("segment", data, tmp_path / "one", *alone)
    sharded = [*options, "--micro-batch", "4", "--parallel", "fsdp"]
    ranks(run_on_a_rank, "segment", arguments("segment", data, tmp_path / "two", *sharded))
    assert_same_run(tmp_path / "two", expected)
    assert_same_weights(tmp_path / "two", tmp_path / "one")


def test_fsdp_equals_one_rank_and_goes_on_alone(
    data: dict[str, Path], tmp_path: Path, ranks: Ranks
) -> None:
    options = ["--dtype", "float64", "--ema", "0.9"]
    whole = [*options, "--micro-batch", "8"]
    run("imagenet", data, tmp_path / "one", *whole, "--stop-after", "6")
    sharded = [*options, "--micro-batch", "4", "--parallel", "fsdp", "--stop-after"]
    ranks(run_on_a_rank, "imagenet", arguments("imagenet", data, tmp_path / "two", *sharded, "3"))
    # On two sharded ranks again, and alone, from what the ranks have saved.
    more = arguments("imagenet", data, tmp_path / "two", *sharded, "5", "--resume")
    ranks(run_on_a_rank, "imagenet", more)
    run("imagenet", data, tmp_path / "two", *whole, "--resume", "--stop-after", "6")
    assert_same_weights(tmp_path / "two", tmp_path / "one")
    assert_same_run(tmp_path / "two", read_log(tmp_path / "one"))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_trains_in_bfloat16(kind: str, data: dict[str, Path], tmp_path: Path, ranks: Ranks) -> None:
    """Each within a few roundings of float32, whatever casts: autocast or FSDP2's policy."""
    options = ["--micro-batch", "4", "--stop-after", "3"]
    expected = run("imagenet", data, tmp_path / "float32", *options)
    low = [*options, "--dtype", "bfloat16", "--parallel", kind]
    ranks(run_on_a_rank, "imagenet", arguments("imagenet", data, tmp_path / kind, *low))
    for ours, theirs in zip(read_log(tmp_path / kind), expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)
        assert ours["loss"] != theirs["loss"]


def test_torchrun_starts_the_script(data: dict[str, Path], tmp_path: Path) -> None:
    options = ["--micro-batch", "4", "--stop-after", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*command, EXAMPLES / "imagenet.py", *arguments("imagenet", data, tmp_path, *options)],
        check=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)},
    )
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2]


def test_a_signal_saves(
    data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script("imagenet")
    from recipe import loop

    write = loop._Log.write

    def interrupt(self: Any, entry: dict[str, Any]) -> None:
        write(self, entry)
        if entry["step"] == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(loop._Log, "write", interrupt)
    log = run("imagenet", data, tmp_path, "--micro-batch", "8")
    assert len(log) == 3  # the step after the signal is finished
    assert checkpoint.read(tmp_path / "last.safetensors")[1]["step"] == 3
