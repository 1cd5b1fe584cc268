"""nested_block under GCC's sanitizers: the portable path, four threads.

One build watches threads, one addresses and undefined behaviour. Instruction sets share every line
but the vector operations; test_core_memory.py guards the tensors' bounds on each of them, as built.
Here the pieces of scratch memory have gaps between them (Carver), so that a kernel which leaves its
piece is seen too.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
FLAGS = [
    *("-std=c++17", "-O1", "-g0", "-fno-math-errno", "-fno-trapping-math", "-w", f"-I{CSRC}"),
    *("-DCONVNEST_ISA=portable", "-DCONVNEST_VECTOR_BYTES=16"),
    "-fno-sanitize-recover=all",
]


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=280)


OPTIONS = {
    "thread": [],
    # Checks inline, in unrolled code, take a compiler minutes: calls of small functions, both ways.
    "address,undefined": [
        "-DCONVNEST_ALWAYS_INLINE=",
        *("--param", "asan-instrumentation-with-call-threshold=0"),
    ],
}


def build(sanitizers: str, folder: Path) -> Path:
    """The portable core and the driver, compiled with some sanitizers."""
    flags = [*FLAGS, f"-fsanitize={sanitizers}", *OPTIONS[sanitizers]]
    sources = [*CSRC.glob("nested_block*_cpu.cpp"), *CSRC.glob("*_row*_cpu.cpp")]
    sources += [CSRC / "common" / "parallel.cpp", ROOT / "tests" / "core_sanitized.cpp"]

    def compile_(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        done = run("g++", *flags, "-c", source, "-o", target)
        assert done.returncode == 0, done.stderr
        return target

    objects = [compile_(source) for source in sources]
    program = folder / "program"
    done = run("g++", *flags, *objects, "-lpthread", "-o", program)
    if done.returncode != 0 and "cannot find" in done.stderr:
        pytest.skip(f"this compiler has no runtime of {sanitizers}")
    assert done.returncode == 0, done.stderr
    return program


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("sanitizers", OPTIONS)
def test_sanitizers_find_nothing(sanitizers: str, tmp_path: Path) -> None:
    done = run(build(sanitizers, tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == "same bits"
