"""Arguments and course of `python -m bench` (and `python -m convnest_kernels bench`)."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bench import cells, contenders, floors, limits, machine, plan, process, report, timing
from bench.cases import DTYPES, MEMORY_FORMATS, VARIANTS
from bench.plan import Planned
from bench.store import Store

ROOT = Path(__file__).parent.parent
SHORTEST_CELL = 10.0  # seconds; none is begun when less is left


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    add_arguments(found)
    return found


def add_arguments(found: argparse.ArgumentParser) -> None:
    add = found.add_argument
    add("--op", nargs="+", default=["block"], choices=cells.SUBJECTS, help="what (block)")
    add("--variant", nargs="+", default=["convnest_tiny"], choices=VARIANTS, help="whose shapes")
    add("--stage", nargs="+", type=int, help="1 to 4 (all)")
    add("--batch", nargs="+", type=int, default=[1], help="images, the table has 1 to 256 (1)")
    add("--dtype", nargs="+", default=["float32"], choices=DTYPES)
    add("--mode", nargs="+", default=["infer"], choices=cells.MODES)
    add("--allocator", nargs="+", default=["tuned"], choices=cells.ALLOCATORS, help="malloc's")
    formats = {"default": ["channels_last"], "choices": MEMORY_FORMATS}
    add("--memory-format", nargs="+", **formats, help="of our activations")
    add("--peers", nargs="+", choices=contenders.CONTENDERS, help="all but slow ones")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=1, help="of the CPU (1)")
    add("--image-size", type=int, default=224)
    add("--budget", type=float, default=10.0, help="seconds of timing for each cell (10)")
    add("--samples", type=int, default=timing.WANTED_SAMPLES, help="of each contender (30)")
    add("--peer-timeout", type=float, default=120.0, help="seconds for a peer to get ready (120)")
    add("--cell-timeout", type=float, default=400.0, help="seconds for a cell, compiling too")
    add("--minutes", type=float, help="stop after; cells left out are listed (15 with --full)")
    add("--full", action="store_true", help="the set whose results are committed, and doctor")
    add("--plan", action="store_true", help="list the cells and the minutes expected, and end")
    add("--prepare", action="store_true", help="compile only, for a later, faster run")
    add("--redo", action="store_true", help="take limits and cells anew that the folder has")
    add("--out", type=Path, help="results folder (bench/results/<machine>)")
    add("--json", action="store_true", help="print the records as JSON")
    add("--markdown", action="store_true", help="print Markdown")
    add("--plot", action="store_true", help="write the plots into the folder")


def run(args: argparse.Namespace) -> int:
    """Measure and report; 1 if a contender of ours computes wrong numbers or a cell fails."""
    if args.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no GPU here", file=sys.stderr)
        return 2
    if args.device == "cpu" and not 1 <= args.threads <= machine.usable_cores():
        cores = machine.usable_cores()
        print(f"--threads must be 1 to {cores}, got {args.threads}: this process may use {cores} "
              f"core{'s' * (cores > 1)}", file=sys.stderr)  # fmt: skip
        return 2
    try:
        wanted = _planned(args)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    folder = args.out or ROOT / "bench" / "results" / _folder_name(args)
    store = Store(folder)
    known = {} if args.redo else store.read()["records"]
    missing = [planned for planned in wanted if planned.cell.key not in known]
    if args.plan:
        _print_plan(missing, len(wanted))
        return 0
    if args.prepare:
        return _prepare(missing, args)
    minutes = args.minutes or (15 if args.full and args.device == "cuda" else None)
    deadline = time.monotonic() + 60 * minutes if minutes else math.inf
    has_report = (folder / "doctor.json").exists() and not args.redo
    failed = _doctor(folder, deadline) if args.full and not has_report else False
    _begin(store, args)
    left = []
    with process.measuring(args.device) as measure:
        for number, planned in enumerate(missing, 1):
            if left or deadline - time.monotonic() < SHORTEST_CELL:
                left.append(planned.cell)
                continue
            print(f"[{number}/{len(missing)}] {planned.cell.title}", file=sys.stderr, flush=True)
            record = _measure(measure, planned, args, store.read()["limits"], deadline)
            if record is None:
                left.append(planned.cell)
                continue
            failed |= "failed" in record or _is_refused(record)
            store.add(planned.cell, record)
    for cell in left:
        print(f"not run, {minutes:g} minutes were up: {cell.title}", file=sys.stderr)
    _show(store, {planned.cell.key for planned in wanted}, args, folder)
    return int(failed)


def _planned(args: argparse.Namespace) -> list[Planned]:
    if args.full:
        return plan.full(args.device, args.threads, args.peers, args.budget)
    chosen = cells.product(
        args.op,
        args.stage,
        args.batch,
        args.dtype,
        args.mode,
        args.allocator,
        args.variant,
        args.memory_format,
        device=args.device,
        threads=args.threads,
        image_size=args.image_size,
    )
    return plan.chosen(chosen, args.peers, args.budget)


def _print_plan(missing: list[Planned], count: int) -> None:
    totals = [0.0, 0.0]
    for planned in missing:
        seconds = [plan.expected_seconds(planned, prepared) for prepared in (True, False)]
        totals = [total + s for total, s in zip(totals, seconds, strict=True)]
        print(f"{seconds[0]:4.0f} s  {planned.cell.title}: {' '.join(planned.peers)}")
    prepared, unprepared = (total / 60 for total in totals)
    print(
        f"{len(missing)} of {count} cells are to be taken: about {prepared:.0f} minutes after "
        f"--prepare, {unprepared:.0f} without"
    )


def _prepare(missing: list[Planned], args: argparse.Namespace) -> int:
    """Compile alone: torch's compilers keep what they made on disk."""
    failed = False
    with process.measuring(args.device) as measure:
        for number, planned in enumerate(missing, 1):
            compiled = [name for name in planned.peers if contenders.CONTENDERS[name].compiles]
            print(f"[{number}/{len(missing)}] {planned.cell.title}", file=sys.stderr, flush=True)
            alone = dataclasses.replace(planned, peers=compiled, left_out={})
            record = _measure(measure, alone, args, None, math.inf, samples=0)
            assert record is not None
            failed |= "failed" in record
    return int(failed)


