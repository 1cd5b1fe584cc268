"""The benchmark suite refuses wrong numbers, and says who does not take part."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import torch

from bench import (
    calls,
    cells,
    cli,
    verify,
)
from bench.cases import OPERATORS
from bench.cells import Cell
from bench.contenders import CONTENDERS
from bench.runtimes import SkipError
from bench.verify import Checker, WrongNumbersError
from bench.work import build
from bench.worker import measure
from convnest_kernels import _extension
from tests.bench_records import LIMITS, needs_core, small


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("mode", cells.MODES)
@pytest.mark.parametrize("subject", [*OPERATORS, "block"])
def test_contenders_compute_the_same(subject: str, mode: str) -> None:
    """Eager in both layouts and ours pass the check, forward and every gradient."""
    names = ["eager-nhwc", "eager-nchw"] + ["cpu"] * (_extension.module is not None)
    record = measure(small(subject, mode), names, 0.0, LIMITS, wanted=5)
    for name in names:
        found = record["contenders"][name]
        assert 0 <= found["error"] <= 1
        assert len(found["samples"]) == 5
        assert found["p20"] <= found["median"] <= found["p80"]
        if mode == "train":
            assert found["kept_for_backward"] > 0
        assert found["peak_allocated"] > 0
    assert record["floor"] > 0


@needs_core
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", cells.MODES)
def test_wrong_kernel_is_refused(mode: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is wrong in one element has no time, and the others still have theirs."""
    right = CONTENDERS["cpu"]

    def wrong(work: Any) -> Any:
        prepared = right.prepare(work)
        results = prepared.results

        def spoilt() -> Any:
            found = {name: x.clone() for name, x in results().items()}
            last = list(found)[-1 if mode == "train" else 0]
            found[last][(-1,) * found[last].dim()] += found[last].abs().max()
            return found

        return dataclasses.replace(prepared, results=spoilt)

    monkeypatch.setitem(CONTENDERS, "cpu", dataclasses.replace(right, prepare=wrong))
    cell = small("nested_conv", mode, dtype=dtype)
    record = measure(cell, ["cpu", "eager-nhwc"], 0.0, LIMITS, wanted=5)
    assert "is off by" in record["contenders"]["cpu"]["refused"]
    assert "median" not in record["contenders"]["cpu"]
    assert "median" in record["contenders"]["eager-nhwc"]
    assert cli._is_refused(record)


@pytest.mark.parametrize(("name", "state"), [("cpu", "refused"), ("openvino", "skipped")])
def test_contender_that_raises(name: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are timed; the run fails if it was ours."""

    def broken(work: Any) -> Any:
        raise RuntimeError("out of luck\nsecond line")

    broken_one = dataclasses.replace(CONTENDERS[name], prepare=broken)
    monkeypatch.setitem(CONTENDERS, name, broken_one)
    record = measure(small("gelu_layernorm"), [name, "eager-nhwc"], 0.0, LIMITS, wanted=5)
    assert record["contenders"][name][state] == "RuntimeError: out of luck"
    assert "median" in record["contenders"]["eager-nhwc"]
    assert cli._is_refused(record) == (state == "refused")


@pytest.mark.parametrize("fault", ["nan", "shape", "missing"])
def test_check_sees(fault: str) -> None:
    work = build(small("gelu_layernorm"))
    checker = Checker(work, work.forms["nhwc"], work.inputs)
    output = calls.run_torch(work, "nhwc", work.forms["nhwc"]).results()["output"]
    assert checker.check({"output": output}, ours=True) <= 1
    spoilt = {
        "nan": {"output": output.clone().index_fill_(0, torch.tensor([1]), float("nan"))},
        "shape": {"output": output[:1]},
        "missing": {},
    }[fault]
    with pytest.raises(WrongNumbersError):
        checker.check(spoilt, ours=True)


def test_network_in_both_layouts() -> None:
    cell = Cell("training", 0, 1, "float32", "train", "convnest_atto", image_size=32)
    record = measure(cell, ["eager-nhwc", "eager-nchw"], 0.0, LIMITS, wanted=5)
    assert all("median" in found for found in record["contenders"].values())


def test_peers_give_a_reason() -> None:
    """Who is not installed or does not apply says so and is not timed."""
    train = build(small("nested_conv", "train"))
    half = build(small("nested_conv", dtype="float16"))
    for name in (
        "onnxruntime",
        "openvino",
        "zentorch",
        "convnext-eager",
        "timm-half",
        "large-kernel-extension",
        "cudnn-depthwise",
        "native-depthwise",
    ):
        with pytest.raises(SkipError, match=r"\w{3}"):
            CONTENDERS[name].prepare(train)
    with pytest.raises(SkipError, match="not installed|have no float16"):
        CONTENDERS["onnxruntime"].prepare(half)
    with pytest.raises(SkipError, match="not for cpu"):
        CONTENDERS["triton"].prepare(train)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_runtime(name: str) -> None:
    pytest.importorskip(name)
    pytest.importorskip("onnxscript")
    record = measure(small("block"), [name, "eager-nhwc"], 0.0, LIMITS, wanted=5)
    assert record["contenders"][name]["error"] <= 1


@pytest.mark.parametrize("mode", cells.MODES)
def test_timm_half(mode: str) -> None:
    """timm's own modules compute our operator, gradients too."""
    pytest.importorskip("timm")
    record = measure(
        small("convnext_half", mode), ["timm-half", "eager-nhwc"], 0.0, LIMITS, wanted=5
    )
    assert record["contenders"]["timm-half"]["error"] <= 1
    assert len(record["contenders"]["timm-half"]["samples"]) == 5


@needs_core
def test_training_step_of_ours() -> None:
    """Nothing may step before the check: it would move the parameters away from the formula's."""
    cell = Cell("training", 0, 3, "float32", "train", "convnest_atto", image_size=64)
    record = measure(cell, ["cpu", "eager-nhwc"], 0.0, LIMITS, wanted=5)
    assert record["checked"] == "2 of 3 images against float64"
    assert record["contenders"]["cpu"]["error"] <= 1
    assert len(record["contenders"]["cpu"]["samples"]) == 5


@needs_core
@pytest.mark.parametrize("subject", ["block", "nested_conv"])
def test_ours_in_the_cells_memory_format(subject: str) -> None:
    cell = small(subject, "train", memory_format="contiguous")
    (x,) = build(cell).inputs_for("ours")
    assert x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last)
    record = measure(cell, ["cpu", "eager-nhwc"], 0.0, LIMITS, wanted=5)
    assert record["contenders"]["cpu"]["error"] <= 1


