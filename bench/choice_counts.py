"""Instructions of the CUDA and the Triton kernels per output: what predict_choice.py compares.

Both backends' kernels are compiled ahead of time and their machine code is counted alike: the
instructions of a turn of the loop that does the work, spread over the outputs that a warp makes in
it. CUDA kernels are instances by explicit instantiation; of the FMA kernels, which choose what they
read at run time, one copy for each choice.
"""

from __future__ import annotations

import collections
import importlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import predict, predict_small, sass
from convnest_kernels.triton import aot

KERNEL_SIZES = (3, 5, 7, 9, 11, 13)
WIDE_CHANNELS = tuple(channels for _, _, channels in predict.STAGES)
NARROW_CHANNELS = tuple(channels // 12 for channels in WIDE_CHANNELS)
# Beside the pipes' warp instructions: wavefronts of 128 bytes that shared memory moves.
WAVEFRONTS = "wavefronts"

Mix = collections.Counter[str]
Counts = dict[str, float]


def per_output(mix: Mix, outputs: float) -> Counts:
    """A warp's instructions by pipe, and its wavefronts, for one of the `outputs` that it makes."""
    pipes: dict[str, float] = collections.defaultdict(float)
    for opcode, n in mix.items():
        pipes[predict.pipe(opcode)] += n / outputs
        if moved := wavefronts(opcode):
            pipes[WAVEFRONTS] += n * moved / outputs
    return dict(pipes)


def wavefronts(opcode: str) -> int:
    """Of a warp's access to shared memory without bank conflicts."""
    base, *suffixes = opcode.split(".")
    if base in ("LDSM", "STSM"):
        return int(suffixes[-1]) if suffixes[-1].isdigit() else 1
    if base in ("LDS", "STS", "LDGSTS"):
        return 4 if "128" in suffixes else 2 if "64" in suffixes else 1
    return 1 if base == "SHFL" else 0


# --- CUDA ---------------------------------------------------------------------------------------

_BANDS = (3, 5, 7, 9)
_HALF = "BFloat16"


def _instances() -> dict[str, list[tuple[str, str]]]:
    """Headers, and the kernels to be instantiated with what they take."""
    found: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)

    def add(header: str, kernel: str, args: str) -> None:
        found[header].append((kernel, args))

    for size in _BANDS:
        add("nested_conv.cuh", f"nested_conv_fwd_kernel<{_HALF}, {size}, true>",
            "NestedConvFwdArgs")  # fmt: skip
        for source in ("tensor", "gelu_gradient"):
            add("common/depthwise.cuh",
                f"depthwise_kernel<{_HALF}, {size}, Source::{source}, true>",
                "DepthwiseArgs")  # fmt: skip
        for norm in ("true", "false"):
            add("common/depthwise_wgrad.cuh",
                f"depthwise_wgrad_kernel<{_HALF}, {size}, {norm}, true>",
                "DepthwiseWgradArgs")  # fmt: skip
        for ahead in ("true", "false") if size <= 7 else ():
            add("nested_conv_bwd.cuh", f"nested_conv_bwd_kernel<{_HALF}, {size}, {ahead}>",
                "NestedConvBwdArgs")  # fmt: skip
    add("nested_conv_finish.cuh", f"nested_conv_finish_kernel<{_HALF}>", "NestedConvFinishArgs")
    for size, side in [*((size, 8) for size in KERNEL_SIZES), (7, 7)]:
        for source in ("tensor", "gelu_norm"):
            parameters = f"<{_HALF}, {size}, {side}, MapSource::{source}>"
            add("common/depthwise_small.cuh", f"depthwise_small_kernel{parameters}",
                "DepthwiseSmallArgs")  # fmt: skip
            add("common/depthwise_small_bwd.cuh", f"depthwise_small_bwd_kernel{parameters}",
                "DepthwiseSmallBwdArgs")  # fmt: skip
    for element in (_HALF, "Float32"):
        for gelu, output in (("true", "statistics"), ("true", "norm"), ("false", "norm_residual")):
            add("common/row_statistics.cuh",
                f"row_statistics_kernel<{element}, {gelu}, RowOutput::{output}, true>",
                "RowStatisticsParams")  # fmt: skip
        for order in ("gelu_then_norm", "norm_residual"):
            for vectors in (1, 2):
                add("common/layernorm_bwd.cuh",
                    f"layernorm_bwd_kernel<{element}, NormOrder::{order}, {vectors}, true>",
                    "LayerNormBwdArgs")  # fmt: skip
    return found


def _fma_instances() -> Iterator[tuple[str, int]]:
    """Of the 16-bit types all sizes, to be compared with the tensor cores."""
    for size in KERNEL_SIZES:
        yield "Float32", size
        yield _HALF, size