def _folder_name(args: argparse.Namespace) -> str:
    if args.device == "cuda":
        return machine.folder(torch.cuda.get_device_name())
    family = (machine.family() or "").split()[1::2]
    return "-".join([machine.folder(machine.processor()), *family, f"{args.threads}t"])


def _begin(store: Store, args: argparse.Namespace) -> None:
    """Record machine, limits (measured once for a folder, again with --redo) and command.

    A cell's floor is by the limits that the folder had when the cell was taken.
    """
    found = None if args.redo else store.read()["limits"]
    if found is None:
        if args.device == "cuda":
            found = floors.gpu_limits()
        else:
            found = dataclasses.asdict(limits.measure(args.threads))

    def change(results: dict[str, Any]) -> None:
        results["machine"] = machine.describe(args.device)
        results["limits"] = found
        command = f"python -m bench {shlex.join(_without_folder(args.command))}".strip()
        if command not in results["commands"]:
            results["commands"].append(command)

    store.update(change)


def _without_folder(command: Sequence[str]) -> list[str]:
    """A command line without --out: where a folder was does not matter to who repeats the run."""
    kept = list(command)
    if "--out" in kept:
        at = kept.index("--out")
        kept[at : at + 2] = []
    return kept


def _doctor(folder: Path, deadline: float) -> bool:
    """Run doctor, which checks every kernel, into the results folder; whether it failed."""
    print("doctor", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "convnest_kernels", "doctor", "--json"]
    left = None if math.isinf(deadline) else deadline - time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=left)
    except subprocess.TimeoutExpired:
        print("doctor failed: the time was up", file=sys.stderr)
        return True
    folder.mkdir(parents=True, exist_ok=True)
    if done.returncode:
        print(f"doctor failed:\n{done.stderr}{done.stdout}", file=sys.stderr)
    with suppress(ValueError):  # it may have ended before it wrote its report
        report_ = json.loads(done.stdout)
        report_["extension"].pop("path", None)  # of interest to nobody else
        (folder / "doctor.json").write_text(json.dumps(report_, indent=1) + "\n")
    return bool(done.returncode)


def _measure(
    measure: process.Measure, planned: Planned, args: argparse.Namespace, found: Any,
    deadline: float, samples: int | None = None,
) -> dict[str, Any] | None:  # fmt: skip
    """A cell's record, with the allocator that the cell asks for.

    None where the run's time was up before the cell was measured.
    """
    cell = planned.cell
    request = {
        "cell": dataclasses.asdict(cell),
        "peers": planned.peers,
        "left_out": planned.left_out,
        "budget": planned.budget,
        "wanted": args.samples if samples is None else samples,
        "limits": found,
        "peer_seconds": args.peer_timeout,
    }
    environment = {**os.environ, **cells.ALLOCATORS[cell.allocator]}
    environment["OMP_NUM_THREADS"] = str(cell.threads)
    environment["PYTHONPATH"] = str(ROOT)
    environment.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler, which counts allocations
    left = deadline - time.monotonic()
    try:
        return measure(request, environment, min(args.cell_timeout, left))
    except subprocess.TimeoutExpired:
        if left < args.cell_timeout:
            return None
        reason = f"took over {args.cell_timeout:g} s"
    except process.EndedError as error:
        reason = str(error)
    print(f"  FAILED: {reason}", file=sys.stderr)
    return {"cell": dataclasses.asdict(cell), "failed": reason, "contenders": {}}


def _is_refused(record: dict[str, Any]) -> bool:
    refused = False
    for name, found in record["contenders"].items():
        if "refused" in found:
            ours = contenders.CONTENDERS[name].ours
            refused |= ours
            mark = "REFUSED, no time is reported" if ours else "left out"
            print(f"  {name}: {mark}: {found['refused']}", file=sys.stderr)
    return refused


def _show(store: Store, keys: set[str], args: argparse.Namespace, folder: Path) -> None:
    results = store.read()
    chosen = {k: r for k, r in results["records"].items() if k in keys}
    if args.json:
        print(json.dumps({**results, "records": chosen}, indent=2))
    elif args.markdown or importlib.util.find_spec("rich") is None:
        print(report.with_predictions({**results, "records": chosen}))
    else:
        report.print_table({**results, "records": chosen})
    if args.full:
        (folder / "README.md").write_text(report.page(results))
    if args.plot or args.full:
        if importlib.util.find_spec("matplotlib") is None:
            print("no plots: matplotlib is not installed; --plot draws them later", file=sys.stderr)
            return
        from bench import plots

        for path in plots.draw_all(results, folder):
            print(f"wrote {path}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    args = parser().parse_args(arguments)
    args.command = arguments
    return run(args)
