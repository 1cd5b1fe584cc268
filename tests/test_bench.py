"""The benchmark suite: it refuses wrong numbers, counts right, and the README agrees with it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import (
    cells,
    cli,
    compare,
    contenders,
    floors,
    limits,
    memory,
    readme,
    report,
    timing,
    worker,
)
from bench.cases import OPERATORS, VARIANTS, stage_cases, stages
from bench.cells import Cell
from bench.contenders import CONTENDERS
from bench.runtimes import SkipError
from bench.store import Store
from bench.verify import Checker, WrongNumbersError
from bench.work import build
from bench.worker import measure
from convnest_kernels import _bench, _extension, reference

# A small model's last stage, of 32² images: 1×1 maps are the second case.
SMALL: dict[str, Any] = {"variant": "convnest_atto", "image_size": 64, "stage": 2, "batch": 2}
LIMITS = dataclasses.asdict(limits.Limits(1e11, 2e11, 3e9, ((1 << 15, 1e11), (1 << 28, 1e10))))

needs_core = pytest.mark.skipif(_extension.module is None, reason="the native module is not built")


def small(subject: str, mode: str = "infer", **options: Any) -> Cell:
    return Cell(**{**SMALL, "subject": subject, "mode": mode, **options})


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    torch.set_num_threads(1)


# ---- the work and its check ----


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


@needs_core
def test_wrong_formula_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command exits with 1 where the kernels and the formula differ."""
    formula = reference.nested_conv
    monkeypatch.setattr(reference, "nested_conv", lambda *a, **k: 1.01 * formula(*a, **k))
    monkeypatch.setattr(
        cli, "_measure", lambda cell, args, found: measure(cell, args.peers, 0.0, found, wanted=5)
    )
    monkeypatch.setattr(limits, "measure", lambda: limits.Limits(**LIMITS))
    arguments = "--op nested_conv --stage 2 --batch 1 --variant convnest_atto --image-size 64"
    options = ["--peers", "cpu", "eager-nhwc", "--out", str(tmp_path), "--device", "cpu"]
    assert cli.main([*arguments.split(), *options]) == 1
    assert "REFUSED" in capsys.readouterr().err
    (record,) = Store(tmp_path).read()["records"].values()
    assert "median" not in record["contenders"]["cpu"]


@pytest.mark.parametrize("fault", ["nan", "shape", "missing"])
def test_check_sees(fault: str) -> None:
    work = build(small("gelu_layernorm"))
    checker = Checker(work, work.forms["nhwc"], work.inputs)
    output = contenders.run_torch(work, "nhwc", work.forms["nhwc"]).results()["output"]
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
    for name in ("onnxruntime", "openvino", "zentorch", "convnext-eager", "timm-half"):
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


# ---- the table of cells ----


def test_stages_of_every_variant() -> None:
    for variant, config in VARIANTS.items():
        found = stages(variant)
        assert [s.dim for s in found] == list(config["dims"])
        cases = stage_cases(variant, 3)
        assert [case.shape for case in cases] == [(3, s.height, s.width, s.wide) for s in found]
    assert [s.height for s in stages("convnest_tiny")] == [56, 28, 14, 7]
    assert [s.height for s in stages("convnest_iso_base")] == [14]
    (narrow,) = stage_cases("convnest_iso_base", 1, "layernorm_residual")
    assert narrow.shape == (1, 14, 14, 384)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subject": "conv"}, "subject must be one of nested_conv"),
        ({"stage": 5}, "stage must be one of 1, 2, 3, 4, got 5"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"dtype": "int8"}, "dtype must be one of float32"),
        ({"subject": "model", "stage": 1}, "stage must be one of 0, got 1"),
    ],
)
def test_cell_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cell(**{"subject": "block", **SMALL, **options})


def test_full_set_has_no_cell_twice() -> None:
    for device in ("cpu", "cuda"):
        keys = [cell.key for cell in cells.full(device, 1)]
        assert len(set(keys)) == len(keys) > 15


def test_cost_of_a_block_is_the_papers() -> None:
    """4·P·C·D for the linears; taps in the padding left out; two GELUs."""
    cost = build(Cell("block", 4, 1)).cost
    assert cost is not None
    assert cost.linear_flops == 4 * 49 * 384 * 4608
    assert cost.conv_flops == 2 * 4608 * 37 * 37  # 4+5+6+7+6+5+4 taps a row
    assert cost.gelus == 2 * 49 * 4608
    assert cost.of("train")["flops"] == 3 * cost.flops


