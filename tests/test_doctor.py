"""`doctor`: what it reports, where things are missing, and that it catches a wrong kernel."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from convnest_kernels import _extension, backends
from convnest_kernels.__main__ import main
from convnest_kernels.doctor import cli, dispatch, selfcheck
from tests.training import one_thread

__all__ = ["one_thread"]  # a fixture for every test here

OPERATORS = ("nested_conv", "dwconv_gelu_layernorm", "gelu_layernorm", "layernorm_residual")
DTYPES = ("float32", "bfloat16", "float16", "float64")


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter, on for other tests, is not what a user's doctor checks."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def doctor(capsys: pytest.CaptureFixture[str], expected_code: int = 0) -> dict[str, Any]:
    assert main(["doctor", "--json"]) == expected_code
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def change_first(result: tuple[Tensor, ...], change: Callable[[Tensor], Tensor]) -> Any:
    return change(result[0]), *result[1:]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Fill the seat of the "cuda" backend with the eager formulas, changed by the caller."""

    def fill(operator: str | None = None, **changes: Callable[..., Any]) -> None:
        def stem(name: str, wanted: str) -> Any:
            package = "reference" if name in ("cuda", "eager") else name
            module = importlib.import_module(f"convnest_kernels.{package}.{wanted}")
            functions = {"forward": module.forward, "backward": module.backward}
            if name == "cuda" and wanted == operator:
                for direction, change in changes.items():
                    functions[direction] = _changed(functions[direction], change)
            return SimpleNamespace(**functions)

        backends.select.cache_clear()
        monkeypatch.setattr(backends, "_stem", stem)
        monkeypatch.setattr("convnest_kernels.cuda.reasons_against", lambda call: [])
        monkeypatch.setattr("convnest_kernels.triton.reasons_against", lambda call: ["not now"])
        monkeypatch.setattr(_extension, "error", "not now")

    return fill


