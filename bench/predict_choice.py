"""Predicted time of the CUDA backend against Triton's: what "auto" goes by.

    python -m bench.predict_choice                 # compiles, counts, and writes all three files
    python -m bench.predict_choice --count cuda    # counts one backend anew
    python -m bench.predict_choice --count         # none: the rule and the page alone

Both backends' kernels go through one model (predict.py): for each kernel the largest of the time
that memory takes for its bytes, of its issue slots and of each pipe, and for an operator the sum
over its kernels, forward and backward. What the kernels take per output is counted in their machine
code (choice_counts.py); how often that falls due is their own cut of the shape: canvas, tiles of
images, strips, padding. Halos' bytes, latency, barriers, occupancy and the last wave are left out,
on both sides.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import math
from pathlib import Path
from typing import Any

import torch

from bench import choice_model, predict
from bench.choice_model import COUNTS, KERNEL_SIZES, Call, Counts
from bench.predict import CHIPS, Chip
from convnest_kernels import backends
from convnest_kernels.cuda import choice

PAGE = Path(__file__).parent / "results" / "cuda_choice.md"


@functools.cache
def ratio(call: Call, chip: Chip, training: bool) -> float:
    """The CUDA backend's predicted time over Triton's: of forward, or of forward and backward."""
    directions = (False, True) if training else (False,)
    cuda = triton = 0.0
    for backward in directions:
        ours = choice_model.cuda_kernels(call, chip, backward, choice_model.path(call))
        cuda += choice_model.clocks(chip, ours, call.element)
        theirs = choice_model.triton_kernels(call, chip, backward)
        triton += choice_model.clocks(chip, theirs, call.element)
    return cuda / triton


def stage_calls() -> list[Call]:
    """What the rule is made from: ConvNeSt-T's four stages at batch 128."""
    calls = []
    for dtype in ("bf16", "fp32"):
        for _, size, channels in predict.STAGES:
            wide, narrow = (predict.BATCH, size, size, channels), channels // 12
            for operator in ("nested_conv", "dwconv_gelu_layernorm"):
                calls += [Call(operator, dtype, k, wide) for k in KERNEL_SIZES]
            calls.append(Call("gelu_layernorm", dtype, 0, wide))
            calls.append(Call("layernorm_residual", dtype, 0, (*wide[:3], narrow)))
    return calls


# A capability of each chip: the kernels of some are counted in another's machine code.
CAPABILITIES = {"A100": (8, 0), "H100": (9, 0), "H200": (9, 0), "B200": (10, 0), "RTX 4090": (8, 9)}


def case_of(call: Call, chip: Chip) -> choice.Case:
    """The row of the rule's table that a call falls into."""
    dtype = torch.bfloat16 if call.dtype == "bf16" else torch.float32
    asked = backends.Call(
        call.operator, "cuda", dtype, call.shape[-1], call.kernel_size or None, call.shape
    )
    return choice.case_of(asked, CAPABILITIES[chip.name])


def predictions() -> dict[choice.Case, list[float]]:
    """The ratios of a training step in each case, over stages and chips."""
    found: dict[choice.Case, list[float]] = collections.defaultdict(list)
    for call in stage_calls():
        for chip in CHIPS:
            found[case_of(call, chip)].append(ratio(call, chip, training=True))
    return found


def table() -> dict[choice.Case, float]:
    """The rule's table: the geometric mean of each case."""
    return {
        case: round(math.exp(sum(map(math.log, ratios)) / len(ratios)), 2)
        for case, ratios in predictions().items()
    }


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def kernel_of(operator: str, kernel_size: int) -> str:
    return f"{operator} {kernel_size}×{kernel_size}" if kernel_size else operator


def rule_table() -> str:
    ratios, means = predictions(), table()
    rows = []
    for case in means:
        if case.gpus == choice.GRAPHICS:
            continue
        cells = []
        for gpus in (choice.DATA_CENTRE, choice.GRAPHICS):
            here = case._replace(gpus=gpus)
            low, high = min(ratios[here]), max(ratios[here])
            mark = "**" if means[here] > 1 else ""
            cells.append(f"{mark}{means[here]:.2f}{mark} ({low:.2f} to {high:.2f})")
        maps = "small" if case.small_map else "larger" if case.bits == 16 else "all"
        name = kernel_of(case.operator, case.kernel_size)
        rows.append([name, str(case.bits), maps if case.kernel_size else "", *cells])
    rows.sort(key=lambda row: row[0].split()[0], reverse=True)
    return markdown(["operator", "bits", "maps", choice.DATA_CENTRE, choice.GRAPHICS], rows)


