"""The table of cells, and the plan of a run."""

from __future__ import annotations

from typing import Any

import pytest

from bench import (
    cells,
    contenders,
    plan,
    report,
)
from bench.cases import BATCHES, DTYPES, MEMORY_FORMATS, VARIANTS, stage_cases, stages
from bench.cells import SUBJECTS, Cell
from bench.work import build
from tests.bench_records import SMALL


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


def test_every_case_has_a_cell() -> None:
    """Stages of every variant, batches 1 to 256, dtypes and memory formats, each with a key."""
    found = cells.product(
        SUBJECTS, None, BATCHES, DTYPES, cells.MODES, variants=VARIANTS,
        memory_formats=MEMORY_FORMATS,
    )  # fmt: skip
    numbers = sum(len(stages(variant)) for variant in VARIANTS)
    each = len(BATCHES) * len(DTYPES) * len(MEMORY_FORMATS)
    blocks_and_operators, networks = 2 * (len(SUBJECTS) - 2) * numbers, 2 * len(VARIANTS)
    assert len(found) == each * (blocks_and_operators + networks)
    assert len({cell.key for cell in found}) == len(found)
    assert (BATCHES[0], BATCHES[-1], numbers) == (1, 256, 7 * 4 + 7)


def test_stages_that_a_variant_lacks_are_left_out() -> None:
    common = [1], ["float32"], ["infer"]
    variants = ["convnest_tiny", "convnest_iso_tiny"]
    found = cells.product(["block"], [1, 4], *common, variants=variants)
    assert [(c.variant, c.stage) for c in found] == [
        ("convnest_tiny", 1), ("convnest_tiny", 4), ("convnest_iso_tiny", 1)
    ]  # fmt: skip
    with pytest.raises(ValueError, match="stage must be one of 1, got 4"):
        cells.product(["block"], [4], *common, variants=variants[1:])


@pytest.mark.parametrize(("device", "threads"), [("cpu", 1), ("cpu", 2), ("cuda", 1)])
def test_full_set(device: str, threads: int) -> None:
    """No cell twice, and every peer takes part or is left out with a reason."""
    planned = plan.full(device, threads, None, 10.0)
    keys = [p.cell.key for p in planned]
    assert len(set(keys)) == len(keys) > 15
    for p in planned:
        assert p.cell.threads == threads and p.cell.device == device
        assert not set(p.peers) & set(p.left_out)
        assert all(len(reason) > 10 for reason in p.left_out.values())
        slow = [plan.AUTOTUNE]
        here = {n for n in contenders.default_for(device) + slow if plan._takes_part(n, p.cell)}
        assert here == {*p.peers, *p.left_out} & here
        assert report.REFERENCE in p.peers
    named = plan.full(device, threads, ["cpu"], 10.0)
    assert [p.cell for p in named] == [p.cell for p in planned]
    assert all(p.peers == ["cpu"] and not p.left_out for p in named)


def test_full_sets_are_whole() -> None:
    """What one thread's set promises: blocks at three batches, both modes and dtypes; networks."""
    one = {p.cell for p in plan.full("cpu", 1, None, 10.0)}
    blocks = cells.product(["block"], None, [1, 8, 32], ["float32", "bfloat16"], cells.MODES)
    networks = [Cell("model", 0, 1), Cell("model", 0, 8), Cell("training", 0, 8, mode="train")]
    assert one >= {*blocks, *networks}
    assert {c.subject for c in one} == set(SUBJECTS)
    assert {c.allocator for c in one} == set(cells.ALLOCATORS)
    assert {c.memory_format for c in one} == set(MEMORY_FORMATS)
    two = {p.cell for p in plan.full("cpu", 2, None, 10.0)}
    assert two >= set(cells.product(["block"], None, [1, 8], ["float32"], cells.MODES, threads=2))


def test_expected_time() -> None:
    """More of anything takes longer; a filled compiler's cache takes less."""
    small_one, large = (plan.chosen([Cell("block", 1, b)], None, 10.0)[0] for b in (1, 32))
    few = plan.chosen([Cell("block", 1, 32)], ["cpu", "eager-nhwc"], 10.0)[0]
    train = plan.chosen([Cell("block", 1, 32, mode="train")], ["cpu", "eager-nhwc"], 10.0)[0]
    seconds = [plan.expected_seconds(p, True) for p in (small_one, large, few, train)]
    assert seconds[0] < seconds[1] > seconds[2] < seconds[3]
    assert plan.expected_seconds(large, False) > seconds[1]
    gpu = [plan.expected_seconds(p, False) for p in plan.full("cuda", 1, None, 10.0)]
    assert sum(gpu) < 15 * 60


def test_cost_of_a_block_is_the_papers() -> None:
    """4·P·C·D for the linears; taps in the padding left out; two GELUs."""
    cost = build(Cell("block", 4, 1)).cost
    assert cost is not None
    assert cost.linear_flops == 4 * 49 * 384 * 4608
    assert cost.conv_flops == 2 * 4608 * 37 * 37  # 4+5+6+7+6+5+4 taps a row
    assert cost.gelus == 2 * 49 * 4608
    assert cost.of("train")["flops"] == 3 * cost.flops
