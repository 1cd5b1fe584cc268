"""Predicted time of the CUDA backend against Triton's: what "auto" goes by.

    python -m bench.predict_choice           # compiles, counts, and writes all three files
    python -m bench.predict_choice --page    # counts nothing: the rule and the page alone

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
import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import predict, predict_backward
from bench.predict import CHIPS, Chip
from convnest_kernels import backends
from convnest_kernels.cuda import choice
from convnest_kernels.triton import heuristics

RESULTS = Path(__file__).parent / "results"
COUNTS, PAGE = RESULTS / "cuda_choice.json", RESULTS / "cuda_choice.md"

KERNEL_SIZES = (3, 5, 7, 9, 11, 13)

Counts = dict[str, float]
Shape = tuple[int, int, int, int]  # N, H, W, C


class Call(NamedTuple):
    """A call to be predicted; `dtype` is "bf16" (fp16 takes the same kernels) or "fp32"."""

    operator: str
    dtype: str
    kernel_size: int  # 0 of operators over rows
    shape: Shape

    @property
    def element(self) -> int:
        return 2 if self.dtype == "bf16" else 4

    @property
    def name(self) -> str:
        return "BFloat16" if self.dtype == "bf16" else "Float32"

    @property
    def outputs(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch: what a warp issues per output by pipe, and the wide tensors that it moves."""

    name: str
    counts: Counts
    passes: float


@functools.cache
def counts_on_file() -> dict[str, dict[str, dict[str, Counts]]]:
    """By backend, architecture and kernel."""
    return json.loads(COUNTS.read_text())


def scaled(*parts: tuple[Counts, float]) -> Counts:
    total: dict[str, float] = collections.defaultdict(float)
    for counts, factor in parts:
        for pipe, n in counts.items():
            total[pipe] += n * factor
    return dict(total)


def terms(chip: Chip, kernel: Kernel, element: int) -> dict[str, float]:
    """Clocks per output and SM, by what they are spent on."""
    of = collections.defaultdict(float, kernel.counts)
    issued = sum(n for pipe, n in kernel.counts.items() if pipe != "wavefronts")
    return {
        "memory": kernel.passes * element / (chip.bandwidth / chip.sms / chip.clock),
        "issue": issued / 4,
        "fp32": of["fp32"] * 32 / chip.fp32,
        "alu": of["alu"] * 32 / 64,
        "mufu": of["mufu"] * 32 / 16,
        "tensor": of["tensor"] * 2048 / chip.tensor,
        "shared": of["wavefronts"],
    }


def clocks(chip: Chip, kernels: list[Kernel], element: int) -> float:
    return sum(max(terms(chip, kernel, element).values()) for kernel in kernels)


# --- CUDA ---------------------------------------------------------------------------------------


def path(call: Call) -> str:
    """Which of the convolutions a call takes: csrc's own choice."""
    if call.dtype == "bf16" and choice.takes_small_map(*call.shape[:3], call.kernel_size):
        return "small map"
    return "canvas" if call.dtype == "bf16" and call.kernel_size <= 9 else "FMA"


def cuda_kernels(call: Call, chip: Chip, backward: bool, path: str) -> list[Kernel]:
    counts = counts_on_file()["cuda"][chip.arch]
    if call.operator in ("gelu_layernorm", "layernorm_residual"):
        return [_cuda_rows(counts, call, backward)]
    nested = call.operator == "nested_conv"
    convolutions = {"small map": _small, "canvas": _canvas, "FMA": _fma}[path]
    found = convolutions(counts, call, chip, backward, nested)
    fused = found[-1].name.startswith("nested_conv_finish")
    if not backward:
        output = "statistics" if nested else "norm"
        return [*found, _row_statistics(counts, call, output, 1 if nested else 2)]
    # nested_conv finishes from dz, h and du; the other starts with dc from dy and c
    return found if fused else [*found, _layernorm_bwd(counts, call, 0, 4 if nested else 3)]


def _row_statistics(counts: dict[str, Counts], call: Call, output: str, passes: float) -> Kernel:
    outputs = {"statistics": "true, (RowOutput)0", "norm": "true, (RowOutput)1",
               "norm_residual": "false, (RowOutput)3"}  # fmt: skip
    name = f"row_statistics_kernel<{call.name}, {outputs[output]}, true>"
    octets, threads = call.shape[-1] / 8, 32
    while threads < 256 and threads * 32 < call.shape[-1]:
        threads *= 2
    lanes = threads * math.ceil(octets / threads)
    return Kernel(name, scaled((counts[name], lanes / octets)), passes)


