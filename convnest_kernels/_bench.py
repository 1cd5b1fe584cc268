"""The `bench` command: the suite in `bench/`, part of a checkout and not of the package."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

HELP = "time every backend beside what you would use instead (from a checkout)"
DESCRIPTION = (
    "The benchmark suite: checks every contender against float64, times them in turn, and reports "
    "ratios and fractions of the machine's limits. `bench --help` lists its options."
)
MISSING = (
    "The benchmark suite is not part of the installed package: clone the repository and run "
    "`python -m convnest_kernels bench` there (looked for {path})."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own: they are the suite's, and `main` hands them on as they are."""


def run_suite(arguments: Sequence[str], root: Path | None = None) -> int:
    """Run `python -m bench` of the checkout around this package; 2 where there is none."""
    root = Path(__file__).parent.parent if root is None else root
    path = root / "bench" / "cli.py"
    if not path.exists():
        print(MISSING.format(path=path), file=sys.stderr)
        return 2
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module("bench.cli").main(arguments)


def run(args: argparse.Namespace) -> int:
    """The suite with its defaults."""
    return run_suite([])
