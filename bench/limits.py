"""What cores can do: the rates that the floors of the CPU benchmarks are made of.

    python -m bench.limits [THREADS]

A floor is the time that the arithmetic alone would take at these rates: the FLOPs of the linear
layers and of the taps that lie inside the image, and two GELUs per wide element. Bandwidths are
those of a copy, by the size of its working set.
"""

from __future__ import annotations

import functools
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("limits.cpp")
CPUINFO = Path("/proc/cpuinfo")
CSRC = SOURCE.parent.parent / "csrc"
FLAGS = "-O3 -march=native -fno-math-errno -fno-trapping-math -ffp-contract=fast"


@dataclass(frozen=True)
class Limits:
    """Rates of one core, or of several at once, per second.

    `bfloat16_flops` is 0 where there is no bfloat16 dot.
    """

    float32_flops: float
    bfloat16_flops: float
    gelus: float
    # (bytes of a working set, bytes copied a second within it), from L1 to main memory
    bandwidths: tuple[tuple[int, float], ...] = ()

    def bandwidth(self, working_set: float) -> float:
        """Bytes a second, read and written, of the level that holds `working_set` bytes."""
        fitting = [rate for size, rate in self.bandwidths if size >= working_set]
        return fitting[0] if fitting else self.bandwidths[-1][1]


def taps_inside(size: int, kernel_size: int) -> int:
    """The taps of a centred kernel that meet a pixel of a row of `size`, over all its outputs."""
    reach = kernel_size // 2
    return sum(min(size, i + reach + 1) - max(0, i - reach) for i in range(size))


@functools.cache
def measure(threads: int = 1) -> Limits:
    """Compile limits.cpp for this machine and run one for each thread at once (some seconds).

    Rates add up, and so do the working sets.
    """
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "limits")
        flags = CPUINFO.read_text() if CPUINFO.exists() else ""
        width = 64 if "avx512dq" in flags else 32 if "avx2" in flags else 16
        defines = ["-DCONVNEST_ISA=native", f"-DCONVNEST_VECTOR_BYTES={width}"]
        options = ["-std=c++17", *shlex.split(FLAGS), *defines, f"-I{CSRC}"]
        subprocess.run(["g++", *options, str(SOURCE), "-o", program], check=True)
        runs = [subprocess.Popen([program], stdout=subprocess.PIPE, text=True)
                for _ in range(threads)]  # fmt: skip
        outputs = [run.communicate()[0] for run in runs]
    if any(run.returncode for run in runs):
        raise RuntimeError("limits.cpp did not run to its end")
    return together([_parse(output) for output in outputs])


def _parse(output: str) -> Limits:
    rates, levels = output.splitlines()[:3], output.splitlines()[3:]
    pairs = (line.split() for line in levels)
    return Limits(*map(float, rates), tuple((int(size), float(rate)) for size, rate in pairs))


def together(cores: list[Limits]) -> Limits:
    """The sum of what each core did while the others did the same."""
    levels = zip(*(core.bandwidths for core in cores), strict=True)
    return Limits(
        sum(core.float32_flops for core in cores),
        sum(core.bfloat16_flops for core in cores),
        sum(core.gelus for core in cores),
        tuple((level[0][0] * len(cores), sum(rate for _, rate in level)) for level in levels),
    )


if __name__ == "__main__":
    limits = measure(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    print(f"float32 multiply-add  {limits.float32_flops / 1e9:6.0f} GFLOP/s")
    print(f"bfloat16 dot          {limits.bfloat16_flops / 1e9:6.0f} GFLOP/s")
    print(f"GELU, in L1           {limits.gelus / 1e9:6.2f} G elements/s")
    for size, rate in limits.bandwidths:
        print(f"copy within {size / 1024:7.0f} KiB {rate / 1e9:6.1f} GB/s")