def _translation_unit(headers: list[str], instances: list[tuple[str, str]]) -> str:
    lines = [f'#include "{header}"' for header in headers]
    lines += ["namespace convnest::cuda {"]
    lines += [f"template __global__ void {kernel}({args});" for kernel, args in instances]
    return "\n".join([*lines, "}", ""])


def _compile(text: str, arch: str, folder: Path) -> list[sass.Kernel]:
    source = folder / "instances.cu"
    source.write_text(text)
    return sass.compile_kernels(source, arch, [folder])


def cuda_counts(arch: str) -> dict[str, Counts]:
    """Per nominal output (of a whole tile) of each kernel, by its demangled name."""
    with tempfile.TemporaryDirectory() as name:
        instances = _instances()
        text = _translation_unit(
            list(instances), [i for group in instances.values() for i in group]
        )
        found = {kernel.name: _count(kernel) for kernel in _compile(text, arch, Path(name))}
    for source in ("tensor", "gelu_norm", "gelu_gradient"):
        found |= fma_counts(arch, source)
    return found


def _count(kernel: sass.Kernel) -> Counts:
    name, _, rest = kernel.name.partition("<")
    parameters = rest.rstrip(">").split(", ")
    if name.startswith("depthwise_small"):
        positions = predict_small.SMALL_OUTPUTS if parameters[2] == "7" else 16 * 16 * 64
        return per_output(predict_small.tile_mix(kernel), positions / 8)
    if name == "row_statistics_kernel":
        # Straight code for 4 vectors of 8; loops are for rows beyond those.
        return per_output(kernel.straight_mix(), 32 * 4 * 8)
    if name == "layernorm_bwd_kernel":
        return per_output(kernel.loop_mix("STG", 1), 32 * 8 * int(parameters[2]))
    if name == "nested_conv_finish_kernel":
        return per_output(kernel.loop_mix("STG", 1), 32 * 8)
    channels = 1 if name == "nested_conv_bwd_kernel" else 2
    return per_output(kernel.stage_mix(), 4 * 128 * channels)


def _fma_parts(kernel: sass.Kernel, size: int) -> tuple[Counts, Counts]:
    """Of an output of the product, and of a lane's 16 bytes of the fetch and the fill."""
    forward = kernel.name.startswith("depthwise_fma_kernel")
    kernel_rows = size if forward or size <= 9 else (size + 1) // 2
    rows = 1 if forward else 2

    def count(loop: tuple[int, int], opcode: str) -> int:
        return sum(n for op, n in kernel.mix(*loop).items() if op.startswith(opcode))

    products = 7 * size * kernel_rows * rows
    stages = [a for a in kernel.loops() if count(a, "BAR") and count(a, "FFMA") >= products]
    stage = min(stages, key=lambda loop: loop[1] - loop[0])
    leaves = kernel.leaves(*stage)
    (fetch,) = (leaf for leaf in leaves if count(leaf, "LDGSTS"))
    (fill,) = (leaf for leaf in leaves if count(leaf, "STS.128"))
    vector = kernel.mix(*fetch) + kernel.mix(*fill)
    return per_output(kernel.mix(*stage) - vector, 32 * 7 * rows), per_output(vector, 32)