def _layernorm_bwd(counts: dict[str, Counts], call: Call, order: int, passes: float) -> Kernel:
    octets = call.shape[-1] / 8
    vectors = 1 if octets <= 512 else 2
    name = f"layernorm_bwd_kernel<{call.name}, (NormOrder){order}, {vectors}, true>"
    threads = math.ceil(octets / vectors / 32) * 32
    return Kernel(name, scaled((counts[name], threads * vectors / octets)), passes)


def _cuda_rows(counts: dict[str, Counts], call: Call, backward: bool) -> Kernel:
    residual = call.operator == "layernorm_residual"
    if backward:
        return _layernorm_bwd(counts, call, 3 if residual else 0, 4 if residual else 3)
    output = "norm_residual" if residual else "norm"
    return _row_statistics(counts, call, output, 3 if residual else 2)


def _small(
    counts: dict[str, Counts], call: Call, chip: Chip, backward: bool, nested: bool
) -> list[Kernel]:
    n, h, w, channels = call.shape
    size, source = call.kernel_size, int(nested)
    side = 7 if (size, h, w) == (7, 7, 7) else 8
    positions = math.ceil(n / 16) * 16 * side**2 * math.ceil(channels / 16) * 16
    kernel = f"depthwise_small{'_bwd' * backward}_kernel"
    name = f"{kernel}<BFloat16, {size}, {side}, (MapSource){source}>"
    passes = (5 if nested else 3) if backward else (3 if nested else 2)
    return [Kernel(name, scaled((counts[name], positions / call.outputs)), passes)]


def _canvas(
    counts: dict[str, Counts], call: Call, chip: Chip, backward: bool, nested: bool
) -> list[Kernel]:
    n, h, w, channels = call.shape
    size, radius, blocks = call.kernel_size, call.kernel_size // 2, math.ceil(channels / 16)
    padding = blocks * 16 / channels

    def kernel(name: str, passes: float, wanted: int, halo_rows: int = 0) -> Kernel:
        efficiency = predict.canvas_efficiency(n, h, w, radius, wanted, halo_rows)
        return Kernel(name, scaled((counts[name], padding / efficiency)), passes)

    wanted = math.ceil(2048 / blocks)
    if not backward:
        if nested:
            return [kernel(f"nested_conv_fwd_kernel<BFloat16, {size}, true>", 3, wanted)]
        return [kernel(f"depthwise_kernel<BFloat16, {size}, (Source)0, true>", 2, wanted)]
    if nested and size <= 7:
        ahead = str(chip.name not in predict_backward.TIGHT).lower()
        efficiency = predict_backward.fused_efficiency(n, h, w, radius, math.ceil(512 / blocks))
        both = f"nested_conv_bwd_kernel<BFloat16, {size}, {ahead}>"
        finish = "nested_conv_finish_kernel<BFloat16>"
        return [
            Kernel(both, scaled((counts[both], padding / efficiency)), 4.25),
            Kernel(finish, counts[finish], 3.25),
        ]
    source, norm = int(nested), str(nested).lower()
    groups = math.ceil(296 / blocks)
    return [
        kernel(f"depthwise_kernel<BFloat16, {size}, (Source){source}, true>", 4 if nested else 2,
               wanted),
        kernel(f"depthwise_wgrad_kernel<BFloat16, {size}, {norm}, true>", 2, groups * 4, radius),
    ]  # fmt: skip


