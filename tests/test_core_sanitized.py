"""nested_block and the wide operators under GCC's sanitizers: float32, four threads.

One build watches threads, one addresses and undefined behaviour, on the portable path and on AVX2.
test_core_memory.py guards the tensors' bounds in every type and on every instruction set, as built.
Here the pieces of scratch memory have gaps between them (Carver), so that a kernel which leaves its
piece is seen too.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from convnest_kernels import _extension

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
FLAGS = [
    *("-std=c++17", "-O1", "-g0", "-fno-math-errno", "-fno-trapping-math", "-w", f"-I{CSRC}"),
    *("-DCONVNEST_FLOAT32_ONLY", "-fno-sanitize-recover=all"),
]
ISAS = {
    "portable": ["-DCONVNEST_ISA=portable", "-DCONVNEST_VECTOR_BYTES=16"],
    "avx2": [
        *("-DCONVNEST_ISA=avx2", "-DCONVNEST_VECTOR_BYTES=32"),
        *("-mavx2", "-mfma", "-mf16c"),
    ],
}


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


def build(sanitizers: str, isa: str, folder: Path) -> Path:
    """The core and the driver, compiled for an instruction set with some sanitizers."""
    flags = [*FLAGS, *ISAS[isa], f"-fsanitize={sanitizers}", *OPTIONS[sanitizers]]
    sources = [source for source in CSRC.glob("*_cpu.cpp") if "residual" not in source.stem]
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
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sanitizers", OPTIONS)
def test_sanitizers_find_nothing(sanitizers: str, isa: str, tmp_path: Path) -> None:
    module = _extension.module
    if isa != "portable" and (module is None or isa not in module.cpu.isas()):
        pytest.skip(f"this machine has no {isa}")
    done = run(build(sanitizers, isa, tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == "same bits"