def fma_counts(arch: str, source: str) -> dict[str, Counts]:
    """Of the FMA kernels that read `source`: the product per output, the fill per 16 bytes."""
    known = {"args.source": f"FmaSource::{source}", "args.vector": "true"}
    known |= {"args.gelu_norm": str(source == "gelu_norm").lower()}
    headers = ["depthwise_fma.cuh", "depthwise_fma_wgrad.cuh"]
    instances = []
    for element, size in _fma_instances():
        instances.append((f"depthwise_fma_kernel<{element}, {size}>", "DepthwiseFmaArgs"))
        if source != "gelu_gradient":
            wgrad = f"depthwise_fma_wgrad_kernel<{element}, {size}>"
            instances.append((wgrad, "DepthwiseFmaWgradArgs"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "common").mkdir()
        text = {header: (sass.CSRC / "common" / header).read_text() for header in headers}
        if missing := [word for word in known if not any(word in t for t in text.values())]:
            raise RuntimeError(f"the FMA kernels no longer read {missing}")
        for header in headers:
            for word, value in known.items():
                text[header] = re.sub(rf"\b{re.escape(word)}\b", value, text[header])
            (folder / "common" / header).write_text(text[header])
        includes = [f"common/{header}" for header in headers]
        kernels = _compile(_translation_unit(includes, instances), arch, folder)
    found = {}
    for kernel in kernels:
        size = int(kernel.name.rstrip(">").split(", ")[1])
        product, fill = _fma_parts(kernel, size)
        found[f"{kernel.name} {source} product"] = product
        found[f"{kernel.name} {source} fill"] = fill
    return found


# --- Triton -------------------------------------------------------------------------------------


def triton_counts(arch: str) -> dict[str, Counts]:
    """Per nominal output of each kernel that the operators launch; `_launches` says the names."""
    found: dict[str, Counts] = {}
    for name, launch in _launches(arch.removeprefix("sm_")):
        if name not in found:
            found[name] = _count_triton(launch, arch)
    return found


def _launches(arch: str) -> Iterator[tuple[str, aot.Launch]]:
    """Named "stem direction kernel dtype K" if a convolution, "... C" if over rows."""
    for dtype in (torch.bfloat16, torch.float32):
        short = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
        runs = [("nested_conv", size, WIDE_CHANNELS[0]) for size in KERNEL_SIZES]
        runs += [("dwconv_gelu_layernorm", size, WIDE_CHANNELS[0]) for size in KERNEL_SIZES]
        runs += [("nested_conv", 7, channels) for channels in WIDE_CHANNELS[1:]]
        runs += [("dwconv_gelu_layernorm", 7, channels) for channels in WIDE_CHANNELS[1:]]
        runs += [("gelu_layernorm", 0, channels) for channels in WIDE_CHANNELS]
        runs += [("layernorm_residual", 0, channels) for channels in NARROW_CHANNELS]
        for stem, size, channels in runs:
            for direction, launches in record(arch, stem, dtype, size, channels).items():
                for launch in launches:
                    kernel = launch.kernel.split(":")[1]
                    if kernel == "sum_partials_kernel":
                        continue
                    tile = dict(launch.constexprs)
                    of = f"K={size}" if "K" in tile else f"C={channels}"
                    half = ""
                    if "WGRAD_ROWS" in tile and not (tile["DGRAD"] and tile["WGRAD_ROWS"]):
                        half = " dgrad" if tile["DGRAD"] else " wgrad"
                    yield f"{stem} {direction} {kernel} {short} {of}{half}", launch


def record(
    arch: str, stem: str, dtype: torch.dtype, size: int, channels: int
) -> dict[str, list[aot.Launch]]:
    """What a training step of an operator launches, by direction."""

    def empty(*shape: int, like: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=like, device="meta")

    x, vector = empty(128, 56, 56, channels, like=dtype), empty(channels)
    conv = empty(channels, 1, size, size)
    inputs, options = {
        "nested_conv": ((x, conv, vector, vector, vector), (1e-6, True)),
        "dwconv_gelu_layernorm": ((x, conv, vector, vector, vector), (1e-6, "gelu", False)),
        "gelu_layernorm": ((x, vector, vector), (1e-6, False)),
        "layernorm_residual": ((x, x, vector, vector, None), (1e-6,)),
    }[stem]
    module: Any = importlib.import_module(f"convnest_kernels.triton.{stem}")
    with aot.record(arch) as forward:
        y, *kept = module.forward(*inputs, *options, True)
    activations = 2 if stem == "layernorm_residual" else 1
    needs = [tensor is not None for tensor in inputs]
    with aot.record(arch) as backward:
        module.backward(y, *inputs[:activations], *kept, *inputs[activations:], *options, needs)
    return {"forward": forward, "backward": backward}


def _count_triton(launch: aot.Launch, arch: str) -> Counts:
    tile, warps = dict(launch.constexprs), dict(launch.options)["num_warps"]
    listing = aot.disassemble(aot.compile_launch(launch, arch.removeprefix("sm_")).asm["cubin"])
    (name,) = set(re.findall(r"\.section\s+\.text\.(\w+)", listing))
    kernel = sass.Kernel(name, 0, 0, 0)
    sass.read_listing(listing, {name: kernel})
    if "K" in tile:
        outputs = tile["BLOCK_P"] * tile["BLOCK_W"] * tile["BLOCK_C"]
        return per_output(_row_loop(kernel), outputs / warps)
    outputs = tile["BLOCK_R"] * tile["BLOCK_C"] * tile["N_BLOCKS"] / warps
    if launch.kernel.endswith("row_norm_bwd_kernel"):
        return per_output(_row_loop(kernel), outputs)
    counts = per_output(kernel.straight_mix(), outputs)
    if kernel.name == "nested_conv_finish_kernel":
        # A row's sums are read by all of its warps; ptxas may unroll the loop over their pairs.
        turn = _row_loop(kernel)
        pairs = sum(n for opcode, n in turn.items() if opcode.startswith("LDG")) / 2
        for pipe, n in per_output(turn, pairs).items():
            counts[f"pair {pipe}"] = n
    return counts


def _row_loop(kernel: sass.Kernel) -> Mix:
    """The largest loop without another: for a convolution, one step down the rows."""
    return kernel.mix(*max(kernel.leaves(), key=lambda loop: loop[1] - loop[0]))
