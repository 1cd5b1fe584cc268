"""Predicted time of the convolutions of 7×7 maps, whose tile is 16 images; see predict.py."""

from __future__ import annotations

import collections
import dataclasses

from bench import predict, sass
from bench.predict import CHIPS, KERNEL_SIZE, OUTPUTS, Chip


@dataclasses.dataclass(frozen=True)
class SmallMap:
    """A convolution of 7×7 maps whose tile is 16 images: small_map.cuh."""

    label: str
    source: str
    kernel: str  # the demangled name
    bytes: float  # per output element
    wavefronts: int  # of shared memory, of a tile


# A tile: 16 channels of 16 images, 8 warps that go over it once. Wavefronts: rows of images in and
# out by 7 warps (and a row of zeros), bands, windows, a store of 4 bytes for 8 images of a row.
SMALL_OUTPUTS = 16 * 16 * 49
_SMALL_FILL, _SMALL_DRAIN = 8 * 8 * 4, 7 * 8 * 4
_SMALL_PRODUCT = 64 + 16 * (14 + 4 * 4 + 14)
_SMALL_FORWARD = _SMALL_FILL + _SMALL_PRODUCT + _SMALL_DRAIN
# The weight gradient: another fill, 8 transposed windows, and the diagonals' sums.
_SMALL_BACKWARD = _SMALL_FORWARD + _SMALL_FILL + 16 * (8 * 4 + 7 * 2 + 2 * 8 * 2 + 6)
_SMALL = f"<BFloat16, {KERNEL_SIZE}, 7, (MapSource)"
# Partial sums of the weight gradient: 49 floats a tile and channel, written
_PARTIALS = 4 * 49 / (16 * 49)
SMALL_MAPS = [
    SmallMap(
        "nested_conv (u kept)",
        "depthwise_small.cu",
        f"depthwise_small_kernel{_SMALL}1>",
        6,
        _SMALL_FORWARD + 7 * 8,
    ),
    SmallMap(
        "nested_conv (inference)",
        "depthwise_small.cu",
        f"depthwise_small_kernel{_SMALL}1>",
        4,
        _SMALL_FORWARD + 7 * 8,
    ),
    SmallMap(
        "depthwise", "depthwise_small.cu", f"depthwise_small_kernel{_SMALL}0>", 4, _SMALL_FORWARD
    ),
    SmallMap(
        "nested_conv dgrad (du, dz) and wgrad",
        "depthwise_small_bwd.cu",
        f"depthwise_small_bwd_kernel{_SMALL}1>",
        10 + _PARTIALS,
        _SMALL_BACKWARD + 7 * 8,
    ),
    SmallMap(
        "depthwise dgrad and wgrad",
        "depthwise_small_bwd.cu",
        f"depthwise_small_bwd_kernel{_SMALL}0>",
        6 + _PARTIALS,
        _SMALL_BACKWARD,
    ),
]


def tile_mix(kernel: sass.Kernel) -> collections.Counter[str]:
    """Opcodes of a warp's share of a tile, as if every warp took every branch."""
    if any(end - start > 100 for start, end in kernel.loops()):
        return kernel.stage_mix()
    return collections.Counter(
        op for op, _ in kernel.instructions if not op.endswith(":") and op != "NOP"
    )


def predict_small(chip: Chip, conv: SmallMap, mix: collections.Counter[str]) -> dict[str, float]:
    """Clocks per output and SM on 7×7 maps, 16 images to a tile."""
    by_pipe: collections.Counter[str] = collections.Counter()
    for opcode, n in mix.items():
        by_pipe[predict.pipe(opcode)] += n
    warps = 8 / SMALL_OUTPUTS
    return {
        "memory": conv.bytes / (chip.bandwidth / chip.sms / chip.clock),
        "issue": mix.total() * warps / 4,
        "fp32": by_pipe["fp32"] * warps * 32 / chip.fp32,
        "alu": by_pipe["alu"] * warps * 32 / 64,
        "mufu": by_pipe["mufu"] * warps * 32 / 16,
        "tensor": by_pipe["tensor"] * warps * 2048 / chip.tensor,
        "shared": conv.wavefronts / SMALL_OUTPUTS,
    }


def report(archs: list[str]) -> None:
    print("\n## bf16, 7×7 maps, where the image is the tile\n")
    print("Warp instructions as if every warp took every branch: a bound from above.\n")
    columns = (
        "| kernel | arch | registers | warp instructions per 1024 outputs | of a warp's share |"
    )
    print(columns + " " + " | ".join(chip.name for chip in CHIPS) + " |")
    print("|---|---|---|---|---|" + "---|" * len(CHIPS))
    for source in dict.fromkeys(conv.source for conv in SMALL_MAPS):
        for arch in archs:
            kernels = predict.compiled(source, arch)
            for conv in SMALL_MAPS:
                if conv.source != source:
                    continue
                kernel = kernels[conv.kernel]
                mix = tile_mix(kernel)
                cells = [
                    predict.share(predict_small(chip, conv, mix)) if chip.arch == arch else ""
                    for chip in CHIPS
                ]
                count = round(mix.total() * 8 * OUTPUTS / SMALL_OUTPUTS)
                row = (conv.label, arch, kernel.registers, count, predict.describe(mix), *cells)
                print("| " + " | ".join(map(str, row)) + " |", flush=True)
