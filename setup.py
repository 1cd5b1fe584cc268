"""Builds convnest_kernels._C: drives CMakeLists.txt with ninja. Metadata is in pyproject.toml.

Environment:
    CONVNEST_CUDA=auto|0|1         build the CUDA kernels (auto: when it is possible)
    CONVNEST_CUDA_ARCHS="80 90"    compile them for these compute capabilities
    CONVNEST_SKIP_EXTENSION=1      install without the native module: pure Python, on purpose
    CONVNEST_BUILD_DIR=FOLDER      where to compile (build/cmake-<interpreter> otherwise)
    CONVNEST_BUILD_JOBS=N          compiler processes at once (ninja's own choice otherwise)
    CMAKE_ARGS="..."               more arguments for CMake, such as -DCMAKE_CXX_COMPILER=clang++
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
HINT = (
    "convnest_kernels._C could not be built: {reason}. It needs a C++17 compiler (tested: GCC 12 "
    "and Clang 22), CMake 3.20, ninja and pybind11. To install without the native kernels, set "
    "CONVNEST_SKIP_EXTENSION=1."
)


def find_tool(name: str) -> str:
    """The program of this environment's Python first: build isolation installs it there."""
    beside_python = shutil.which(name, path=str(Path(sys.executable).parent))
    found = shutil.which(name) or beside_python
    if found is None:
        raise SystemExit(HINT.format(reason=f"{name} was not found"))
    return found


def pybind11_cmake_dir() -> str:
    try:
        import pybind11
    except ImportError:
        raise SystemExit(HINT.format(reason="pybind11 is not installed")) from None
    return pybind11.get_cmake_dir()


def run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(HINT.format(reason=f"{error}; the output above says why")) from None


class CMakeBuild(build_ext):
    """Compiles in the build folder, then puts the finished module in its place in one step."""

    def build_extension(self, ext: Extension) -> None:
        target = ROOT / self.get_ext_fullpath(ext.name)
        # Not pip's temporary folder, so that the next build compiles what changed only.
        default = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build = Path(os.environ.get("CONVNEST_BUILD_DIR") or default).resolve()
        # A folder of another interpreter is of no use.
        if read_cache(build).get("Python_EXECUTABLE", sys.executable) != sys.executable:
            shutil.rmtree(build)
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            find_tool("cmake"),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11_cmake_dir()}",
            f"-DCONVNEST_CUDA={os.environ.get('CONVNEST_CUDA', 'auto')}",
            f"-DCONVNEST_CUDA_ARCHS={os.environ.get('CONVNEST_CUDA_ARCHS', '')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build / 'module'}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        compile_ = [find_tool("cmake"), "--build", str(build)]
        if jobs := os.environ.get("CONVNEST_BUILD_JOBS"):
            compile_ += ["--parallel", jobs]
        run(configure)
        run(compile_)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}.new")
        shutil.copy2(build / "module" / target.name, partial)
        # In one step: a process that has the old module mapped keeps it.
        os.replace(partial, target)


def read_cache(build: Path) -> dict[str, str]:
    path = build / "CMakeCache.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    entries = (line.split("=", 1) for line in lines if "=" in line and line[:1] not in "#/")
    return {key.split(":")[0]: value for key, value in entries}


skip = os.environ.get("CONVNEST_SKIP_EXTENSION", "0")
if skip not in ("0", "1"):
    raise SystemExit(f"CONVNEST_SKIP_EXTENSION must be 0 or 1, got {skip!r}")

setup(
    ext_modules=[] if skip == "1" else [Extension("convnest_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
