"""What both backends' kernels take of a GPU for a call: the model of predict_choice.py.

A kernel is what its warps issue per output, counted in the machine code (choice_counts.py) and
scaled by how often that falls due in the backend's own cut of the shape (canvas, tiles of images,
strips, padding), and the wide tensors that it reads and writes.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch

from bench import predict, predict_backward
from bench.predict import Chip
from convnest_kernels.cuda import choice
from convnest_kernels.triton import heuristics

COUNTS = Path(__file__).parent / "results" / "cuda_choice.json"
KERNEL_SIZES = (3, 5, 7, 9, 11, 13)

Counts = dict[str, float]
Shape = tuple[int, int, int, int]  # N, H, W, C
Rows = list[tuple[int, int]]  # the first, and the one behind the last


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
    blocks: int = 0  # of the grid, and warps of a block: where the bound of a small grid is asked
    warps: int = 8


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


def clocks_of_a_grid(chip: Chip, kernel: Kernel, element: int) -> float:
    """The same where the grid may leave SMs idle: by the SM that has the most blocks.

    A warp issues an instruction a clock at the best, so that few warps fill no SM either.
    """
    of = terms(chip, kernel, element)
    if kernel.blocks == 0:
        return max(of.values())
    most = math.ceil(kernel.blocks / chip.sms)
    idle = most * chip.sms / kernel.blocks
    of["issue"] *= 4 / min(4, most * kernel.warps)
    return max(idle * n if name != "memory" else n for name, n in of.items())


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
    tiles = math.ceil(n / 16) * math.ceil(channels / 16)
    return [Kernel(name, scaled((counts[name], positions / call.outputs)), passes, tiles)]


def _canvas(
    counts: dict[str, Counts], call: Call, chip: Chip, backward: bool, nested: bool
) -> list[Kernel]:
    n, h, w, channels = call.shape
    size, radius, blocks = call.kernel_size, call.kernel_size // 2, math.ceil(channels / 16)
    padding = blocks * 16 / channels

    def items(wanted: int) -> int:
        return sum(1 for _ in predict.canvas_items(n, h, w, radius, wanted))

    def kernel(name: str, passes: float, wanted: int, halo_rows: int = 0) -> Kernel:
        efficiency = predict.canvas_efficiency(n, h, w, radius, wanted, halo_rows)
        # The weight gradient's blocks take several items.
        groups = min(items(wanted), wanted // 4) if halo_rows else items(wanted)
        work = scaled((counts[name], padding / efficiency))
        return Kernel(name, work, passes, blocks * groups)

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
            Kernel(
                both,
                scaled((counts[both], padding / efficiency)),
                4.25,
                blocks * items(math.ceil(512 / blocks)),
                warps=16,
            ),
            Kernel(finish, counts[finish], 3.25),
        ]
    source, norm = int(nested), str(nested).lower()
    groups = math.ceil(296 / blocks)
    return [
        kernel(f"depthwise_kernel<BFloat16, {size}, (Source){source}, true>", 4 if nested else 2,
               wanted),
        kernel(f"depthwise_wgrad_kernel<BFloat16, {size}, {norm}, true>", 2, groups * 4, radius),
    ]  # fmt: skip


def fma_tiles(shape: Shape, most_strips: int, wanted: int) -> tuple[int, int, Rows]:
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
            blocks * min(len(items), wanted // 4 if stage else wanted),
            per_image * beside * shares,
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
               groups * 4, 2),
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
    kernel = f"nested_conv backward nested_conv_finish_kernel {call.dtype}"
    name = _nearest(channels, counts, kernel)
    tile = heuristics.row_tile(channels, 1)
    padding = tile.block_c * tile.n_blocks / channels
    elements = tile.block_r * channels / tile.num_warps  # of a warp
    pairs = math.ceil(channels / conv.block_c)
    straight, turn = {}, {}
    for pipe, count in counts[name].items():
        (turn if pipe.startswith("pair ") else straight)[pipe.removeprefix("pair ")] = count
    return Kernel(name, scaled((straight, padding), (turn, pairs / elements)), passes)
