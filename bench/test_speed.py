"""The cells as pytest-benchmark tests: `pytest bench/`, with what a time means in `extra_info`.

`--benchmark-autosave` and `--benchmark-compare` are pytest-benchmark's own and compare times; the
ratio to eager, which a slower day does not move, is compared by `--against FOLDER` (conftest.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import compare, contenders, machine, report
from bench.cells import OPERATORS, Cell, product
from bench.store import Store
from bench.worker import measure

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CELLS = product(
    ["block", *OPERATORS], [1, 4], [1], ["float32"], ["infer", "train"], device=DEVICE
)  # fmt: skip
PEERS = ["eager-nhwc"]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.key)
def test_speed(cell: Cell, benchmark: Any, request: pytest.FixtureRequest) -> None:
    ours = [n for n in contenders.default_for(DEVICE) if contenders.CONTENDERS[n].ours]
    record = measure(cell, [*ours, *PEERS], budget=2.0, limits=None, wanted=10)
    refused = {n: f["refused"] for n, f in record["contenders"].items() if "refused" in f}
    assert not refused
    name = report.ours(record) or pytest.skip(str(report.absent(record)))
    found = record["contenders"][name]
    benchmark.extra_info.update(
        {
            "bytes": record["cost"]["bytes"],
            "flops": record["cost"]["flops"],
            "device": machine.gpu()["gpu"] if DEVICE == "cuda" else machine.processor(),
            "backend": name,
            "ratio_to_eager": report.speed_up(record, name),
            "samples": found["samples"],
        }
    )
    call = contenders.CONTENDERS[name].prepare(_work(cell)).call
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
    if against := request.config.getoption("--against"):
        moved = compare.changes(Store(against).read(), {"records": {cell.key: record}})
        assert not [line for line in moved if "SLOWER" in line]


def _work(cell: Cell) -> Any:
    from bench.work import build

    return build(cell)
