"""Results: kept, compared, reported, and README made from them."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench import (
    compare,
    readme,
    report,
    timing,
)
from bench.cells import Cell
from bench.contenders import CONTENDERS
from bench.store import Store
from bench.worker import measure
from tests.bench_records import LIMITS, a_record, needs_core, small


def test_store_goes_on(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for batch in (1, 8):
        cell = small("block", batch=batch)
        store.add(cell, a_record(cell, cpu=1.0, eager_nhwc=2.0))
    found = Store(tmp_path).read()["records"]
    assert len(found) == 2 and json.loads((tmp_path / "results.json").read_text())
    assert report.speed_up(found[cell.key], "cpu") == 2.0


def test_keys_are_todays(tmp_path: Path) -> None:
    """A file of before a field was added goes on under the cells' present keys."""
    cell = small("block")
    record = a_record(cell, cpu=1.0, eager_nhwc=2.0)
    del record["cell"]["memory_format"]
    (tmp_path / "results.json").write_text(json.dumps({"records": {"an-older-key": record}}))
    assert list(Store(tmp_path).read()["records"]) == [cell.key]


@needs_core
def test_compare_sees_a_planted_slowdown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured, not made up: a kernel that runs eight times for one is reported, and fails."""
    right = CONTENDERS["cpu"]
    cell = small("block", batch=4)

    class Clock:
        """Of this process: what other work a machine does shall not hide the fault."""

        def sample(self, call: Any, repeats: int) -> tuple[float, None]:
            start = time.process_time()
            for _ in range(repeats):
                call()
            return (time.process_time() - start) / repeats, None

    monkeypatch.setattr(timing, "CpuClock", Clock)

    def slow(work: Any) -> Any:
        prepared = right.prepare(work)
        return dataclasses.replace(prepared, call=lambda: [prepared.call() for _ in range(8)])

    for name, prepare in (("old", right.prepare), ("new", slow)):
        monkeypatch.setitem(CONTENDERS, "cpu", dataclasses.replace(right, prepare=prepare))
        Store(tmp_path / name).add(cell, measure(cell, ["cpu", "eager-nhwc"], 20.0, LIMITS))
    folders = [str(tmp_path / name) for name in ("old", "new")]
    monkeypatch.setattr(sys, "argv", ["compare", *folders])
    assert compare.main() == 1
    assert "cpu SLOWER" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["compare", folders[0], folders[0]])
    assert compare.main() == 0
    assert "nothing moved" in capsys.readouterr().out


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
    assert "| cpu | 1e+03 | 980 to 1.02e+03 | 1 | 2.00× | 50% | 1.0 |" in text
    assert "- openvino skipped: it does not train" in text
    assert "Predicted, not measured" not in text
    assert "Predicted, not measured" in report.with_predictions(results)
    assert report.best_peer(records[cell.key]) == "compile-nchw"
    pytest.importorskip("matplotlib")
    from bench import plots

    names = {path.name for path in plots.draw_all(results, tmp_path)}
    assert names == {"speedup.png", "memory.png"}


def test_readme_is_made_from_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """README's section and every results folder's page, to the letter."""
    monkeypatch.setattr(sys, "argv", ["readme", "--check"])
    assert readme.main() == 0, "run python -m bench.readme"


MACHINE = {"processor": "P", "family": "F", "versions": {"torch": "T"}}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a results folder of a pretended checkout, for `readme.section()`."""
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "RESULTS", tmp_path / "bench" / "results")

    def write(name: str, *records: dict[str, Any], taken: str = "1", **machine: str) -> None:
        store = Store(tmp_path / "bench" / "results" / name)
        store.update(lambda found: found.__setitem__("machine", {**MACHINE, **machine}))
        for record in records:
            store.add(Cell(**record["cell"]), {**record, "taken": taken})

    return write


def test_readme_says_where_we_lose(results: Any) -> None:
    """By the median, however wide the spread; closer than 3% is behind."""
    lost, near, won = (Cell("block", stage, 8) for stage in (1, 2, 3))
    wide = a_record(lost, cpu=1.0, eager_nhwc=2.0, openvino=0.92)
    wide["contenders"]["cpu"]["p20"] = 0.5
    results(
        "here",
        wide,
        a_record(near, cpu=1.0, eager_nhwc=2.0, openvino=0.98),
        a_record(won, cpu=1.0, eager_nhwc=2.0),
    )
    made = readme.section()
    assert (
        "- block (stage 1, infer, float32, batch 8): 0.92 times openvino's speed, "
        "p20 to p80 overlap" in made
    )
    assert "**0.92** / **0.98** / 2.00" in made and "1 of 3 cells:" in made
    assert "Behind by less than 3%: block (stage 2" in made
    assert "infer, float32, batch 8 (1 samples)" in made  # fewer than wanted


def test_readme_says_what_is_missing(results: Any) -> None:
    good, wrong, late = (Cell("block", stage, 8) for stage in (1, 2, 3))
    refused = a_record(wrong, eager_nhwc=2.0)
    refused["contenders"]["cpu"] = {"refused": "output is off by 2"}
    failed = {"cell": dataclasses.asdict(late), "contenders": {}, "failed": "took over 9 s"}
    results("here", a_record(good, cpu=1.0, eager_nhwc=2.0), refused, failed)
    made = readme.section()
    assert "Not measured: " in made
    assert "stage 2" in made and "cpu refused: output is off by 2" in made
    assert "cell failed: took over 9 s" in made


def test_readme_shows_the_newest_machine(results: Any) -> None:
    """One folder in full, others in a line each, with what a second thread gives."""
    one, two = (Cell("block", 1, 8, threads=t) for t in (1, 2))
    batch = dataclasses.replace(one, batch=1)
    old = [a_record(one, cpu=1.0, eager_nhwc=3.0), a_record(batch, cpu=1.0, eager_nhwc=0.5)]
    results("old", *old, taken="1", processor="Old")
    new = [a_record(cell, cpu=1.0, eager_nhwc=2.0) for cell in (one, batch)]
    new = [a_record(cell, cpu=1.0, eager_nhwc=2.0) for cell in (one, batch)]
    results("new-1t", *new, taken="2 08:00")
    results("new-2t", a_record(two, cpu=0.5, eager_nhwc=1.5), taken="2 09:00")
    later = dataclasses.replace(batch, threads=2)
    results("new-2t", a_record(later, cpu=0.1, eager_nhwc=0.3), taken="3 08:00")
    made = readme.section()
    assert made.count("One block of ConvNeSt-T") == 1
    assert made.index("**P (F)**, 1 thread") < made.index("Other results:")
    assert "- [P (F), 2 threads](bench/results/new-2t/README.md), torch T, 2 cells: 3.00" in made
    same_day = "2.00 times as fast as with one thread on the same day (2.00 to 2.00, 1 cells)"
    assert f"{same_day}; we lose none." in made
    assert "- [Old (F), 1 thread](bench/results/old/README.md)" in made
    assert (
        "we lose 1: block (stage 1, infer, float32, batch 1): 0.50 times eager-nhwc's speed."
        in made
    )
