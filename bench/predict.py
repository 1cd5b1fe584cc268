"""Predicted time of the CUDA kernels on GPUs that nobody here has: predictions, not measurements.

Counts the instructions that nvcc made of a stage of each convolution, spreads them over the pipes
of an SM at their full rate, and compares with the time that memory takes for the bytes that must
move. The larger is the bound; the model leaves out latency, barriers, the last wave and DRAM's own
losses. On the other side it counts every instruction of a stage, also those that rows in a gap
between images leave out; where maps are small, issue is overstated for that.

    python -m bench.predict [--arch sm_80 sm_90] > bench/results/cuda_predicted.md
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import math
from collections.abc import Iterator

from bench import sass

# Nominal outputs of a warp's stage: 4 rows × 128 pixels × 2 channels.
OUTPUTS = 1024
KERNEL_SIZE = 7
BATCH = 128
STAGES = [("stage 1", 56, 576), ("stage 2", 28, 1152), ("stage 3", 14, 2304), ("stage 4", 7, 4608)]


@dataclasses.dataclass(frozen=True)
class Chip:
    """Full-rate throughputs. Sources: NVIDIA's architecture papers and the CUDA guide's tables."""

    name: str
    arch: str  # whose machine code is counted
    sms: int
    clock: float  # Hz, boost
    bandwidth: float  # bytes/s
    tensor: int  # 16-bit multiply-adds per clock and SM, by mma.sync
    fp32: int  # lanes per clock and SM; ALU is 64 and MUFU 16 on all of them


CHIPS = [
    Chip("A100", "sm_80", 108, 1.41e9, 1.94e12, 1024, 64),
    # mma.sync reaches about 60% of what wgmma does.
    Chip("H100", "sm_90", 132, 1.755e9, 3.35e12, 1270, 128),
    Chip("H200", "sm_90", 132, 1.755e9, 4.8e12, 1270, 128),
    # Counted from sm_90's code: ptxas for sm_100 differs by some percent.
    Chip("B200", "sm_90", 148, 1.85e9, 8.0e12, 1270, 128),
    Chip("RTX 4090", "sm_80", 128, 2.52e9, 1.01e12, 256, 128),
]


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A tensor-core convolution: where its kernel is and what it moves per element, in bytes."""

    label: str
    source: str
    kernel: str  # the demangled name
    bytes: int
    halo_rows: int  # rows of input marched over beside the output's, for each chunk
    wavefronts: float  # of shared memory, per 1024 outputs, from the kernel's accesses


@dataclasses.dataclass(frozen=True)
class FmaConvolution:
    """A float32 convolution on the FMA units, by the loop that holds its products."""

    label: str
    kernel: str  # the demangled name
    rows: int  # of 7 outputs, that a thread makes in a turn of that loop
    bytes: int


