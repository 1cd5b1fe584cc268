"""Predicted time of nested_conv's backward, in three wide kernels and in two; see predict.py.

A form's time is the sum over its kernels of what bounds each. The finishing kernel is
counted by its loop over vectors of 8 channels, the norm's backward by a row; the sums over a row's
warps, or of the row sums, are left out.
"""

from __future__ import annotations

import collections
import math

from bench import predict, sass
from bench.predict import BATCH, CHIPS, KERNEL_SIZE, STAGES, Chip, compiled, describe

FUSED_SOURCE = "nested_conv_bwd_fused.cu"
NORM = "layernorm_bwd_kernel<BFloat16, (NormOrder)0, true>"
# Of a warp's turn with a row: a stage's 12·C channels fill 4.5 of a thread's 5 vectors of 4.
NORM_OUTPUTS = 32 * 18
FINISH = "nested_conv_finish_kernel<BFloat16>"
# Nominal outputs of a warp's stage: 4 rows × 128 pixels of one channel.
OUTPUTS = 512
# Shared-memory wavefronts of that (see predict.py): staging in and out, statistics, z, x̂ and du,
# masks, γ and β; dz: windows, band, outputs; taps: windows and tiles, masks; dγ, dβ; the drain
STAGING_WAVEFRONTS = 48 + 4
FUSED_WAVEFRONTS = (
    STAGING_WAVEFRONTS + (24 + 2 + 8) + (16 + 14 + 8) + (36 + 16) + (8 + 16) + (24 + 4 + 2)
)
# Schedule::direct, ahead and overlapped, by the shared memory of a block
DIRECT, AHEAD, OVERLAPPED = range(3)
TIGHT = ("RTX 4090",)  # whose shared memory has no room for the next stage's rows
# Bytes of an output: three wide tensors in, one out, and a pair of floats for 16 channels; then
# two in, one out, and the pairs.
FUSED_BYTES, FINISH_BYTES = 8.5, 6.5
DGRAD, WGRAD = predict.CONVOLUTIONS[2:4]
LAYERNORM_BYTES = 8


def schedule(chip: Chip) -> int:
    """How nested_conv_bwd_kernel's parts follow each other there."""
    if chip.name in TIGHT:
        return DIRECT
    return AHEAD if chip.arch == "sm_80" else OVERLAPPED


def fused_kernel(size: int, schedule: int) -> str:
    """The demangled name of its instance in bf16."""
    return f"nested_conv_bwd_kernel<BFloat16, {size}, (Schedule){schedule}>"


def fused_efficiency(images: int, height: int, width: int, radius: int, wanted_items: int) -> float:
    """Outputs in 128 · rows of all stages, the warming ones counted as whole ones."""
    stages = 0
    for rows, above in predict.canvas_items(images, height, width, radius, wanted_items):
        stages += math.ceil((radius + min(above, radius)) / 4) + math.ceil(rows / 4)
    return images * height * width / (stages * 4 * 128)


def terms_of(
    chip: Chip, mix: collections.Counter[str], moved: float, outputs: float, wavefronts: float
) -> dict[str, float]:
    """Clocks per output and SM of a loop that makes `outputs` in a turn of a warp."""
    by_pipe: collections.Counter[str] = collections.Counter()
    for opcode, n in mix.items():
        by_pipe[predict.pipe(opcode)] += n
    return {
        "memory": moved / (chip.bandwidth / chip.sms / chip.clock),
        "issue": mix.total() / 4 / outputs,
        "fp32": by_pipe["fp32"] * 32 / outputs / chip.fp32,
        "alu": by_pipe["alu"] * 32 / outputs / 64,
        "mufu": by_pipe["mufu"] * 32 / outputs / 16,
        "tensor": by_pipe["tensor"] * 2048 / outputs / chip.tensor,
        "shared": wavefronts / outputs,
    }


