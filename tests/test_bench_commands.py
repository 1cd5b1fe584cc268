"""The benchmark commands, from end to end; on a GPU with a stand-in for it."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cells, cli, floors, limits, machine, plan, process, readme
from bench.cells import SUBJECTS, Cell
from bench.store import Store, cell_of
from bench.worker import measure
from convnest_kernels import _bench, reference
from tests.bench_records import LIMITS, a_record, needs_core


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    torch.set_num_threads(1)


SMALL_COMMAND = (
    "--op nested_conv --stage 2 --batch 1 --variant convnest_atto --image-size 64 --device cpu"
)


def in_this_process(_: Any, planned: Any, args: Any, found: Any, *__: Any) -> dict[str, Any]:
    return measure(planned.cell, planned.peers, 0.0, found, wanted=5)


@needs_core
@pytest.mark.parametrize("fault", ["kernel", "formula"])
def test_wrong_kernel_fails_the_command(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command exits with 1, and reports no time, where kernel and formula differ."""
    if fault == "kernel":
        kernel: Any = importlib.import_module("convnest_kernels.cpu.nested_conv")
        right = kernel.forward

        def wrong(*args: Any) -> Any:
            v, *others = right(*args)
            v[..., -1] *= 1.01
            return v, *others

        monkeypatch.setattr(kernel, "forward", wrong)
    else:
        formula = reference.nested_conv
        monkeypatch.setattr(reference, "nested_conv", lambda *a, **k: 1.01 * formula(*a, **k))
    monkeypatch.setattr(cli, "_measure", in_this_process)
    monkeypatch.setattr(limits, "measure", lambda threads: limits.Limits(**LIMITS))
    options = ["--peers", "cpu", "eager-nhwc", "--out", str(tmp_path)]
    assert cli.main([*SMALL_COMMAND.split(), *options]) == 1
    assert "REFUSED" in capsys.readouterr().err
    (record,) = Store(tmp_path).read()["records"].values()
    assert "off by" in record["contenders"]["cpu"]["refused"]
    assert "median" not in record["contenders"]["cpu"]


def test_limits_are_measured_anew_with_the_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on keeps the folder's limits; one with --redo has limits of its own."""
    rates = iter((1e9, 2e9))
    monkeypatch.setattr(
        limits, "measure", lambda threads: limits.Limits(**{**LIMITS, "gelus": next(rates)})
    )
    given = []

    def stand_in(_: Any, planned: Any, args: Any, found: Any, deadline: float) -> dict[str, Any]:
        given.append(found["gelus"])
        return a_record(planned.cell, cpu=1.0, eager_nhwc=2.0)

    monkeypatch.setattr(cli, "_measure", stand_in)
    command = [*SMALL_COMMAND.split(), "--peers", "cpu", "--out", str(tmp_path)]
    for options in ([], ["--batch", "2"], ["--redo"]):
        assert cli.main([*command, *options]) == 0
    assert given == [1e9, 1e9, 2e9]
    assert Store(tmp_path).read()["limits"]["gelus"] == 2e9


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