# Shared-memory wavefronts (128 bytes) per warp and stage: stores and loads of 8 bytes take 2, of 16
# take 4, ldmatrix.x4 4, others 1 (without conflicts, as tests/test_cuda_shared_banks.py checks).
FORWARD = 8 * 2 + 4 * 4 + 4 * 4 + 8 * 4 + 28 + 16 + 8 * 2 + 4 * 4 + 4 * 4
DGRAD = 2 * (4 * 4 + 4 * 4) + 8 * 2 + 8 * 4 + 28 + 16 + 8 * 2
WGRAD = 8 * 2 + 8 * 2 + 2 * 5 * 4 + 8 * 4 + 8
DEPTHWISE = DGRAD - (4 * 4 + 4 * 4)  # without u
_TYPES = f"<BFloat16, {KERNEL_SIZE}, "
_FORWARD, _DGRAD = (
    f"nested_conv_fwd_kernel{_TYPES}true>",
    f"depthwise_kernel{_TYPES}(Source)1, true>",
)
_DEPTHWISE = f"depthwise_kernel{_TYPES}(Source)0, true>"
_WGRAD = f"depthwise_wgrad_kernel{_TYPES}true, false, true>"
# With the next stage's rows on their way, as on sm_90 and sm_100.
_PLAIN_WGRAD = f"depthwise_wgrad_kernel{_TYPES}false, true, true>"
_BWD, _DW, _DW_BWD = (
    "nested_conv_bwd.cu",
    "dwconv_gelu_layernorm.cu",
    "dwconv_gelu_layernorm_bwd.cu",
)
CONVOLUTIONS = [
    Convolution("nested_conv (u kept)", "nested_conv.cu", _FORWARD, 6, 0, FORWARD),
    Convolution("nested_conv (inference)", "nested_conv.cu", _FORWARD, 4, 0, FORWARD),
    Convolution("nested_conv dgrad (du, dz)", _BWD, _DGRAD, 8, 0, DGRAD),
    Convolution("nested_conv wgrad", _BWD, _WGRAD, 4, KERNEL_SIZE // 2, WGRAD),
    Convolution("depthwise, dgrad", _DW, _DEPTHWISE, 4, 0, DEPTHWISE),
    Convolution("depthwise wgrad", _DW_BWD, _PLAIN_WGRAD, 4, KERNEL_SIZE // 2, WGRAD),
]
FMA_SOURCE = "depthwise_fma.cu"
FMA_CONVOLUTIONS = [
    FmaConvolution("forward, dgrad", f"depthwise_fma_kernel<Float32, {KERNEL_SIZE}>", 1, 8),
    FmaConvolution("wgrad", f"depthwise_fma_wgrad_kernel<Float32, {KERNEL_SIZE}>", 2, 8),
]


@functools.cache
def compiled(source: str, arch: str) -> dict[str, sass.Kernel]:
    """A source's kernels by their demangled names."""
    return {kernel.name: kernel for kernel in sass.compile_kernels(sass.CSRC / source, arch)}


def pipe(opcode: str) -> str:
    """The pipe that an instruction occupies, first order."""
    base = opcode.split(".")[0]
    if base in ("FFMA", "FADD", "FMUL"):
        return "fp32"
    if base == "MUFU":
        return "mufu"
    if base == "HMMA":
        return "tensor"
    if base in ("LDS", "STS", "LDSM", "LDG", "STG", "LDGSTS", "LDL", "STL"):
        return "memory"
    if base.startswith("U") or base in ("BRA", "BAR", "EXIT", "BSSY", "BSYNC", "LDGDEPBAR", "CS2R"):
        return "other"
    return "fp32" if base == "IMAD" else "alu"


def canvas_items(
    images: int, height: int, width: int, radius: int, wanted_items: int
) -> Iterator[tuple[int, int]]:
    """Rows of an item's outputs, and how many lie above it in its image; see canvas.cuh."""
    beside = min((124 + radius) // (width + radius), images) if width <= 124 else 1
    strips = 1 if width <= 124 else math.ceil(width / 120)
    down = math.ceil(images / beside)
    pitch = height + radius
    wanted_chunks = math.ceil(wanted_items / strips)
    parts, chunk_images = 1, 1
    if down < wanted_chunks:
        parts = min(math.ceil(wanted_chunks / down), max(height // 16, 1))
    else:
        while chunk_images * pitch < 64 and down // (chunk_images + 1) >= wanted_chunks:
            chunk_images += 1
    part_rows = math.ceil(height / parts) if parts > 1 else chunk_images * pitch
    parts = math.ceil(height / part_rows) if parts > 1 else 1
    for top in range(0, down, chunk_images):
        bottom = min(top + chunk_images, down) * pitch - radius
        for offset in range(0, parts * part_rows, part_rows):
            first = top * pitch + offset
            for _ in range(strips):
                yield min(first + part_rows, bottom) - first, offset


def canvas_efficiency(
    images: int, height: int, width: int, radius: int, wanted_items: int, halo_rows: int = 0
) -> float:
    """Outputs in 128 · rows of what the blocks march over."""
    marched = 0
    for rows, above in canvas_items(images, height, width, radius, wanted_items):
        marched += math.ceil((max(min(above, radius), halo_rows) + rows + radius) / 4) * 4
    return images * height * width / (marched * 128)


def predict(
    chip: Chip, conv: Convolution, mix: collections.Counter[str], size: int, channels: int
) -> dict[str, float]:
    """Clocks per output and SM, by what they are spent on."""
    blocks = math.ceil(channels / 16)
    wanted = math.ceil(2048 / blocks) if conv.halo_rows == 0 else math.ceil(296 / blocks) * 4
    efficiency = canvas_efficiency(BATCH, size, size, KERNEL_SIZE // 2, wanted, conv.halo_rows)
    by_pipe: collections.Counter[str] = collections.Counter()
    for opcode, n in mix.items():
        by_pipe[pipe(opcode)] += n
    per_output = 32 / OUTPUTS / efficiency
    return {
        "memory": conv.bytes / (chip.bandwidth / chip.sms / chip.clock),
        "issue": mix.total() / 4 / OUTPUTS / efficiency,
        "fp32": by_pipe["fp32"] * per_output / chip.fp32,
        "alu": by_pipe["alu"] * per_output / 64,
        "mufu": by_pipe["mufu"] * per_output / 16,
        "tensor": by_pipe["tensor"] * 2048 / OUTPUTS / chip.tensor / efficiency,
        "shared": conv.wavefronts / OUTPUTS / efficiency,
    }


def predict_fma(
    chip: Chip, conv: FmaConvolution, mix: collections.Counter[str]
) -> dict[str, float]:
    """Clocks per output and SM of the product loop alone, on maps whose width 7 divides."""
    outputs = 7 * conv.rows
    by_pipe: collections.Counter[str] = collections.Counter()
    for opcode, n in mix.items():
        by_pipe[pipe(opcode)] += n
    return {
        "memory": conv.bytes / (chip.bandwidth / chip.sms / chip.clock),
        "issue": mix.total() / outputs / 128,
        "fp32": by_pipe["fp32"] / outputs / chip.fp32,
        "shared": by_pipe["memory"] / outputs / 32,
    }


def describe(mix: collections.Counter[str]) -> str:
    pipes: collections.Counter[str] = collections.Counter()
    for opcode, n in mix.items():
        pipes[pipe(opcode)] += n
    return ", ".join(f"{name} {n}" for name, n in pipes.most_common())


def share(terms: dict[str, float]) -> str:
    """The predicted share of DRAM's peak, and the two largest terms."""
    worst = sorted(terms.items(), key=lambda term: -term[1])[:2]
    text = ", ".join(f"{name} {clocks:.2f}" for name, clocks in worst)
    return f"{terms['memory'] / worst[0][1]:.0%} ({text})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="+", default=["sm_80", "sm_90"])
    options = parser.parse_args()
    from bench import predict_backward, predict_small

    mixes: dict[tuple[str, str], collections.Counter[str]] = {}
    print("# Predicted time of the CUDA convolutions\n")
    print("Made by `python -m bench.predict`; predictions, nothing here was run on a GPU.\n")
    print("## bf16, on the tensor cores\n")
    print("| kernel | arch | registers | warp instructions per 1024 outputs | of these |")
    print("|---|---|---|---|---|")
    for source in dict.fromkeys(conv.source for conv in CONVOLUTIONS):
        for arch in options.arch:
            kernels = compiled(source, arch)
            for conv in CONVOLUTIONS:
                if conv.source != source or (conv.kernel, arch) in mixes:
                    continue
                kernel = kernels[conv.kernel]
                mix = mixes[conv.kernel, arch] = kernel.stage_mix()
                row = (conv.kernel, arch, kernel.registers, mix.total(), describe(mix))
                print("| " + " | ".join(map(str, row)) + " |", flush=True)
    print(
        f"\nClocks per output and SM, ConvNeSt-T in bf16 at batch {BATCH}: the two largest terms,"
    )
    print("and the predicted share of DRAM's peak (100%: bound by memory). Stage 4 runs where the")
    print("image is the tile (below); here stands what it would take on the canvas.\n")
    print("| kernel | chip | " + " | ".join(f"{n} {s}², D {c}" for n, s, c in STAGES) + " |")
    print("|---|---|" + "---|" * len(STAGES))
    for conv in CONVOLUTIONS:
        for chip in CHIPS:
            if (conv.kernel, chip.arch) not in mixes:
                continue
            mix = mixes[conv.kernel, chip.arch]
            cells = [share(predict(chip, conv, mix, size, C)) for _, size, C in STAGES]
            print(f"| {conv.label} | {chip.name} | " + " | ".join(cells) + " |")
    predict_backward.report(options.arch)
    predict_small.report(options.arch)
    print("\n## float32, on the FMA units\n")
    print(
        "The product alone (fetch and fill of shared memory come on top), at every stage shape.\n"
    )
    print("| kernel | chip | registers | instructions per output | share of DRAM's peak |")
    print("|---|---|---|---|---|")
    for arch in options.arch:
        kernels = compiled(FMA_SOURCE, arch)
        for fma in FMA_CONVOLUTIONS:
            kernel = kernels[fma.kernel]
            products = 7 * KERNEL_SIZE**2 * fma.rows
            mix = kernel.loop_mix("FFMA", products, inner=False)
            count = (
                f"{mix.total() / (7 * fma.rows):.0f}: {describe(mix)} for {7 * fma.rows} outputs"
            )
            for chip in CHIPS:
                if chip.arch == arch:
                    row = (fma.label, chip.name, kernel.registers, count)
                    cell = share(predict_fma(chip, fma, mix))
                    print("| " + " | ".join(map(str, row)) + f" | {cell} |")


if __name__ == "__main__":
    main()
