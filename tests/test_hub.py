"""The layout for Hugging Face's `kernels`: what is in it, and that it stands by itself."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hub import layout

FILES = dict(layout.sources())


def imported(path: Path) -> list[ast.Import | ast.ImportFrom]:
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]


@pytest.mark.parametrize("name", FILES)
def test_imports_are_relative_or_of_torch(name: str) -> None:
    for node in imported(FILES[name]):
        if isinstance(node, ast.ImportFrom) and node.level:
            # To a file of the layout: a module by its name, or a name of a package's __init__.py.
            above = Path(name).parents[node.level - 1]
            target = above / (node.module or "").replace(".", "/")
            for alias in node.names:
                places = [target / f"{alias.name}.py", target / alias.name / "__init__.py"]
                places += [target.with_suffix(".py")] if node.module else []
                places += [target / "__init__.py"]
                found = [place for place in places if place.as_posix() in FILES]
                assert found or alias.name == "_C", f"{name}: {ast.unparse(node)}"
            continue
        names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        for module in names:
            assert module is not None
            root = module.partition(".")[0]
            allowed = root in sys.stdlib_module_names or root in ("torch", "triton")
            assert allowed, f"{name}: {ast.unparse(node)}"


def test_what_is_laid_out(tmp_path: Path) -> None:
    layout.lay_out(tmp_path)
    variants = sorted((tmp_path / "build").iterdir())
    assert [path.name for path in variants] == ["torch-cpu", "torch-cuda", "torch-rocm"]
    identifiers = set()
    for variant in variants:
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["id"].isidentifier() and metadata["name"] == "convnest-kernels"
        assert metadata["backend"] == {"type": variant.name.removeprefix("torch-")}
        files = {p.relative_to(variant).as_posix() for p in variant.rglob("*") if p.is_file()}
        assert files == {*metadata["digest"]["files"], "metadata.json"}
        assert set(FILES) < files and not any("train" in file for file in files)
        identifiers.add(metadata["id"])
    assert len(identifiers) == 3
    sources = tmp_path / "torch-ext/convnest_kernels"
    assert {p.relative_to(sources).as_posix() for p in sources.rglob("*.py")} == set(FILES)


# By the name that an older `kernels` gives it, in a process that has neither NumPy nor the package.
ALONE = """
import importlib, importlib.util, sys
sys.modules["numpy"] = None
import torch
path, *names = sys.argv[1:]
spec = importlib.util.spec_from_file_location("older", path)
older = importlib.util.module_from_spec(spec)
spec.loader.exec_module(older)
package = older.ops.__name__.rpartition(".")[0]
for name in names:
    importlib.import_module(f"{package}.{name}")
block = older.NestedBlock(4, expansion=3)
block(torch.randn(1, 4, 5, 5)).square().sum().backward()
assert block.conv_dw.weight.grad.abs().sum() > 0
x = torch.ones(1, 4)
assert "could not be imported" in str(older.explain(older.ops.gelu_layernorm, x, x[0], x[0]))
assert not any(name.startswith("convnest_kernels") for name in sys.modules)
assert not hasattr(torch.ops.convnest, "gelu_layernorm_forward")
print("alone", package)
"""
# All but the host functions of the native kernels.
MODULES = [
    name.removesuffix(".py").replace("/", ".")
    for name in FILES
    if not name.startswith(("cpu/", "cuda/")) and "__init__" not in name
]


def test_stands_by_itself_and_without_numpy(tmp_path: Path) -> None:
    layout.lay_out(tmp_path / "hub")
    older = tmp_path / "hub/build/torch-cpu/convnest_kernels/__init__.py"
    has_triton = importlib.util.find_spec("triton") is not None
    modules = [name for name in MODULES if has_triton or not name.startswith("triton.")]
    # Triton's interpreter, which the tests run in, is of NumPy.
    left_out = ("PYTHONPATH", "TRITON_INTERPRET")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, older, *modules],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if key not in left_out},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("alone older_")