def chip_table() -> str:
    by_name: dict[tuple[str, str, int], list[Call]] = collections.defaultdict(list)
    for call in stage_calls():
        by_name[call.operator, call.dtype, call.kernel_size].append(call)
    rows = []
    for (operator, dtype, size), calls in sorted(by_name.items(), reverse=True):
        for chip in CHIPS:
            cells = [
                f"{ratio(call, chip, True):.2f} ({ratio(call, chip, False):.2f})" for call in calls
            ]
            rows.append([kernel_of(operator, size), dtype, chip.name, *cells])
    stages = [f"{name} {size}²" for name, size, _ in predict.STAGES]
    return markdown(["operator", "dtype", "chip", *stages], rows)


# Maps that the canvas packs well, those that it packs badly, and batches too small to be packed.
SHAPES = [
    *((128, size, size) for size in (56, 14, 9, 4, 2, 1)),
    *((128, 3, 100), (128, 9, 65), (16, 14, 14), (8, 14, 14)),
    *((1, 56, 56), (1, 14, 14), (1, 3, 100)),
]


def against_fma(call: Call, chip: Chip) -> float:
    """A step where the tensor cores run the convolutions, in units of the same on the FMA units."""

    def step(path: str) -> float:
        return sum(
            choice_model.clocks_of_a_grid(chip, kernel, call.element)
            for backward in (False, True)
            for kernel in choice_model.cuda_kernels(call, chip, backward, path)
        )

    return step(choice_model.path(call)) / step("FMA")


def fma_table() -> str:
    rows = []
    for operator in ("nested_conv", "dwconv_gelu_layernorm"):
        for size in (3, 5, 7, 9):
            cells = []
            for shape in SHAPES:
                call = Call(operator, "bf16", size, (*shape, predict.STAGES[0][2]))
                ratios = [against_fma(call, chip) for chip in CHIPS]
                cells.append(f"{max(ratios[:-1]):.2f} ({ratios[-1]:.2f})")
            rows.append([kernel_of(operator, size), *cells])
    shapes = ["×".join(map(str, shape)) for shape in SHAPES]
    return markdown(["operator, bf16", *shapes], rows)


def page() -> str:
    """The text of bench/results/cuda_choice.md."""
    return f"""# Predicted time of the CUDA backend, Triton's being 1

Made by `python -m bench.predict_choice` from instructions counted in both backends' machine code
(`cuda_choice.json`); predictions, nothing here was run on a GPU. The model, and what it leaves out:
the tool's head. ConvNeSt-T's stages at batch {predict.BATCH}; fp16 takes the same kernels as bf16.

## The rule of "auto"

Geometric mean over chips and stages of a training step (forward and backward), and its range.
Where the mean is above 1 (bold), "auto" leaves the call to Triton. {choice.DATA_CENTRE}: compute
capability 8.0, 9.0, 10.x, by A100, H100, H200 and B200; {choice.GRAPHICS}: all others, by the RTX
4090. Small maps: where the image is the tile.

{rule_table()}
## Chip by chip

A training step (in brackets: forward alone).

{chip_table()}
## The tensor cores against the FMA units

A training step in bf16 with {predict.STAGES[0][2]} channels, of N×H×W, where the tensor cores run
the convolutions (on the canvas, or where the image is the tile), the same on the FMA units being 1:
the worst of the data-centre chips, and the RTX 4090 in brackets. Here a grid that leaves SMs idle
takes as long as the SM with the most blocks. The FMA kernels of 3×3 to 9×9 in 16 bits are compiled
for this table alone.

{fma_table()}"""


def count(backend: str) -> dict[str, dict[str, Counts]]:
    """Compile and count a backend's kernels, by architecture."""
    from bench import choice_counts

    counted = {"cuda": choice_counts.cuda_counts, "triton": choice_counts.triton_counts}[backend]
    return {arch: rounded(counted(arch)) for arch in sorted({chip.arch for chip in CHIPS})}


def rounded(counts: Any) -> Any:
    """Six digits are plenty."""
    if isinstance(counts, dict):
        return {name: rounded(value) for name, value in counts.items()}
    return float(f"{counts:.6g}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    backends_of = ("cuda", "triton")
    parser.add_argument("--count", nargs="*", default=backends_of, choices=backends_of)
    found = choice_model.counts_on_file() if COUNTS.exists() else {}
    for backend in parser.parse_args().count:
        found[backend] = count(backend)
        COUNTS.write_text(json.dumps(found, indent=0) + "\n")
    choice.write(table())
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
