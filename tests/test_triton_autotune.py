"""CONVNEST_AUTOTUNE=1 without a GPU: real kernels, interpreted; a clock that is told times."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.cases import Case, make_inputs
from tests import triton_interpreter
from tests.test_operators import check

if not triton_interpreter.enable():
    pytest.skip("needs Triton, and no GPU", allow_module_level=True)

from convnest_kernels.triton import autotune, heuristics
from convnest_kernels.triton.heuristics import ConvTile

DEVICE = "NVIDIA H100/1-12080-triton3.7.1"


class Clock:
    """Stands in for the GPU: runs what it times, and is told how long that took."""

    def __init__(self) -> None:
        self.milliseconds: Callable[[ConvTile], float] = lambda tile: 1.0
        self.timed: list[ConvTile] = []
        self.capturing = False

    def measure(self, run: Any) -> float:
        (tile,) = run.args
        run()
        self.timed.append(tile)
        return self.milliseconds(tile)


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setenv("CONVNEST_AUTOTUNE", "1")
    monkeypatch.setenv("CONVNEST_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(autotune, "_measure", clock.measure)
    monkeypatch.setattr(autotune, "_known", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: clock.capturing)
    return clock


def tile(backward: bool = False) -> ConvTile:
    return heuristics.conv_tile(7, torch.bfloat16, "90", backward)


def forget() -> None:
    """As a new process does."""
    autotune._known.clear()


@pytest.mark.parametrize("backward", [False, True])
def test_the_fastest_is_kept_and_read_back(backward: bool, clock: Clock) -> None:
    first = tile(backward)
    best = autotune.candidates(first)[-1]
    clock.milliseconds = lambda tile: 0.5 if tile == best else 1.0
    assert autotune.tuned(DEVICE, "conv", first, lambda tile: None) == best
    assert clock.timed == autotune.candidates(first)
    for _ in range(2):
        assert autotune.tuned(DEVICE, "conv", first, lambda tile: None) == best
        forget()
    assert clock.timed == autotune.candidates(first), "it was timed again"
    assert autotune.tuned(DEVICE, "other", first, lambda tile: None) == best
    assert autotune.tuned("another GPU", "conv", first, lambda tile: None) == best
    assert len(clock.timed) == 3 * len(autotune.candidates(first))


def test_what_does_not_fit_is_left_out(clock: Clock) -> None:
    from triton.runtime.errors import OutOfResources

    def launch(candidate: ConvTile) -> None:
        if candidate != tile():
            raise OutOfResources(2, 1, "shared memory")

    clock.milliseconds = lambda candidate: 9.0 if candidate == tile() else 1.0
    assert autotune.tuned(DEVICE, "conv", tile(), launch) == tile()


def test_nothing_is_timed_while_a_graph_is_captured(clock: Clock, tmp_path: Path) -> None:
    clock.capturing = True
    assert autotune.tuned(DEVICE, "conv", tile(), lambda tile: None) == tile()
    assert not clock.timed and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda text: text[:20], "cannot be read"),
        (lambda text: "", "cannot be read"),
        (lambda text: "[]", "cannot be read"),
        (lambda text: text.replace("num_warps", "warps"), "cannot be read"),
        (lambda text: text.replace("H100", "A100"), "was written for NVIDIA A100"),
        (lambda text: text.replace('"num_warps": 8', '"num_warps": 5'), "none of today's"),
    ],
    ids=["truncated", "empty", "list", "other fields", "other GPU", "other tile"],
)
def test_a_file_of_no_use_is_named_and_replaced(
    change: Callable[[str], str], word: str, clock: Clock
) -> None:
    best = autotune.candidates(tile())[-1]
    clock.milliseconds = lambda tile: 0.5 if tile == best else 1.0
    autotune.tuned(DEVICE, "conv", tile(), lambda tile: None)
    path = autotune.cache_path(DEVICE, "conv")
    good = path.read_text()
    path.write_text(change(good))
    assert path.read_text() != good
    forget()
    with pytest.warns(UserWarning, match=f"conv.json is of no use.*{word}"):
        assert autotune.tuned(DEVICE, "conv", tile(), lambda tile: None) == best
    assert path.read_text() == good


def test_a_cache_that_cannot_be_written_is_a_warning(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CONVNEST_CACHE_DIR", str(tmp_path / "file"))
    with (
        pytest.warns(UserWarning, match="is of no use"),
        pytest.warns(UserWarning, match="CONVNEST_CACHE_DIR names another directory"),
    ):
        autotune.tuned(DEVICE, "conv", tile(), lambda tile: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        autotune.tuned(DEVICE, "conv", tile(), lambda tile: None)  # this process remembers


def test_writers_do_not_disturb_each_other(clock: Clock) -> None:
    """Many at once, on one key and on their own: every file is whole, and none is lost."""
    choices = autotune.candidates(tile())
    errors = []

    def work(i: int) -> None:
        try:
            for turn in range(20):
                for key in ("shared", f"own{i}"):
                    path = autotune.cache_path(DEVICE, key)
                    autotune._write(path, DEVICE, choices[(i + turn) % len(choices)])
                    assert autotune._read(path, DEVICE, choices) in choices
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    directory = autotune.cache_path(DEVICE, "shared").parent
    names = sorted(path.name for path in directory.iterdir())
    assert names == sorted(["shared.json", *(f"own{i}.json" for i in range(8))])
    for path in directory.iterdir():
        assert json.loads(path.read_text())["device"] == DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tuned_operator_is_right(
    dtype: torch.dtype, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the public operator: each candidate is launched for real, the slowest first."""
    chosen = {}

    def choose(kernel: str, x: Any, kernel_size: int, tile: ConvTile, launch: Any) -> ConvTile:
        best = autotune.candidates(tile)[1]
        clock.milliseconds = lambda tile: 0.5 if tile == best else 1.0
        chosen[kernel] = autotune.tuned(DEVICE, f"{kernel}-{kernel_size}", tile, launch)
        assert chosen[kernel] == best != tile
        return chosen[kernel]

    monkeypatch.setattr(autotune, "choose", choose)
    kernel_size = 3 if dtype == torch.float32 else 5
    case = Case("nested_conv", (1, 2, 9, 10), kernel_size=kernel_size)
    check(case, make_inputs(case, dtype), "triton")
    assert set(chosen) == {"depthwise_fwd", "depthwise_bwd"}
    assert len(set(clock.timed)) >= 5


