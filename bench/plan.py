"""What a run takes: cells in order, their peers, seconds of timing, and how long it may last.

`full` is the set whose results are committed, what matters most first: time may run out. A folder
may have other cells too; its page names the commands. A peer that `full` leaves out of a cell is in
that cell's record as skipped, with the reason given here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from bench import contenders
from bench.block import block_cost
from bench.cells import BLOCKS, MODES, NETWORKS, OPERATORS, Cell, product
from bench.model import network_cost
from bench.timing import MIN_SAMPLES, WANTED_SAMPLES
from bench.work import CHECKED_IMAGES, CHECKED_IN_NETWORKS

AUTOTUNE = "compile-max-autotune"


@dataclass(frozen=True)
class Planned:
    """A cell, who takes part, who does not and why, and seconds of timing."""

    cell: Cell
    peers: list[str]
    budget: float
    left_out: dict[str, str] = field(default_factory=dict)


def chosen(cells: Iterable[Cell], peers: list[str] | None, budget: float) -> list[Planned]:
    """Cells that the caller named, with the peers named or all but the slow ones."""
    return [Planned(c, peers or contenders.default_for(c.device), budget) for c in cells]


def full(device: str, threads: int, peers: list[str] | None, budget: float) -> list[Planned]:
    """The committed set: of a GPU, of one CPU thread, or of several."""
    if device == "cuda":
        cells = _on_gpu(threads)
    else:
        cells = _on_one_thread() if threads == 1 else _on_threads(threads)
    return [_planned(cell, peers, budget) for cell in cells]


def _planned(cell: Cell, peers: list[str] | None, budget: float) -> Planned:
    if peers:
        return Planned(cell, peers, budget)
    left_out = _left_out_on_gpu(cell) if cell.device == "cuda" else _left_out_on_cpu(cell)
    everyone = [*contenders.default_for(cell.device), AUTOTUNE]
    taking_part = [n for n in everyone if n not in left_out and _takes_part(n, cell)]
    return Planned(cell, taking_part, _share(cell) * budget, left_out)


def _share(cell: Cell) -> float:
    """Of the budget: all their samples for the cells looked at first, few for the slowest."""
    if cell.device == "cuda" or cell.subject != "block" or cell.threads > 1:
        return 1.0
    if cell.batch == 8 and cell.dtype == "float32":
        return 4.0
    return 0.5 if cell.batch == 32 else 1.0


def _on_gpu(threads: int) -> list[Cell]:
    half, single = ["bfloat16"], ["float32"]
    # CUDA has its own allocator.
    common: dict[str, Any] = {"device": "cuda", "threads": threads, "allocators": ("default",)}
    return [
        *product(BLOCKS, None, [128], half, MODES, **common),
        *product(NETWORKS, None, [128], half, MODES, **common),
        *product(["nested_conv"], [1, 3], [128], half, MODES, **common),
        *product([*OPERATORS[1:], "convnext_half"], [1], [128], half, MODES, **common),
        *product(BLOCKS, [1, 3], [128], single, MODES, **common),
        *product(NETWORKS, None, [1], half, ["infer"], **common),
    ]


def _on_one_thread() -> list[Cell]:
    half, single, infer = ["bfloat16"], ["float32"], ["infer"]
    return [
        *product(BLOCKS, None, [8], single, MODES),
        *product(NETWORKS, None, [8], single, MODES),
        *product(NETWORKS, None, [1], single, infer),
        *product(BLOCKS, None, [8], half, MODES),
        *product(BLOCKS, None, [1], single, MODES),
        *product(["nested_conv"], None, [8], single, MODES),
        *product([*OPERATORS[1:], "convnext_half"], [1, 3], [8], single, MODES),
        *product(BLOCKS, None, [1], half, MODES),
        *product(BLOCKS, [1], [8], single, MODES, ["default"]),
        *product(BLOCKS, None, [32], single, infer),
        *product(BLOCKS, [1], [8], single, MODES, memory_formats=["contiguous"]),
        *product(BLOCKS, None, [32], half, infer),
        *product(BLOCKS, None, [32], single, ["train"]),
        *product(BLOCKS, None, [32], half, ["train"]),
    ]


def _on_threads(threads: int) -> list[Cell]:
    single, infer = ["float32"], ["infer"]
    return [
        *product(BLOCKS, None, [1, 8], single, MODES, threads=threads),
        *product(NETWORKS, None, [1, 8], single, infer, threads=threads),
    ]


def _left_out_on_cpu(cell: Cell) -> dict[str, str]:
    """Who would cost time and not be the best peer, by what was measured beside it."""
    left_out = {}
    if cell.subject == "training":
        slower = "slower than eager in training, 1.10 against 0.90 s at batch 1"
        left_out |= {"compile-nchw": slower, "convnext-compile": "as compile-nchw: eager is here"}
    first = cell.batch == 8 and cell.threads == 1 and cell.memory_format == "channels_last"
    first &= cell.subject == "block" and cell.allocator == "tuned"
    if not (first and cell.mode == "infer" and cell.stage in (1, 4)):
        left_out[AUTOTUNE] = (
            "taken for inference of the block at stages 1 and 4, batch 8: it times products for "
            "10 s a cell, and in float32 took the library's, as compile-nhwc does"
        )
    if not (first and cell.dtype == "float32"):
        left_out["compile-nhwc"] = "taken for the float32 block at batch 8; compile-nchw is here"
    if cell.batch == 32 or cell.subject in NETWORKS:
        left_out["eager-nchw"] = "taken for smaller work; eager-nhwc is here"
    if cell.batch == 32 and cell.mode == "train" and cell.stage <= 2:
        left_out["compile-nchw"] = "taken at batch 8, where it is slower than eager at this stage"
    return left_out


def _left_out_on_gpu(cell: Cell) -> dict[str, str]:
    left_out = {}
    first = cell.subject == "block" and cell.mode == "infer" and cell.dtype == "bfloat16"
    if not (first and cell.stage in (1, 3)):
        left_out[AUTOTUNE] = "taken for inference of the block at stages 1 and 3: it compiles long"
    if not first:
        left_out["compile-nchw"] = "taken for inference of the block; compile-nhwc is here"
    return left_out


# ---- how long it may last ----

# Seconds, on one busy core of a server or beside a GPU: to start a process and build its cell, and
# for each peer to compile, with its compiler's cache filled (--prepare) and without.
START = 6.0
FILLED = {AUTOTUNE: 12.0, "onnxruntime": 1.5, "openvino": 1.5, "zentorch": 2.0}
EMPTY = {**FILLED, "compile-nhwc": 12.0, "compile-nchw": 12.0, "convnext-compile": 30.0}
# FLOP/s that a contender reaches: ours, and others in inference and in training.
RATES = {"cpu": (60e9, 40e9, 20e9), "cuda": (100e12, 30e12, 20e12)}
DOUBLE = {"cpu": 6e9, "cuda": 5e11}  # FLOP/s of the float64 formula


def expected_seconds(planned: Planned, prepared: bool) -> float:
    """A rough guess, for planning; how long a cell took is in its record."""
    cell = planned.cell
    flops = _flops(cell)
    ours, infer, train = (
        flops / rate / (cell.threads if cell.device == "cpu" else 1) for rate in RATES[cell.device]
    )
    compiling = FILLED if prepared else EMPTY
    if cell.mode == "train":
        compiling = {k: v for k, v in compiling.items() if k.startswith(("compile", "convnext"))}
    others = [n for n in planned.peers if not contenders.CONTENDERS[n].ours]
    one_round = ours + len(others) * (train if cell.mode == "train" else infer)
    rounds = min(max(planned.budget / one_round, MIN_SAMPLES), WANTED_SAMPLES)
    most = CHECKED_IN_NETWORKS if cell.subject in NETWORKS else CHECKED_IMAGES
    check = flops * min(1, most / cell.batch) / DOUBLE[cell.device]
    preparing = sum(compiling.get(name, 0.0) for name in planned.peers)
    # Beside the samples: twice to check, once or twice to warm up, twice for memory.
    return START + check + preparing + (rounds + 5) * one_round


def _flops(cell: Cell) -> float:
    shape, times = cell.shape, 3 if cell.mode == "train" else 1
    if cell.subject in NETWORKS:
        return times * network_cost(cell).flops
    if cell.subject == "block":
        return times * block_cost(cell, shape.dim, shape.height, shape.width).flops
    wide = shape.dim if cell.subject == "layernorm_residual" else shape.wide
    return times * cell.batch * shape.height * shape.width * wide * 150  # taps, GELU and norm


def _takes_part(name: str, cell: Cell) -> bool:
    """Whether the cell is of a contender's kind at all; if not, a full run does not mention it."""
    if name.startswith("convnext"):
        return cell.subject in NETWORKS
    if name in ("timm-half", "large-kernel-extension"):
        return cell.subject == "convnext_half"
    if name in ("onnxruntime", "openvino", "zentorch"):
        return cell.mode == "infer" and (name != "onnxruntime" or cell.dtype == "float32")
    return True
