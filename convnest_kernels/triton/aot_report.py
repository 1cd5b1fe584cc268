"""What the 14 models launch, compiled ahead of time.

`python -m convnest_kernels.triton.aot_report` compiles every kernel, dtype and launch configuration
of the models' blocks at 224 x 224 for each architecture, prints a table, and writes
`triton_aot.json` and `.md` with --output. Exits with 1 if a kernel spills, exceeds the shared
memory of its architecture, or does not fit a multiprocessor.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import json
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convnest_kernels.triton import DTYPES, aot, heuristics

ARCHITECTURES = ("80", "90", "100", "120", "gfx942")

_TINY = (48, 96, 192, 384)
_ISOTROPIC = (88, 92, 120, 156, 192, 384)
_HIERARCHICAL = (20, 24, 32, 40, 48, 56, 72)  # stage 1; stage s has 2^(s-1) times as many


def model_widths() -> list[tuple[int, int]]:
    """(C, H) of every stage of the 14 models at 224 x 224."""
    stages = {(c << s, 56 >> s) for c in _HIERARCHICAL for s in range(4)}
    return sorted(stages | {(c, 14) for c in _ISOTROPIC})


def operator_launches(
    arch: str, dtype: torch.dtype, channels: int, size: int, *, operators: Iterable[str]
) -> list[aot.Launch]:
    """The launches of forward and backward of operators on a stage [128, size, size, channels]."""

    def empty(*shape: int, like: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=like, device="meta")

    def run(stem: str, x: Tensor, others: tuple[Tensor, ...], options: tuple[Any, ...]) -> None:
        module = importlib.import_module(f"convnest_kernels.triton.{stem}")
        y, *kept = module.forward(x, *others, *options, True)
        needs = [True] * (1 + len(others))
        if stem == "layernorm_residual":
            kept, others = [others[0], *kept], others[1:]
        module.backward(y, x, *kept, *others, *options, needs)

    wide = 12 * channels
    shape = (128, size, size)
    conv, vector, vector_c = empty(wide, 1, 7, 7), empty(wide), empty(channels)
    with aot.record(arch) as launches:
        for operator in operators:
            x = empty(*shape, wide, like=dtype)
            if operator == "nested_conv":
                run(operator, x, (conv, vector, vector, vector), (1e-6, True))
            elif operator == "dwconv_gelu_layernorm":
                for options in ((1e-6, "gelu", False), (1e-6, "gelu", True)):
                    run(operator, x, (conv, vector, vector, vector), options)
            elif operator == "gelu_layernorm":
                for norm_first in (False, True):
                    run(operator, x, (vector, vector), (1e-6, norm_first))
            else:
                t = empty(*shape, channels, like=dtype)
                run(operator, t, (t, vector_c, vector_c, vector_c), (1e-6,))
    return launches


def model_launches(
    arch: str, dtypes: Iterable[torch.dtype] = DTYPES, widths: Iterable[tuple[int, int]] = ()
) -> list[aot.Launch]:
    """Every distinct launch of the 14 models' blocks, and of the other designs at the size T."""
    found: dict[aot.Launch, None] = {}
    for dtype in dtypes:
        for channels, size in tuple(widths) or model_widths():
            operators = ["nested_conv", "layernorm_residual"]
            if channels in _TINY:
                operators += ["dwconv_gelu_layernorm", "gelu_layernorm"]
            for launch in operator_launches(arch, dtype, channels, size, operators=operators):
                found.setdefault(launch)
    return list(found)


def compare_forms(arch: str) -> list[dict[str, Any]]:
    """Instructions per output of the convolution's two forms, in bfloat16, a step down the rows."""
    lines = []
    chosen = heuristics.uses_matrix_form
    for matrix in (True, False):
        heuristics.uses_matrix_form = lambda *_, matrix=matrix: matrix
        heuristics.conv_tile.cache_clear()
        try:
            launches = operator_launches(arch, torch.bfloat16, 48, 56, operators=["nested_conv"])
        finally:
            heuristics.uses_matrix_form = chosen
            heuristics.conv_tile.cache_clear()
        for launch in launches:
            if "depthwise" not in launch.kernel:
                continue
            tile = dict(launch.constexprs)
            threads = 32 * dict(launch.options)["num_warps"]
            outputs = tile["BLOCK_P"] * tile["BLOCK_W"] * tile["BLOCK_C"] / threads
            loop = aot.loop_mix(aot.compile_launch(launch, arch).asm["cubin"])
            report = aot.compile_report(launch, arch)
            counts = {name: round(count / outputs, 2) for name, count in loop.most_common()}
            lines.append(
                {
                    "arch": arch,
                    "kernel": report.kernel,
                    "registers": report.registers,
                    "spills": report.spills,
                    "shared": report.shared,
                    "occupancy": report.occupancy,
                    "per_output": round(sum(counts.values()), 1),
                    "mix": counts,
                }
            )
    return lines