def fma_tiles(
    shape: Shape, most_strips: int, wanted: int
) -> tuple[int, int, list[tuple[int, int]]]:
    """plan_fma_tiles of csrc: strips of an image and images of a block, and the items' rows."""
    n, h, w, _ = shape
    strips = math.ceil(w / 7)
    columns = math.ceil(strips / most_strips)
    per_image = math.ceil(strips / columns)
    beside = 1 if columns > 1 else min(most_strips // per_image, n)
    blocks = math.ceil(n / beside) * columns
    part_rows = math.ceil(h / min(math.ceil(wanted / blocks), max(h // 16, 1)))
    rows = [(first, min(first + part_rows, h)) for first in range(0, h, part_rows)]
    return per_image, beside, rows * blocks


def _fma(
    counts: dict[str, Counts], call: Call, chip: Chip, backward: bool, nested: bool
) -> list[Kernel]:
    height, channels = call.shape[1], call.shape[3]
    size, radius, blocks = call.kernel_size, call.kernel_size // 2, math.ceil(channels / 32)
    vectors = 32 * call.element // 16  # of 16 bytes, in a position's channels

    def kernel(
        name: str, source: str, passes: float, most_strips: int, wanted: int, stage: int = 0
    ) -> Kernel:
        per_image, beside, items = fma_tiles(call.shape, most_strips, wanted)
        positions = beside * (per_image * 7 + radius) + radius
        lanes = math.ceil(positions * vectors / 32) * 32
        filled = product = 0
        for first, end in items:
            if stage:  # the weight gradient's: all of its rows, in stages of so many
                product += math.ceil((end - first) / stage) * stage
                filled += math.ceil((end - first) / stage) * stage + size - 1
            else:
                rows = min(end + radius, height) - max(first - radius, 0)
                product, filled = product + rows, filled + rows
        name = f"{name}<{call.name}, {size}> {source}"
        shares = 2 if stage and size > 9 else 1  # warps that share a strip's kernel rows
        return Kernel(
            name,
            scaled(
                (
                    counts[f"{name} product"],
                    product * per_image * beside * 7 * 32 * blocks * shares / call.outputs,
                ),
                (counts[f"{name} fill"], filled * lanes * blocks / call.outputs),
            ),
            passes,
        )

    wanted = math.ceil(2048 / blocks)
    if not backward:
        source = "gelu_norm" if nested else "tensor"
        return [kernel("depthwise_fma_kernel", source, 3 if nested else 2, 8, wanted)]
    strips, groups = 4 if size <= 9 else 3, math.ceil(2 * 296 / blocks)
    return [
        kernel("depthwise_fma_kernel", "gelu_gradient" if nested else "tensor", 4 if nested else 2,
               8, wanted),
        kernel("depthwise_fma_wgrad_kernel", "gelu_norm" if nested else "tensor", 2, strips,
               groups * 4, 4),
    ]  # fmt: skip


# --- Triton -------------------------------------------------------------------------------------


def triton_kernels(call: Call, chip: Chip, backward: bool) -> list[Kernel]:
    counts = counts_on_file()["triton"][chip.arch]
    if call.operator in ("gelu_layernorm", "layernorm_residual"):
        residual = call.operator == "layernorm_residual"
        if backward:
            return [_triton_rows(counts, call, call.operator, True, 4 if residual else 3)]
        return [_triton_rows(counts, call, call.operator, False, 3 if residual else 2)]
    nested = call.operator == "nested_conv"
    if not backward:
        convolution = _triton_conv(counts, call, chip, "forward", "", 3 if nested else 2)
        return [convolution, _triton_rows(counts, call, call.operator, False, 1 if nested else 2)]
    tile = _tile(call, chip, True)
    # Pairs of floats for a pixel and a block of channels
    sums = 8 / tile.block_c / call.element if nested else 0
    if tile.wgrad_rows >= call.kernel_size:
        found = [_triton_conv(counts, call, chip, "backward", "", (4 if nested else 3) + sums)]
    else:
        turns = math.ceil(call.kernel_size / tile.wgrad_rows)
        reads = 3 if nested else 2
        found = [
            _triton_conv(counts, call, chip, "backward", " dgrad", (4 if nested else 2) + sums),
            _triton_conv(counts, call, chip, "backward", " wgrad", turns * reads, turns),
        ]
    if nested:
        return [*found, _triton_finish(counts, call, tile, 3 + sums)]
    return [*found, _triton_rows(counts, call, call.operator, True, 3)]


def _tile(call: Call, chip: Chip, backward: bool) -> heuristics.ConvTile:
    dtype = torch.bfloat16 if call.dtype == "bf16" else torch.float32
    return heuristics.conv_tile(call.kernel_size, dtype, chip.arch.removeprefix("sm_"), backward)


def _triton_conv(
    counts: dict[str, Counts], call: Call, chip: Chip, direction: str, half: str, passes: float,
    turns: int = 1,
) -> Kernel:  # fmt: skip
    n, h, w, channels = call.shape
    tile = _tile(call, chip, direction == "backward")
    form = "matrix" if tile.matrix else "fma"
    kernel = f"depthwise_{'fwd' if direction == 'forward' else 'bwd'}_{form}_kernel"
    name = f"{call.operator} {direction} {kernel} {call.dtype} K={call.kernel_size}{half}"
    groups = math.ceil(n * heuristics.segments(w, tile) / tile.block_p)
    blocks = math.ceil(channels / tile.block_c)
    strip = heuristics.strip_rows(groups, blocks, h, call.kernel_size, target=1024)
    radius = call.kernel_size // 2
    # Forward leaves out the rows above the image.
    above = radius if direction == "backward" else 0
    rows = sum(
        min(first + strip, h) + radius - max(first - radius, -above) for first in range(0, h, strip)
    )
    marched = groups * tile.block_p * tile.block_w * rows * blocks * tile.block_c
    return Kernel(name, scaled((counts[name], turns * marched / call.outputs)), passes)


def _nearest(channels: int, counts: dict[str, Counts], prefix: str) -> str:
    """The name of the row kernel that was counted for the nearest number of channels."""
    found = [name for name in counts if name.startswith(prefix + " C=")]
    return min(found, key=lambda name: abs(math.log(int(name.split("=")[1]) / channels)))


def _triton_rows(
    counts: dict[str, Counts], call: Call, stem: str, backward: bool, passes: float
) -> Kernel:
    direction, kernel = ("backward", "bwd") if backward else ("forward", "fwd")
    prefix = f"{stem} {direction} row_norm_{kernel}_kernel {call.dtype}"
    name = _nearest(call.shape[-1], counts, prefix)
    tile = heuristics.row_tile(call.shape[-1], 4 if backward else 1)
    padding = tile.block_c * tile.n_blocks / call.shape[-1]
    return Kernel(name, scaled((counts[name], padding)), passes)


def _triton_finish(
    counts: dict[str, Counts], call: Call, conv: heuristics.ConvTile, passes: float
) -> Kernel:
    channels = call.shape[-1]
    name = _nearest(
        channels, counts, f"nested_conv backward nested_conv_finish_kernel {call.dtype}"
    )
    tile = heuristics.row_tile(channels, 1)
    padding = tile.block_c * tile.n_blocks / channels
    elements = tile.block_r * channels / tile.num_warps  # of a warp
    pairs = math.ceil(channels / conv.block_c)
    straight = {pipe: n for pipe, n in counts[name].items() if not pipe.startswith("pair ")}
    turn = {
        pipe.removeprefix("pair "): n
        for pipe, n in counts[name].items()
        if pipe.startswith("pair ")
    }
    return Kernel(name, scaled((straight, padding), (turn, pairs / elements)), passes)


# --- The comparison -----------------------------------------------------------------------------


def ratio(call: Call, chip: Chip, training: bool, path_of: str | None = None) -> float:
    """The CUDA backend's predicted time over Triton's: of forward, or of forward and backward."""
    directions = (False, True) if training else (False,)
    found = [
        (
            clocks(chip, cuda_kernels(call, chip, backward, path_of or path(call)), call.element),
            clocks(chip, triton_kernels(call, chip, backward), call.element),
        )
        for backward in directions
    ]
    return sum(cuda for cuda, _ in found) / sum(triton for _, triton in found)


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
    ratios = predictions()
    rows = []
    for case, mean in table().items():
        if case.gpus == choice.GRAPHICS:
            continue
        cells = []
        for gpus in (choice.DATA_CENTRE, choice.GRAPHICS):
            here = case._replace(gpus=gpus)
            low, high = min(ratios[here]), max(ratios[here])
            mean = table()[here]
            mark = "**" if mean > 1 else ""
            cells.append(f"{mark}{mean:.2f}{mark} ({low:.2f} to {high:.2f})")
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

{chip_table()}"""


def count() -> dict[str, Any]:
    """Compile and count both backends' kernels."""
    from bench import choice_counts

    archs = sorted({chip.arch for chip in CHIPS})
    return {
        "cuda": {arch: choice_counts.cuda_counts(arch) for arch in archs},
        "triton": {arch: choice_counts.triton_counts(arch) for arch in archs},
    }


def rounded(counts: Any) -> Any:
    """Six digits are plenty."""
    if isinstance(counts, dict):
        return {name: rounded(value) for name, value in counts.items()}
    return float(f"{counts:.6g}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", action="store_true", help="count nothing anew")
    if not parser.parse_args().page:
        COUNTS.write_text(json.dumps(rounded(count()), indent=0) + "\n")
        counts_on_file.cache_clear()
    choice.write(table())
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
