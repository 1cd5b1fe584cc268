"""Lay the runtime out as Hugging Face's `kernels` wants it: `python -m hub.layout FOLDER`.

FOLDER/build.toml, FOLDER/torch-ext/convnest_kernels/   the sources, as kernel-builder takes them
FOLDER/build/torch-{cpu,cuda,rocm}/                     the finished kernel, as `kernels` loads it

What is laid out is the Python part: Triton kernels and eager formulas, operators, layers, models
and `accelerate`; it imports nothing but the standard library, torch, Triton and, relatively,
itself. The native kernels are not in it: the backends "cpu" and "cuda" say that they are not built.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "convnest_kernels"
BUILD = Path(__file__).resolve().with_name("build.toml")
# The command line, the registry of timm, and the compiler's report: nothing of them runs a model.
LEFT_OUT = ("train/", "doctor/", "__main__.py", "_bench.py", "timm.py", "triton/aot")

# Older versions of `kernels` look for a folder of the kernel's name.
COMPATIBILITY = """import importlib.util
import sys
from pathlib import Path

_path = Path(__file__).parent.parent / "__init__.py"
_name = f"{__name__}_{abs(hash(_path)):x}"
_spec = importlib.util.spec_from_file_location(_name, _path)
_module = importlib.util.module_from_spec(_spec)
sys.modules[_name] = _module
_spec.loader.exec_module(_module)
globals().update({key: value for key, value in vars(_module).items() if not key.startswith("__")})
"""


def sources() -> Iterator[tuple[str, Path]]:
    """Each file that is laid out: its path inside of the package, and where it is."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith(LEFT_OUT):
            yield name, path


def lay_out(folder: Path) -> None:
    """Write the sources and the finished kernel of each backend into a new folder."""
    text = BUILD.read_text()
    (name,) = re.findall(r'^name = "(.*)"$', text, re.MULTILINE)
    (version,) = re.findall(r"^version = (\d+)$", text, re.MULTILINE)
    (license_,) = re.findall(r'^license = "(.*)"$', text, re.MULTILINE)
    (backends,) = re.findall(r"^backends = \[(.*)\]$", text, re.MULTILINE)
    module = name.replace("-", "_")
    _copy(folder / "torch-ext" / module)
    shutil.copy(BUILD, folder / BUILD.name)
    for backend in re.findall(r'"(\w+)"', backends):
        variant = folder / "build" / f"torch-{backend}"
        _copy(variant)
        (variant / module).mkdir()
        (variant / module / "__init__.py").write_text(COMPATIBILITY)
        files = _digests(variant)
        metadata = {
            # Of the content, so that two versions can live in one process.
            "id": f"_{module}_{backend}_{_sha256(repr(files).encode()).hex()[:10]}",
            "name": name,
            "version": int(version),
            "license": license_,
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": files},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def _copy(target: Path) -> None:
    for name, path in sources():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target / name)


def _digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): base64.b64encode(_sha256(path.read_bytes())).decode()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="a new folder")
    folder = parser.parse_args().folder
    if folder.exists():
        parser.error(f"FOLDER must be new, {folder} exists")
    lay_out(folder)
    print(f"{folder}: {', '.join(sorted(p.name for p in (folder / 'build').iterdir()))}")


if __name__ == "__main__":
    main()