def forms_table(lines: list[dict[str, Any]]) -> str:
    """A Markdown table of `compare_forms`."""
    shown = ("FFMA", "FFMA2", "HMMA", "MUFU", "LDG", "LDS", "STS", "BAR", "SHFL")
    rows = [
        f"| arch | kernel | per output | {' | '.join(shown)} | registers | shared | occupancy |",
        f"|---|---|--:|{'--:|' * len(shown)}--:|--:|--:|",
    ]
    for line in lines:
        mix = line["mix"] | {"LDS": line["mix"].get("LDS", 0) + line["mix"].get("LDSM", 0)}
        columns = [line["arch"], line["kernel"], line["per_output"]]
        columns += [f"{mix.get(name, 0):g}" for name in shown]
        columns += [line[name] for name in ("registers", "shared", "occupancy")]
        rows.append(f"| {' | '.join(map(str, columns))} |")
    return "\n".join(rows) + "\n"


def _report(job: tuple[aot.Launch, str]) -> aot.Report:
    return aot.compile_report(*job)


def compile_all(jobs: list[tuple[aot.Launch, str]], processes: int) -> list[aot.Report]:
    """Compile (launch, architecture) pairs in a few processes, in order."""
    if processes <= 1:
        return [aot.compile_report(*job) for job in jobs]
    with ProcessPoolExecutor(processes) as pool:
        reports = []
        for report in pool.map(_report, jobs, chunksize=4):
            reports.append(report)
            if len(reports) % 100 == 0:
                print(f"{len(reports)} of {len(jobs)}", file=sys.stderr, flush=True)
        return reports


def table(reports: list[aot.Report]) -> str:
    """A Markdown table: the range of all tiles for each kernel, dtype and architecture."""
    groups: dict[tuple[str, str, str], list[aot.Report]] = collections.defaultdict(list)
    for report in reports:
        groups[report.kernel, report.dtype, report.arch].append(report)
    lines = [
        "| kernel | dtype | arch | tiles | registers | spills | shared | occupancy | instructions "
        "|",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for (kernel, dtype, arch), group in groups.items():

        def spread(name: str, group: list[aot.Report] = group) -> str:
            values = [getattr(report, name) for report in group]
            low, high = min(values), max(values)
            return f"{low}" if low == high else f"{low} to {high}"

        columns = (
            spread(name) for name in ("registers", "spills", "shared", "occupancy", "instructions")
        )
        lines.append(f"| {kernel} | {dtype} | {arch} | {len(group)} | {' | '.join(columns)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m convnest_kernels.triton.aot_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--sample", action="store_true", help="one width alone, in seconds")
    parser.add_argument("--forms", action="store_true", help="compare the convolution's two forms")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, help="directory for triton_*.json and .md")
    options = parser.parse_args(arguments)
    if options.forms:
        lines = [
            line
            for arch in options.arch
            if not arch.startswith("gfx")
            for line in compare_forms(arch)
        ]
        _write(options.output, "triton_forms", lines, forms_table(lines))
        return 0
    widths = [(48, 56)] if options.sample else []
    jobs = [
        (launch, arch) for arch in options.arch for launch in model_launches(arch, widths=widths)
    ]
    print(f"{len(jobs)} compilations", file=sys.stderr)
    reports = compile_all(jobs, options.processes)
    _write(options.output, "triton_aot", [asdict(report) for report in reports], table(reports))
    faults = [(r.kernel, r.arch, r.dtype, r.faults) for r in reports if r.faults]
    for fault in faults:
        print("over budget:", *fault, file=sys.stderr)
    return 1 if faults else 0


def _write(directory: Path | None, name: str, rows: list[dict[str, Any]], text: str) -> None:
    print(text)
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{name}.json").write_text(_lines(rows))
        (directory / f"{name}.md").write_text(text)


def _lines(rows: list[dict[str, Any]]) -> str:
    """JSON with a row on each line."""
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


if __name__ == "__main__":
    raise SystemExit(main())