def _changed(function: Callable[..., Any], change: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: change(function(*args))


def failures(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [check for check in report["checks"] if not check["ok"]]


def test_report_has_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    report = doctor(capsys)
    assert report["ok"] is True
    assert [*report] == [
        "versions", "extension", "processor", "gpus", "dispatch", "checks", "ok", "seconds",
    ]  # fmt: skip
    assert report["versions"]["torch"] == torch.__version__
    assert report["processor"]["logical_cores"] == os.cpu_count()
    assert report["processor"]["threads"] >= 1
    assert report["extension"]["built"] is (_extension.module is not None)
    on_cpu = [entry for entry in report["dispatch"] if entry["device"] == "cpu"]
    calls = [(entry["operator"], entry["dtype"]) for entry in on_cpu]
    assert calls == [(operator, dtype) for operator in OPERATORS for dtype in DTYPES]
    for entry in on_cpu:
        assert entry["backend"] in backends.BACKENDS
        assert entry["reasons"][entry["backend"]] == []
        assert [*entry["reasons"]] == [*backends.BACKENDS]
    assert report["seconds"] < 10


def test_text_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    report = doctor(capsys)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for section in cli.SECTIONS:
        assert f"{section.title}\n" in text
    assert torch.__version__ in text
    assert report["processor"]["model"] in text
    for entry in report["dispatch"]:
        for name, reasons in entry["reasons"].items():
            for reason in reasons:
                assert text.count(f"not {name}: {reason}") == 1
    assert f"All {len(report['checks'])} checks passed" in text


@pytest.mark.skipif(_extension.module is None, reason="needs the native module")
def test_every_instruction_set_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    core: Any = _extension.module
    report = doctor(capsys)
    on_cpu = {
        (check["isa"], check["operator"], check["dtype"])
        for check in report["checks"]
        if check["backend"] == "cpu"
    }
    assert on_cpu == {(i, o, d) for i in core.cpu.isas() for o in OPERATORS for d in DTYPES}
    assert core.cpu.isa() == report["processor"]["isa"]
    assert report["extension"]["isas"]
    assert report["extension"]["compiler"]


@pytest.mark.skipif(_extension.module is None, reason="needs the native module")
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_wrong_native_kernel_fails(
    operator: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"convnest_kernels.cpu.{operator}")
    wrong = _changed(module.forward, lambda result: change_first(result, lambda y: y * 1.1))
    monkeypatch.setattr(module, "forward", wrong)
    report = doctor(capsys, expected_code=1)
    assert {(check["backend"], check["operator"]) for check in failures(report)} == {
        ("cpu", operator)
    }
    assert {check["dtype"] for check in failures(report)} == set(DTYPES)


def test_a_right_kernel_passes_on_any_backend(
    plant: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    plant()
    report = doctor(capsys)
    assert {check["backend"] for check in report["checks"]} == {"cuda"}
    assert len(report["checks"]) == len(selfcheck.CASES) * len(DTYPES)
    assert {entry["backend"] for entry in report["dispatch"]} == {"cuda"}


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_wrong_output_fails(
    operator: str, plant: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    plant(operator, forward=lambda result: change_first(result, lambda y: y + 0.1 * y.abs()))
    found = failures(doctor(capsys, expected_code=1))
    assert {check["operator"] for check in found} == {operator}
    assert {check["quantity"] for check in found} == {"output"}
    assert {check["dtype"] for check in found} == set(DTYPES)


@pytest.mark.parametrize("index", range(5))
def test_a_wrong_gradient_fails(
    index: int, plant: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def double(grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return *grads[:index], 2 * grads[index], *grads[index + 1 :]

    plant("nested_conv", backward=double)
    found = failures(doctor(capsys, expected_code=1))
    names = ("dh", "dconv_weight", "dconv_bias", "dln_weight", "dln_bias")
    assert {check["quantity"] for check in found} == {names[index]}
    assert {check["dtype"] for check in found} == set(DTYPES)


def test_a_nan_fails_and_is_valid_json(
    plant: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    plant("gelu_layernorm", forward=lambda result: change_first(result, lambda y: y / 0 * 0))
    found = failures(doctor(capsys, expected_code=1))
    assert {check["message"] for check in found} == {"output has non-finite elements"}
    assert {check["error"] for check in found} == {None}
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "FAILED: cuda gelu_layernorm, float32: output has non-finite elements" in text
    assert "8 of 32 checks failed" in text


def test_a_kernel_that_raises_is_a_finding(
    plant: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(result: object) -> None:
        raise RuntimeError("no such kernel image")

    plant("layernorm_residual", forward=refuse)
    found = failures(doctor(capsys, expected_code=1))
    assert {check["message"] for check in found} == {"RuntimeError: no such kernel image"}
    assert len(found) == len(DTYPES)


def test_works_without_the_native_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backends.select.cache_clear()
    monkeypatch.setattr(_extension, "module", None)
    monkeypatch.setattr(_extension, "error", "the native module could not be imported (why)")
    report = doctor(capsys)
    assert report["extension"] == {"built": False, "error": _extension.error}
    assert report["processor"]["isa"] is None
    assert {e["backend"] for e in report["dispatch"] if e["device"] == "cpu"} == {"eager"}
    assert not [check for check in report["checks"] if check["backend"] == "cpu"]
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "not there: the native module could not be imported (why)" in text
    assert "not cpu: the native module could not be imported (why)" in text


def test_works_without_triton(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    report = doctor(capsys)
    assert report["versions"]["triton"] is None
    assert report["versions"]["triton_error"]
    assert main(["doctor"]) == 0
    assert "triton none (" in capsys.readouterr().out


def test_a_wrong_variable_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends, "_requested", "gpu")
    report = doctor(capsys, expected_code=1)
    assert report["ok"] is False
    assert "CONVNEST_BACKEND must be one of" in report["versions"]["problems"][0]
    assert main(["doctor"]) == 1
    assert "PROBLEM: CONVNEST_BACKEND must be one of" in capsys.readouterr().out


def test_reasons_that_hold_for_some_calls_name_them() -> None:
    found = dispatch.collect()
    for entry in found:
        entry["reasons"] = {name: [] for name in backends.BACKENDS}
    found[1] = {**found[1], "reasons": {**found[1]["reasons"], "triton": ["too new"]}}
    lines = dispatch.show(found)
    assert "  not triton: too new [nested_conv bfloat16]" in lines


def test_runs_as_a_command() -> None:
    command = [sys.executable, "-m", "convnest_kernels", "doctor"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "checks passed" in done.stdout
    assert done.stderr == ""


def kernels(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["doctor", "--kernels", "--json", *arguments]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


@pytest.mark.parametrize("name", ["sm_80", "90", "sm_100", "sm_120", "gfx942"])
def test_kernels_lists_the_compile_report(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = kernels(capsys, "--arch", name)
    assert report["arch"].removeprefix("sm_") == name.removeprefix("sm_")
    assert len(report["kernels"]) > 400 and not report["faults"]
    assert {entry["arch"] for entry in report["kernels"]} == {name.removeprefix("sm_")}
    assert main(["doctor", "--kernels", "--arch", name]) == 0
    first, header, *lines = capsys.readouterr().out.splitlines()
    assert f"{len(report['kernels'])} kernels" in first and "Triton" in first
    assert header.split()[:4] == ["kernel", "dtype", "tiles", "registers"]
    named = {(entry["kernel"], entry["dtype"]) for entry in report["kernels"]}
    assert {tuple(line.split()[:2]) for line in lines} == named


def test_kernels_of_the_gpu_that_is_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    h100 = SimpleNamespace(major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: h100)
    assert kernels(capsys)["arch"] == "sm_90"
    h100.major = 7
    assert main(["doctor", "--kernels"]) == 2
    assert "must be one of sm_80, sm_90" in capsys.readouterr().err


def test_kernels_without_a_gpu_asks_for_a_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["doctor", "--kernels"]) == 2
    assert "this machine has no GPU: name one with --arch, of sm_80" in capsys.readouterr().err
    assert main(["doctor", "--kernels", "--arch", "sm_75"]) == 2
    assert "got sm_75" in capsys.readouterr().err
    assert main(["doctor", "--arch", "sm_90"]) == 2
    assert "--arch goes with --kernels" in capsys.readouterr().err


def test_kernels_over_budget_are_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from convnest_kernels.triton import aot_table

    first, *others = [row for row in aot_table.read() if row.arch == "90"]
    spilling = [replace(first, spills=8), *others]
    monkeypatch.setattr(aot_table, "read", lambda: spilling)
    assert main(["doctor", "--kernels", "--arch", "90"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("OVER BUDGET:")] == [
        f"OVER BUDGET: {first.kernel} {first.dtype} ({first.tile}) spills 8 bytes"
    ]


def test_triton_is_checked_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch sees a GPU, every operator and dtype of the backend goes through the check."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(selfcheck, "_truth", lambda *call: ({}, {}))
    monkeypatch.setattr(
        selfcheck,
        "_check",
        lambda case, backend, dtype, device, *_: {"call": (case.operator, dtype, device)},
    )
    backends.select.cache_clear()
    found = selfcheck.collect()
    calls = {entry["call"] for entry in found if entry["backend"] == "triton"}
    low = (torch.float32, torch.bfloat16, torch.float16)
    assert calls == {(operator, dtype, "cuda") for operator in OPERATORS for dtype in low}


def test_what_was_not_checked_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert selfcheck.show([])[-1] == (
        "NOT CHECKED: cuda, triton, cpu (there is no GPU here; see above)"
    )