# ---- time and memory ----


def test_interleaving_takes_turns() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}

    class Clock:
        def sample(self, call: Any, repeats: int) -> tuple[float, float]:
            call()
            return 1.0, 3.0

    samples = timing.interleave(calls, Clock(), budget=60.0, wanted=7)
    assert order[2 * timing.WARM_UP :] == ["a", "b"] * 7
    assert samples["a"].as_dict()["page_faults"] == 3
    few = timing.interleave(calls, Clock(), budget=0.0, wanted=30)
    assert len(few["a"].seconds) == timing.MIN_SAMPLES


def test_percentiles() -> None:
    samples = timing.Samples([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert (samples.percentile(0.2), samples.median, samples.percentile(0.8)) == (2.0, 3.5, 5.0)


def test_page_faults_are_counted() -> None:
    def touch() -> None:
        torch.empty(1 << 26, dtype=torch.uint8).fill_(1)

    _, faults = timing.CpuClock().sample(touch, 1)
    _, none = timing.CpuClock().sample(lambda: None, 1)
    assert none <= 16 < faults


def test_cuda_clock_flushes_before_it_starts() -> None:
    """Order of what the GPU is asked to do, on a stand-in that records it."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, stop: Event) -> float:
            return 6.0

    class Scratch:
        def zero_(self) -> None:
            log.append("flush")

    cuda = type("Cuda", (), {"Event": Event})
    clock = timing.CudaClock(cuda, Scratch())
    assert clock.sample(lambda: log.append("call"), 3) == (0.002, None)
    assert log == ["flush", "record", "call", "call", "call", "record", "wait"]


def test_rotation_goes_round() -> None:
    seen: list[int] = []
    run = timing.rotate([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(6):
        run()
    assert sorted(seen[:3]) == [0, 1, 2] and seen[:3] == seen[3:]


def test_calls_take_turns_on_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: every copy of the inputs is called, none twice in a row."""
    monkeypatch.setattr(contenders, "copies_for", lambda device: 3)
    work = build(small("gelu_layernorm"))
    seen: list[int] = []

    class Spy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.data_ptr())
            return x

    call = worker._call(contenders.run_torch(work, "nhwc", Spy()), work.cell)
    for _ in range(6):
        call()
    assert len(set(seen[:3])) == 3 and seen[:3] == seen[3:]


def test_memory_of_a_call() -> None:
    linear = torch.nn.Linear(64, 64)
    x = torch.randn(1024, 64, requires_grad=True)
    # The weight does not count, x does; backward of a GELU keeps its input as well.
    assert memory.kept_for_backward(linear, lambda: linear(x)) == x.nbytes
    kept = memory.kept_for_backward(linear, lambda: torch.nn.functional.gelu(linear(x)))
    assert kept == 2 * x.nbytes
    peak = memory.peak_allocated(lambda: torch.zeros(1 << 20) + 1, "cpu")
    assert peak is not None and 8 << 20 <= peak < 9 << 20
    resident = memory.peak_resident(lambda: torch.ones(1 << 24))
    assert resident is None or resident >= 60 << 20


def test_limits_and_floor() -> None:
    found = limits.measure()
    assert 1e9 < found.float32_flops < 1e13
    assert 1e7 < found.gelus < 1e12
    sizes = [size for size, _ in found.bandwidths]
    assert sizes == sorted(sizes) and len(sizes) == 4
    assert found.bandwidth(1) > found.bandwidth(1e9) > 1e8
    cost = build(Cell("gelu_layernorm", 4, 1)).cost
    assert cost is not None
    toy = limits.Limits(1e11, 2e11, 1e9, ((1 << 40, 1e9),))
    elements = 49 * 4608
    assert floors.cpu_floor(cost, toy, "infer", False, 1) == pytest.approx(8 * elements / 1e9)
    quick = dataclasses.replace(toy, bandwidths=((1 << 40, 1e15),))
    assert floors.cpu_floor(cost, quick, "infer", False, 1) == pytest.approx(elements / 1e9)
    assert floors.cpu_floor(cost, quick, "train", False, 2) == pytest.approx(1.5 * elements / 1e9)


# ---- results ----


def a_record(cell: Cell, **medians: float) -> dict[str, Any]:
    found = {
        name.replace("_", "-"): {
            "median": m, "p20": 0.98 * m, "p80": 1.02 * m, "samples": [m], "page_faults": 0
        }
        for name, m in medians.items()
    }  # fmt: skip
    return {"cell": dataclasses.asdict(cell), "contenders": found, "floor": 0.5, "cost": None}


def test_store_goes_on(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for batch in (1, 8):
        cell = small("block", batch=batch)
        store.add(cell, a_record(cell, cpu=1.0, eager_nhwc=2.0))
    found = Store(tmp_path).read()["records"]
    assert len(found) == 2 and json.loads((tmp_path / "results.json").read_text())
    assert report.speed_up(found[cell.key], "cpu") == 2.0


def test_compare_reports_what_moved() -> None:
    cell = small("block")
    old = {"records": {cell.key: a_record(cell, cpu=1.0, eager_nhwc=2.0)}}
    slower_day = {"records": {cell.key: a_record(cell, cpu=3.0, eager_nhwc=6.1)}}
    worse = {"records": {cell.key: a_record(cell, cpu=1.3, eager_nhwc=2.0)}}
    assert compare.changes(old, slower_day) == []
    (line,) = compare.changes(old, worse)
    assert line.startswith("cpu SLOWER: 2.00× to 1.54×")


def test_report_and_plots(tmp_path: Path) -> None:
    records = {}
    for stage in (1, 2):
        cell = small("block", "train", stage=stage)
        records[cell.key] = a_record(cell, cpu=1.0, eager_nhwc=2.0, compile_nchw=0.8)
        records[cell.key]["contenders"]["cpu"]["kept_for_backward"] = 10**6
        records[cell.key]["contenders"]["openvino"] = {"skipped": "it does not train"}
    store = Store(tmp_path)
    store.update(lambda results: results["records"].update(records))
    results = store.read()
    text = report.markdown(results)
    assert "| cpu | 1e+03 | 980 to 1.02e+03 | 2.00× | 50% | 1.0 |" in text
    assert "- openvino skipped: it does not train" in text
    assert "Predicted, not measured" in text
    assert report.best_peer(records[cell.key]) == "compile-nchw"
    pytest.importorskip("matplotlib")
    from bench import plots

    names = {path.name for path in plots.draw_all(results, tmp_path)}
    assert names == {"speedup.png", "memory.png"}


def test_readme_is_made_from_the_results() -> None:
    text = readme.README.read_text()
    assert text == readme.replaced(text, readme.section()), "run python -m bench.readme"


def test_readme_says_where_we_lose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("block", 1, 8)
    store = Store(tmp_path / "bench" / "results" / "here")
    store.add(cell, a_record(cell, cpu=1.0, eager_nhwc=2.0, openvino=0.8))
    machine = {"processor": "P", "family": "F", "versions": {"torch": "T"}}
    store.update(lambda results: results.__setitem__("machine", machine))
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "RESULTS", tmp_path / "bench" / "results")
    made = readme.section()
    assert "- block (stage 1, batch 8, float32, infer): 0.80 times openvino's speed" in made
    assert "**0.80**" in made and "1 of 1 cells:" in made


# ---- the commands ----


def test_command_without_a_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _bench.run_suite([], tmp_path) == 2
    assert "clone the repository" in capsys.readouterr().err


@needs_core
def test_command_end_to_end(tmp_path: Path) -> None:
    """`python -m convnest_kernels bench` measures in processes of its own and goes on after."""
    arguments = (
        "bench --op nested_conv --stage 2 --variant convnest_atto --image-size 64 --batch 1 "
        "--allocator default tuned --peers cpu eager-nhwc --budget 0.1 "
        f"--device cpu --markdown --out {tmp_path}"
    )
    command = [sys.executable, "-m", "convnest_kernels", *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=readme.ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| cpu |") == 2
    results = Store(tmp_path).read()
    assert len(results["records"]) == 2 and results["limits"]["float32_flops"] > 0
    assert results["machine"]["processor"]
    again = subprocess.run(command, capture_output=True, text=True, cwd=readme.ROOT)
    assert again.returncode == 0 and "[1/2]" not in again.stderr
