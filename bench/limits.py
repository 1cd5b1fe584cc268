"""What one core can do: the rates that the floors of the CPU benchmarks are made of.

    python -m bench.limits

A floor is the time that the arithmetic alone would take at these rates: the FLOPs of the linear
layers and of the taps that lie inside the image, and two GELUs per wide element. Bandwidths are
those of a copy, by the size of its working set.
"""

from __future__ import annotations

import functools
import shlex
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("limits.cpp")
CPUINFO = Path("/proc/cpuinfo")
CSRC = SOURCE.parent.parent / "csrc"
FLAGS = "-O3 -march=native -fno-math-errno -fno-trapping-math -ffp-contract=fast"


@dataclass(frozen=True)
class Limits:
    """Rates of one core, per second; `bfloat16_flops` is 0 where there is no bfloat16 dot."""

    float32_flops: float
    bfloat16_flops: float
    gelus: float
    # (bytes of a working set, bytes copied a second within it), from L1 to main memory
    bandwidths: tuple[tuple[int, float], ...] = ()

    def bandwidth(self, working_set: float) -> float:
        """Bytes a second, read and written, of the level that holds `working_set` bytes."""
        fitting = [rate for size, rate in self.bandwidths if size >= working_set]
        return fitting[0] if fitting else self.bandwidths[-1][1]

    def block_seconds(
        self, batch: int, height: int, width: int, dim: int, *, expansion: int = 12,
        kernel_size: int = 7, bfloat16: bool = False, training: bool = False,
    ) -> float:  # fmt: skip
        """The floor of one nested_block on one core; a training step counts three times it."""
        wide, pixels = expansion * dim, batch * height * width
        linear = 4 * pixels * dim * wide
        rate = (bfloat16 and self.bfloat16_flops) or self.float32_flops
        seconds = linear / rate + self.conv_seconds(batch, height, width, wide, kernel_size)
        seconds += 2 * pixels * wide / self.gelus
        return 3 * seconds if training else seconds

    def conv_seconds(
        self, batch: int, height: int, width: int, channels: int, kernel_size: int = 7
    ) -> float:
        """The floor of a depthwise convolution, whose sums are float32."""
        taps = taps_inside(height, kernel_size) * taps_inside(width, kernel_size)
        return 2 * batch * channels * taps / self.float32_flops


def taps_inside(size: int, kernel_size: int) -> int:
    """The taps of a centred kernel that meet a pixel of a row of `size`, over all its outputs."""
    reach = kernel_size // 2
    return sum(min(size, i + reach + 1) - max(0, i - reach) for i in range(size))


@functools.cache
def measure() -> Limits:
    """Compile limits.cpp for this machine and run it (one thread, a second)."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "limits"
        flags = CPUINFO.read_text() if CPUINFO.exists() else ""
        width = 64 if "avx512dq" in flags else 32 if "avx2" in flags else 16
        defines = ["-DCONVNEST_ISA=native", f"-DCONVNEST_VECTOR_BYTES={width}"]
        subprocess.run(
            [
                "g++",
                "-std=c++17",
                *shlex.split(FLAGS),
                *defines,
                f"-I{CSRC}",
                str(SOURCE),
                "-o",
                str(program),
            ],
            check=True,
        )
        done = subprocess.run([str(program)], check=True, capture_output=True, text=True)
    rates, levels = done.stdout.splitlines()[:3], done.stdout.splitlines()[3:]
    pairs = (line.split() for line in levels)
    return Limits(*map(float, rates), tuple((int(size), float(rate)) for size, rate in pairs))


if __name__ == "__main__":
    limits = measure()
    print(f"float32 multiply-add  {limits.float32_flops / 1e9:6.0f} GFLOP/s")
    print(f"bfloat16 dot          {limits.bfloat16_flops / 1e9:6.0f} GFLOP/s")
    print(f"GELU, in L1           {limits.gelus / 1e9:6.2f} G elements/s")
    for size, rate in limits.bandwidths:
        print(f"copy within {size / 1024:7.0f} KiB {rate / 1e9:6.1f} GB/s")
