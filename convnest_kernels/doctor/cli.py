"""Arguments, sections and exit status of `python -m convnest_kernels doctor`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from convnest_kernels.doctor import dispatch, environment, kernels, selfcheck

HELP = "show what is installed and which backend runs what, and check the kernels' numbers"
DESCRIPTION = (
    "Show versions, processor, GPUs and what was built; which backend every operator gets here and "
    "why not the others; and check every backend present against float64. Exits with 1 if a check "
    "fails."
)


class Section(NamedTuple):
    """A part of the report: its key in the JSON, its title, how to collect and how to show it."""

    key: str
    title: str
    collect: Callable[[], Any]
    show: Callable[[Any], list[str]]


SECTIONS = (
    Section("versions", "Versions", environment.versions, environment.show_versions),
    Section("extension", "Native extension", environment.extension, environment.show_extension),
    Section("processor", "Processor", environment.processor, environment.show_processor),
    Section("gpus", "GPUs", environment.gpus, environment.show_gpus),
    Section("dispatch", "Backends", dispatch.collect, dispatch.show),
    Section("checks", "Self-check", selfcheck.collect, selfcheck.show),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="show instead what the Triton kernels compile to on this machine's GPU, or on --arch",
    )
    parser.add_argument("--arch", help='with --kernels: "sm_80", "sm_90", ... or "gfx942"')


def run(args: argparse.Namespace) -> int:
    """Report; 0 if every check passes (no kernel exceeds its budgets), else 1; 2 for usage."""
    if args.kernels:
        return _run_kernels(args)
    if args.arch is not None:
        print("--arch goes with --kernels", file=sys.stderr)
        return 2
    started = time.perf_counter()
    report: dict[str, Any] = {}
    for section in SECTIONS:
        report[section.key] = section.collect()
        if not args.json:
            print(f"{section.title}")
            print("".join(f"  {line}\n" for line in section.show(report[section.key])), flush=True)
    failed = sum(not check["ok"] for check in report["checks"])
    report["ok"] = not failed and not report["versions"]["problems"]
    report["seconds"] = round(time.perf_counter() - started, 3)
    if args.json:
        print(json.dumps(report, indent=2))
    elif report["ok"]:
        print(f"All {len(report['checks'])} checks passed ({report['seconds']:.1f} s).")
    else:
        problems = len(report["versions"]["problems"])
        print(f"{failed} of {len(report['checks'])} checks failed; {problems} other problems.")
    return 0 if report["ok"] else 1


def _run_kernels(args: argparse.Namespace) -> int:
    try:
        arch = kernels.architecture(args.arch)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    found = kernels.collect(arch)
    print(json.dumps(found, indent=2) if args.json else "\n".join(kernels.show(found)))
    return 1 if found["faults"] else 0