LARGE = {"batch": 12}  # more than are checked


@pytest.mark.parametrize("mode", cells.MODES)
def test_images_of_a_large_batch(mode: str) -> None:
    """The first and the last are among the checked; the others must be finite, without gradient."""
    work = build(small("gelu_layernorm", mode, **LARGE))
    assert len(work.checked) == 8 and {0, 11} <= set(work.checked)
    checker = Checker(work, work.forms["nhwc"], work.inputs)
    results = calls.run_torch(work, "nhwc", work.forms["nhwc"]).results()
    assert checker.check(results, ours=True) <= 1
    (other, *_) = sorted(set(range(12)) - set(work.checked))
    for name, image, value, message in (
        ("output", 0, 9.0, "output is off by"),
        ("output", 11, 9.0, "output is off by"),
        ("output", other, float("nan"), "output is not finite"),
        ("dinput0", 11, 9.0, "dinput0 is off by"),
        ("dinput0", other, 1e-6, "dinput0 of an image without a cotangent is not zero"),
    ):
        if name in results:
            spoilt = {**results, name: results[name].clone()}
            spoilt[name][image, 0, 0, 0] += value
            with pytest.raises(WrongNumbersError, match=message):
                checker.check(spoilt, ours=True)


def test_contiguous_convolutions_are_the_same() -> None:
    """What makes float64 fast changes no number."""
    work = build(small("block", "train"))
    exact = work.forms["nhwc"].double()
    inputs = [x.double() for x in work.inputs]
    slow = verify.evaluate(work, exact, inputs)
    with verify.ContiguousConvolutions():
        fast = verify.evaluate(work, exact, inputs)
    for name, expected in slow.items():
        torch.testing.assert_close(fast[name], expected, rtol=1e-12, atol=1e-12)


def test_eager_nchw_is_contiguous() -> None:
    """A channels_last weight would make every convolution behind it channels_last."""
    work = build(Cell("model", 0, 1, variant="convnest_atto", image_size=32))
    for parameter in work.forms["nchw"].parameters():
        assert parameter.is_contiguous()
    assert not all(p.is_contiguous() for p in work.forms["nhwc"].parameters())


def test_peer_that_is_never_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that goes on costs a peer its place, not the cell its times."""

    def slow(work: Any) -> Any:
        time.sleep(60)

    monkeypatch.setitem(
        CONTENDERS, "compile-nchw", dataclasses.replace(CONTENDERS["compile-nchw"], prepare=slow)
    )
    peers = ["compile-nchw", "eager-nhwc"]
    record = measure(small("gelu_layernorm"), peers, 0.0, LIMITS, wanted=5, peer_seconds=0.2)
    assert record["contenders"]["compile-nchw"]["skipped"] == "not ready after 0.2 s"
    assert "median" in record["contenders"]["eager-nhwc"]


def test_preparing_times_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs a contender once, without the float64 formula, and gives no time."""
    runs: list[Any] = []
    right = CONTENDERS["eager-nhwc"]

    def counted(work: Any) -> Any:
        prepared = right.prepare(work)
        monkeypatch.setattr(verify, "evaluate", None)
        return dataclasses.replace(prepared, results=lambda: runs.append(prepared.results()))

    monkeypatch.setitem(CONTENDERS, "eager-nhwc", dataclasses.replace(right, prepare=counted))
    record = measure(small("gelu_layernorm"), ["eager-nhwc"], 0.0, None, wanted=0)
    assert len(runs) == 1
    assert set(record["contenders"]["eager-nhwc"]) == {"prepared_in"}