@needs_core
def test_one_process_measures_cell_after_cell() -> None:
    """As on a GPU; one that ended, or took too long, is followed by another."""
    (cell,) = cells.product(
        ["nested_conv"], [2], [1], ["float32"], ["infer"], variants=["convnest_atto"], image_size=64
    )
    request = {"cell": dataclasses.asdict(cell), "peers": ["cpu", "eager-nhwc"], "budget": 0.1}
    request |= {
        "limits": None,
        "left_out": {"openvino": "not now"},
        "wanted": 5,
        "peer_seconds": 60,
    }
    environment = {**os.environ, "PYTHONPATH": str(readme.ROOT)}
    with process.measuring("cuda") as measure_one:
        assert isinstance(measure_one, process.Shared)
        for _ in range(2):
            record = measure_one(request, environment, 300)
            assert len(record["contenders"]["cpu"]["samples"]) == 5
            assert record["contenders"]["openvino"] == {"skipped": "not now"}
            first = measure_one.process
        with pytest.raises(process.EndedError, match="ended with 1"):
            measure_one({"cell": {}}, environment, 300)
        with pytest.raises(subprocess.TimeoutExpired):
            measure_one(request, environment, 0.1)
        assert measure_one(request, environment, 300)["contenders"]["cpu"]["median"] > 0
        assert measure_one.process is not first


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends a process with its parent")
def test_a_process_ends_with_its_parent() -> None:
    """A run that is killed leaves none that goes on compiling beside the next one's cells."""
    busy = (
        "import time; from bench.process import end_with_parent; end_with_parent(); "
        "print('ready', flush=True); time.sleep(600)"
    )
    program = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {busy!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(readme.ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        child = Path("/proc") / parent.stdout.readline().strip() / "stat"
        assert is_alive(child)
        parent.kill()
    deadline = time.monotonic() + 60
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_alive(child)


def is_alive(stat: Path) -> bool:
    """Of a process by its file in /proc: it exists, and is more than what nobody has asked for."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_plan_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What would run, and how long; what the folder has is not repeated unless asked."""
    options = ["--peers", "cpu", "--out", str(tmp_path), "--plan"]
    assert cli.main([*SMALL_COMMAND.split(), *options]) == 0
    assert "1 of 1 cells are to be taken" in capsys.readouterr().out
    (cell,) = cells.product(
        ["nested_conv"], [2], [1], ["float32"], ["infer"], variants=["convnest_atto"], image_size=64
    )
    Store(tmp_path).add(cell, a_record(cell, cpu=1.0, eager_nhwc=2.0))
    assert cli.main([*SMALL_COMMAND.split(), *options]) == 0
    assert "0 of 1 cells are to be taken" in capsys.readouterr().out
    assert cli.main([*SMALL_COMMAND.split(), *options, "--redo"]) == 0
    assert "1 of 1 cells are to be taken" in capsys.readouterr().out


def test_threads_have_a_core_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two threads on one core would be compared with the limits of two."""
    monkeypatch.setattr(machine, "usable_cores", lambda: 1)
    options = ["--threads", "2", "--out", str(tmp_path)]
    assert cli.main([*SMALL_COMMAND.split(), *options]) == 2
    assert "--threads must be 1 to 1, got 2: this process may use 1 core" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A GPU that cli.py sees, and a clock that cells move on by what plan.py expects of them."""
    state: dict[str, Any] = {"now": 0.0, "slowness": 1.0, "order": []}
    found = {"gpu": "Pretended GPU", "capability": "9.0", "nvidia-smi": {"driver_version": "1"}}
    rates = {"copy": 3e12, "float32": 6e13, "bfloat16": 8e14, "float16": 8e14}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Pretended GPU")
    monkeypatch.setattr(machine, "gpu", lambda: found)
    monkeypatch.setattr(floors, "gpu_limits", lambda: rates)
    monkeypatch.setattr(time, "monotonic", lambda: state["now"])

    def run(command: list[str], timeout: float | None = None, **_: Any) -> Any:
        if "doctor" in command:
            assert timeout == 15 * 60
            state["order"].append("doctor")
            state["now"] += 60
            return subprocess.CompletedProcess(command, 0, json.dumps({"extension": {}}), "")
        return subprocess.CompletedProcess(command, 0, "commit", "")

    def measured(_: Any, request: dict[str, Any], __: Any, timeout: float) -> dict[str, Any]:
        cell = Cell(**request["cell"])
        assert request["limits"] == rates
        planned = plan.Planned(cell, request["peers"], request["budget"], request["left_out"])
        took = state["slowness"] * plan.expected_seconds(planned, prepared=False)
        state["now"] += min(took, timeout)
        if took > timeout:
            raise subprocess.TimeoutExpired(process.COMMAND, timeout)
        state["order"].append(cell.subject)
        record = a_record(cell, cuda=1.0, triton=1.2, eager_nhwc=3.0)
        record["contenders"]["cuda"]["kept_for_backward"] = 10**6
        return record

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(process.Shared, "__call__", measured)
    return state


@pytest.mark.parametrize("slowness", [1.0, 3.0])
def test_full_run_on_a_gpu(
    slowness: float, pretended_gpu: dict[str, Any], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Doctor, then all that 15 minutes allow, in one folder; the rest is listed, and comes next."""
    pretended_gpu["slowness"] = slowness
    folder = tmp_path / "results"
    assert cli.main(["--full", "--out", str(folder)]) == 0
    assert pretended_gpu["now"] <= 15 * 60
    taken, all_cells = Store(folder).read()["records"], plan.full("cuda", 1, None, 10.0)
    left = capsys.readouterr().err.count("not run, 15 minutes were up")
    assert left == len(all_cells) - len(taken) and (left > 0) == (slowness > 1)
    assert pretended_gpu["order"][0] == "doctor"
    files = {path.name for path in folder.iterdir()}
    assert files >= {"results.json", "README.md", "doctor.json"}
    if importlib.util.find_spec("matplotlib"):
        assert files >= {"speedup.png", "memory.png"}
    text = (folder / "README.md").read_text()
    assert "Machine: Pretended GPU" in text and "copy 3000 GB/s" in text
    assert "Predicted, not measured" not in text
    if slowness == 1:
        assert {cell.subject for cell in map(cell_of, taken.values())} == set(SUBJECTS)
    while left:  # a run goes on where the one before stopped
        pretended_gpu["now"] = 0.0
        assert cli.main(["--full", "--out", str(folder)]) == 0
        rest = capsys.readouterr().err.count("not run, 15 minutes were up")
        assert rest < left
        left = rest
    assert len(Store(folder).read()["records"]) == len(all_cells)
    assert pretended_gpu["order"].count("doctor") == 1


def test_time_is_up_within_a_cell(
    pretended_gpu: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cell is left for the next run, not recorded as failed."""
    pretended_gpu["slowness"] = 1e6
    options = ["--op", "block", "--stage", "1", "--minutes", "2", "--out", str(tmp_path)]
    assert cli.main(options) == 0
    assert pretended_gpu["now"] == 120
    assert Store(tmp_path).read()["records"] == {}
    assert "not run, 2 minutes were up: block" in capsys.readouterr().err