def in_three(chip: Chip, size: int, channels: int) -> list[dict[str, float]]:
    """Terms of dgrad, wgrad and the norm's backward."""
    kernels = compiled(DGRAD.source, chip.arch)
    norm = norm_turn(kernels[NORM])
    return [
        predict.predict(chip, conv, kernels[conv.kernel].stage_mix(), size, channels)
        for conv in (DGRAD, WGRAD)
    ] + [terms_of(chip, norm, LAYERNORM_BYTES, NORM_OUTPUTS, 0)]


def norm_turn(kernel: sass.Kernel) -> collections.Counter[str]:
    """Opcodes of a row, whose sums are what the kernel shuffles."""
    return kernel.loop_mix("SHFL", 1)


def in_two(chip: Chip, size: int, channels: int) -> list[dict[str, float]]:
    """Terms of the kernel of all gradients and of the finishing one."""
    kernels = compiled(FUSED_SOURCE, chip.arch)
    wanted = math.ceil(512 / math.ceil(channels / 16))
    efficiency = fused_efficiency(BATCH, size, size, KERNEL_SIZE // 2, wanted)
    fused = kernels[fused_kernel(KERNEL_SIZE, schedule(chip))].stage_mix()
    wavefronts = FUSED_WAVEFRONTS - STAGING_WAVEFRONTS * (schedule(chip) == DIRECT)
    finish = kernels[FINISH].loop_mix("STG", 1)
    return [
        terms_of(chip, fused, FUSED_BYTES, OUTPUTS * efficiency, wavefronts),
        terms_of(chip, finish, FINISH_BYTES, 256, 0),
    ]


def report(archs: list[str]) -> None:
    """Print the section of bench/results/cuda_predicted.md."""
    print("\n## nested_conv's backward in three and in two wide kernels\n")
    print("| kernel | arch | registers | warp instructions per 1024 outputs | of these |")
    print("|---|---|---|---|---|")
    for arch in archs:
        kernels, three = compiled(FUSED_SOURCE, arch), compiled(DGRAD.source, arch)
        norm = three[NORM]
        of_schedules = [kernels[fused_kernel(KERNEL_SIZE, s)] for s in (OVERLAPPED, AHEAD, DIRECT)]
        for kernel, mix, times in (
            *((kernel, kernel.stage_mix(), 2) for kernel in of_schedules),
            (kernels[FINISH], kernels[FINISH].loop_mix("STG", 1), 4),
            (norm, norm_turn(norm), 1024 / NORM_OUTPUTS),
        ):
            scaled = collections.Counter({op: round(n * times) for op, n in mix.items()})
            row = (kernel.name, arch, kernel.registers, scaled.total(), describe(scaled))
            print("| " + " | ".join(map(str, row)) + " |")
    print("\nClocks per output and SM: three (dgrad + wgrad + finish) → two (both gradients +")
    print("finish), each with what bounds its kernels (m: memory, else issue or the pipe).\n")
    print("| chip | " + " | ".join(f"{n} {s}², D {c}" for n, s, c in STAGES) + " |")
    print("|---|" + "---|" * len(STAGES))
    for chip in CHIPS:
        if chip.arch not in archs:
            continue
        cells = []
        for _, size, channels in STAGES:
            forms = []
            for form in (in_three, in_two):
                worst = [
                    max(t.items(), key=lambda term: term[1]) for t in form(chip, size, channels)
                ]
                forms.append((sum(clocks for _, clocks in worst), [name for name, _ in worst]))
            (three_clocks, three_bounds), (two_clocks, two_bounds) = forms
            text = " + ".join("m" if b == "memory" else b for b in three_bounds)
            after = " + ".join("m" if b == "memory" else b for b in two_bounds)
            cells.append(
                f"{three_clocks:.2f} ({text}) → {two_clocks:.2f} ({after}): "
                f"{two_clocks / three_clocks:.0%}"
            )
        print(f"| {chip.name} | " + " | ".join(cells) + " |")
