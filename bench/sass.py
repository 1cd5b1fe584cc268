"""Compiles the CUDA kernels and reads what came out: resources of ptxas, instructions of nvdisasm.

Needs nvcc. Instructions need nvdisasm too, from the toolkit or from an installed triton (which
bundles one); without it they are empty.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

CSRC = Path(__file__).parent.parent / "csrc"


@dataclasses.dataclass
class Kernel:
    """A compiled kernel: its demangled name, resources, and SASS as (label or opcode, target)."""

    name: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    instructions: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def count(self, opcode: str) -> int:
        """Instructions whose opcode starts with `opcode`."""
        return sum(op.startswith(opcode) for op, _ in self.instructions)

    def loops(self) -> list[tuple[int, int]]:
        """First and last instruction of every backward branch's body."""
        labels = {op[:-1]: i for i, (op, _) in enumerate(self.instructions) if op.endswith(":")}
        return [
            (labels[target], i)
            for i, (op, target) in enumerate(self.instructions)
            if op.startswith("BRA") and labels.get(target, i) < i
        ]

    def leaves(self, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
        """The loops within [start, end] that hold no other."""
        last = len(self.instructions) if end is None else end
        inside = [(a, b) for a, b in self.loops() if start <= a and b <= last]
        return [
            (a, b)
            for a, b in inside
            if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in inside)
        ]

    def mix(self, start: int, end: int) -> collections.Counter[str]:
        """Opcodes of the instructions from `start` to `end`, each once."""
        found = (op for op, _ in self.instructions[start : end + 1])
        return collections.Counter(op for op in found if not op.endswith(":") and op != "NOP")

    def straight_mix(self) -> collections.Counter[str]:
        """Opcodes outside of loops."""
        inside = {i for start, end in self.loops() for i in range(start, end + 1)}
        mix: collections.Counter[str] = collections.Counter()
        for i in range(len(self.instructions)):
            if i not in inside:
                mix += self.mix(i, i)
        return mix

    def stage_mix(self) -> collections.Counter[str]:
        """Opcodes of one turn of the innermost loop with a barrier and the tensor-core work."""

        def count(loop: tuple[int, int], opcode: str) -> int:
            return sum(op.startswith(opcode) for op, _ in self.instructions[loop[0] : loop[1] + 1])

        # Some of that work may look like a loop's to a branch that comes back from behind the code.
        loops = [loop for loop in self.loops() if count(loop, "BAR")]
        most = max(count(loop, "HMMA") for loop in loops)
        stages = [loop for loop in loops if count(loop, "HMMA") == most]
        return self.mix(*min(stages, key=lambda loop: loop[1] - loop[0]))

    def loop_mix(self, opcode: str, least: int, inner: bool = True) -> collections.Counter[str]:
        """Opcodes of one turn of the innermost loop with at least `least` of `opcode`.

        Loops inside of it are counted once, or not at all.
        """

        def count(loop: tuple[int, int]) -> int:
            return sum(n for op, n in self.mix(*loop).items() if op.startswith(opcode))

        loops = [loop for loop in self.loops() if count(loop) >= least]
        loop = min(loops, key=lambda loop: self.mix(*loop).total())
        mix = self.mix(*loop)
        for leaf in self.leaves(*loop):
            if not inner and leaf != loop:
                mix -= self.mix(*leaf)
        return mix


def nvdisasm() -> str | None:
    """Where nvdisasm is, or None."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin or "").parent / "backends/nvidia/bin" if triton else None
    return shutil.which("nvdisasm") or shutil.which("nvdisasm", path=str(bundled))


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    return None if shutil.which("nvcc") else "nvcc is not on PATH"


def demangle(names: list[str]) -> list[str]:
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return [re.sub(r"convnest::cuda::|^void |\([^()]*\)$", "", n) for n in done.stdout.splitlines()]


def compile_kernels(source: Path, arch: str, include: Sequence[Path] = ()) -> list[Kernel]:
    """Compile a .cu for one architecture ("sm_80") and read all of its kernels.

    `include`: folders whose headers go before those of csrc.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = ["nvcc", "-std=c++20", "-cubin", f"-arch={arch}", "-Xptxas", "-v"]
        command += [f"-I{folder}" for folder in (*include, CSRC)]
        log = subprocess.run(
            [*command, str(source), "-o", str(cubin)], capture_output=True, text=True, check=False
        )
        if log.returncode:
            raise RuntimeError(log.stderr)
        listing = ""
        if disassembler := nvdisasm():
            listing = subprocess.run(
                [disassembler, "-c", str(cubin)], capture_output=True, text=True, check=True
            ).stdout
    if "warning" in log.stderr:
        raise RuntimeError(log.stderr)
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        log.stderr,
        re.DOTALL,
    )
    names = demangle([mangled for mangled, *_ in found])
    kernels = {
        mangled: Kernel(name, int(registers), int(stack), int(stores) + int(loads))
        for (mangled, stack, stores, loads, registers), name in zip(found, names, strict=True)
    }
    read_listing(listing, kernels)
    return list(kernels.values())


def read_listing(listing: str, kernels: dict[str, Kernel]) -> None:
    """Add nvdisasm's instructions to the kernels, by their mangled names."""
    current: Kernel | None = None
    for line in listing.splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
            current = kernels.get(section[1])
        elif re.match(r"\s*\.section\s", line):
            current = None
        elif current is None:
            continue
        elif label := re.match(r"(\.L_x_\d+):", line):
            current.instructions.append((label[0], ""))
        elif code := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            target = re.search(r"`\((\.L_x_\d+)\)", code[2])
            current.instructions.append((code[1], target[1] if target else ""))
