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

from convnest_kernels import _extension

ROOT = Path(__file__).resolve().parent.parent
ISAS = ["portable", "avx2", "avx512"]


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
    assert info["cuda"] or info["cuda_reason"]


@pytest.mark.skipif(not shutil.which("cmake"), reason="needs cmake")
class TestCudaSwitch:
    def configure(self, folder, value, **environment):
        pytest.importorskip("pybind11")
        command = ["cmake", "-S", str(ROOT), "-B", str(folder), f"-DCONVNEST_CUDA={value}"]
        return run(*command, f"-DPython_EXECUTABLE={sys.executable}", **environment)

    def test_one_is_refused_with_the_reason(self, tmp_path):
        code, output = self.configure(tmp_path, "1")
        assert code != 0
        output = " ".join(output.split())
        assert "CONVNEST_CUDA=1, but CUDA kernels cannot be built: " in output
        assert "nvcc was not found" in output or "no CUDA kernels yet" in output

    def test_auto_says_why_it_is_off(self, tmp_path):
        code, output = self.configure(tmp_path, "auto")
        assert code == 0, output
        assert re.search(r"CUDA kernels: off \(.+\)", output)

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