def test_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default, and on CPU tensors, no clock is looked at and no file."""
    monkeypatch.delenv("CONVNEST_AUTOTUNE", raising=False)
    monkeypatch.setattr(autotune, "tuned", lambda *_: pytest.fail("it tuned"))

    class OnGPU:
        is_cuda, shape, dtype, device = True, (8, 56, 56, 576), torch.bfloat16, "cuda:1"

    assert autotune.choose("conv", OnGPU(), 7, tile(), lambda tile: None) == tile()  # type: ignore[arg-type]
    monkeypatch.setenv("CONVNEST_AUTOTUNE", "1")
    assert autotune.choose("conv", torch.empty(8), 7, tile(), lambda tile: None) == tile()
    keys = []
    monkeypatch.setattr(autotune, "_device_key", lambda device: f"key of {device}")
    monkeypatch.setattr(autotune, "tuned", lambda *arguments: keys.append(arguments[:2]))
    for batch in (8, 5, 9):
        OnGPU.shape = (batch, 56, 56, 576)
        autotune.choose("conv", OnGPU(), 7, tile(), lambda tile: None)  # type: ignore[arg-type]
    assert keys[0] == keys[1] == ("key of cuda:1", "conv-bfloat16-576-7-3-6-6")
    assert keys[2] != keys[0]
