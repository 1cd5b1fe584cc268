"""The build: what the compiler made of the native core, and what its switches answer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from convnest_kernels import _extension

ROOT = Path(__file__).resolve().parent.parent
ISAS = ["portable", "avx2", "avx512", "avx512bf16"]


def run(*command, **environment):
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout + done.stderr


def objects(isa: str) -> list[Path]:
    found = sorted(ROOT.glob(f"build/cmake-*/CMakeFiles/cpu_{isa}.dir/csrc/*.o"))
    if not found:
        pytest.skip(f"no object files of {isa}: this checkout's build folder was not kept")
    return found


class TestObjects:
    @pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
    @pytest.mark.parametrize("isa", ISAS)
    def test_no_function_that_the_linker_may_share(self, isa):
        """A weak function compiled for AVX-512 could replace the portable one of its name."""
        for path in objects(isa):
            _, symbols = run("nm", "--demangle", "--defined-only", str(path))
            assert re.search(rf" T convnest::{isa}::", symbols), path.name
            weak = re.findall(r"^\S+ [WVuw] (.+)$", symbols, re.MULTILINE)
            # A pointer to the C++ runtime's routine: data, and the same in every object.
            assert [s for s in weak if s != "DW.ref.__gxx_personality_v0"] == [], path.name
            strangers = re.findall(r"^\S+ [TDBR] (?!convnest::)(.+)$", symbols, re.MULTILINE)
            assert strangers == [], path.name

    @pytest.mark.skipif(not shutil.which("objdump"), reason="needs objdump")
    def test_portable_code_is_portable(self):
        for path in objects("portable"):
            _, code = run("objdump", "--disassemble", "--no-show-raw-insn", str(path))
            assert not re.search(r"%[yz]mm|\bv(mov|add|mul|fmadd)\w+\s", code), path.name


@pytest.mark.skipif(_extension.module is None, reason=f"no native core: {_extension.error}")
def test_build_info():
    info = _extension.module.build_info()
    assert set(info) == {"compiler", "cuda", "cuda_archs", "cuda_reason", "isas"}
    assert re.match(r"\w+ \d+\.", info["compiler"])
    assert info["isas"][0] == "portable"
    assert (info["cuda"] == "") == (info["cuda_archs"] == [])
    assert (info["cuda"] == "") == (info["cuda_reason"] != "")
    assert hasattr(_extension.module, "cuda") == (info["cuda"] != "")


@pytest.mark.skipif(not hasattr(_extension.module, "cuda"), reason="built without CUDA kernels")
class TestCudaKernels:
    def test_the_module_needs_no_driver(self):
        """Static runtime: nothing of CUDA is loaded before a kernel is."""
        core = _extension.module
        assert core.cuda.runtime_version() >= 12000
        _, libraries = run("ldd", core.__file__)
        assert "libstdc++" in libraries
        assert not re.search(r"libcuda|nvidia", libraries)

    @pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
    def test_the_runtime_stays_inside(self):
        """Another version of the runtime, torch's, may live in the same process."""
        _, symbols = run("nm", "--dynamic", "--defined-only", _extension.module.__file__)
        names = [line.split()[-1] for line in symbols.splitlines()]
        assert "PyInit__C" in names
        assert [name for name in names if "cuda" in name.lower()] == []

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_an_error_of_cuda_names_the_kernel_and_its_launch(self):
        """Here: that there is no driver. The kernel's arguments are never looked at."""
        arguments = (16, 0, 0, 16, 0, 0, 4, 8, 1e-6, False, _extension.module.cuda.bfloat16, 0)
        launch = r"gelu_layernorm_fwd: launch failed with grid \(1, 1, 1\), block \(256, 1, 1\)"
        with pytest.raises(RuntimeError, match=launch):
            _extension.module.cuda.gelu_layernorm_forward(*arguments)


needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
# As if the search had found none.
NO_NVCC = "-DCONVNEST_NVCC="


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("ninja")), reason="needs cmake")
class TestCudaSwitch:
    def configure(self, folder, value, *options):
        pytest.importorskip("pybind11")
        command = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder)]
        options = [f"-DCONVNEST_CUDA={value}", f"-DPython_EXECUTABLE={sys.executable}", *options]
        return run(*command, *options)

    def test_one_is_refused_with_the_reason(self, tmp_path):
        code, output = self.configure(tmp_path, "1", NO_NVCC)
        assert code != 0
        output = " ".join(output.split())
        assert "CONVNEST_CUDA=1, but CUDA kernels cannot be built: nvcc was not found" in output

    def test_auto_says_why_it_is_off(self, tmp_path):
        code, output = self.configure(tmp_path, "auto", NO_NVCC)
        assert code == 0, output
        assert re.search(r"CUDA kernels: off \(nvcc was not found .+\)", output)

    def test_zero_switches_it_off(self, tmp_path):
        code, output = self.configure(tmp_path, "0")
        assert code == 0, output
        assert "CUDA kernels: off (switched off by CONVNEST_CUDA=0)" in output

    @needs_nvcc
    def test_architectures(self, tmp_path):
        code, output = self.configure(tmp_path, "1", "-DCONVNEST_CUDA_ARCHS=90, 80;90")
        assert code == 0, output
        assert re.search(r"CUDA kernels: CUDA [\d.]+ for 80 90$", output, re.MULTILINE)
        rules = (tmp_path / "build.ninja").read_text()
        for arch in ("arch=compute_80,code=[sm_80]", "code=[sm_90]", "code=[compute_90]"):
            assert f"{arch}" in rules

    @pytest.mark.parametrize("archs", ["75", "90x", "native"])
    def test_wrong_architectures(self, tmp_path, archs):
        code, output = self.configure(tmp_path, "auto", f"-DCONVNEST_CUDA_ARCHS={archs}")
        assert code != 0
        assert f"such as 80;90, got '{archs}'" in " ".join(output.split())

    def test_other_values(self, tmp_path):
        code, output = self.configure(tmp_path, "yes")
        assert code != 0
        assert "CONVNEST_CUDA must be auto, 0 or 1, got 'yes'" in output


class TestSetup:
    def test_skip_switch_is_checked(self):
        code, output = run(sys.executable, "setup.py", "--version", CONVNEST_SKIP_EXTENSION="yes")
        assert code != 0
        assert "CONVNEST_SKIP_EXTENSION must be 0 or 1, got 'yes'" in output

    def test_a_failing_build_says_what_to_do(self, tmp_path):
        environment = {"CONVNEST_CUDA": "yes", "CONVNEST_BUILD_DIR": str(tmp_path)}
        code, output = run(sys.executable, "setup.py", "build_ext", "--inplace", **environment)
        assert code != 0
        assert "convnest_kernels._C could not be built" in output
        assert "CONVNEST_SKIP_EXTENSION=1" in output

    def wheel(self, source, folder, **environment):
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
        code, output = run(*command, "--wheel-dir", str(folder), str(source), **environment)
        assert code == 0, output
        (wheel,) = folder.glob("convnest_kernels-*.whl")
        names = zipfile.ZipFile(wheel).namelist()
        assert "convnest_kernels/py.typed" in names
        assert "convnest_kernels/_C.pyi" in names
        return wheel.name, [n for n in names if re.match(r"convnest_kernels/_C\..*\.so$", n)]

    @pytest.mark.slow
    def test_wheel(self, tmp_path):
        name, modules = self.wheel(ROOT, tmp_path)
        assert len(modules) == 1
        assert not name.endswith("any.whl")

    @pytest.mark.slow
    def test_pure_python_wheel_on_purpose(self, tmp_path):
        # From a copy: two builds of one folder at a time would get in each other's way.
        source = tmp_path / "source"
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / "convnest_kernels", source / "convnest_kernels", ignore=ignored)
        for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        name, modules = self.wheel(source, tmp_path, CONVNEST_SKIP_EXTENSION="1")
        assert modules == []
        assert name.endswith("py3-none-any.whl")
