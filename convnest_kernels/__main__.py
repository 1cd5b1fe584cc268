"""The command line: `python -m convnest_kernels train`, `doctor` and `bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from convnest_kernels import __version__, _bench
from convnest_kernels.doctor import cli as doctor
from convnest_kernels.train import cli as train

# Each module adds its arguments and runs; what is heavy it imports when it runs.
COMMANDS = {"train": train, "doctor": doctor, "bench": _bench}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 1 (failure), 2 (usage), 128 + signal."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["bench"]:
        return _bench.run_suite(arguments[1:])
    args = _parser().parse_args(arguments)
    return COMMANDS[args.command].run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m convnest_kernels",
        description="Kernels for wide depthwise ConvNet blocks, and ConvNeSt models over them.",
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"convnest_kernels {__version__} (torch {torch.__version__})",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.DESCRIPTION)
        module.add_arguments(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
