"""What the 14 models launch on Triton, compiled ahead of time for GPUs that need not be there.

`python -m bench.triton_report` compiles every kernel, dtype and launch configuration that training
and inference of the models launch at 224 x 224 (float32 parameters), and the other designs' at the
size T, for each architecture. It brings `convnest_kernels/triton/compile_report.csv` up to date (a
row whose kernel, launch and Triton version have not changed is kept; --all compiles it again), and
the summary `bench/results/triton_kernels.md`. Exits with 1 if a kernel exceeds its budgets.

`python -m bench.triton_report --forms` compares the convolution's two forms instead.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from bench.cases import IMAGE_SIZE
from convnest_kernels.models import VARIANTS
from convnest_kernels.triton import DTYPES, aot, aot_table, heuristics
from convnest_kernels.triton.aot_table import ARCHITECTURES, Row

RESULTS = Path(__file__).parent / "results"

Stage = tuple[int, int, bool]  # C, H, and whether its blocks have a ResScale
_TINY = VARIANTS["convnest_tiny"]["dims"]


def stages() -> list[Stage]:
    """Every distinct stage of the 14 models."""
    found: set[Stage] = set()
    for config in VARIANTS.values():
        dims, scales = config["dims"], config["res_scale"]
        for i, channels in enumerate(dims):
            scale = scales[i] if isinstance(scales, tuple) else scales
            found.add((channels, (IMAGE_SIZE // config["patch_size"]) >> i, scale is not None))
    return sorted(found)


def stage_launches(
    arch: str, dtype: torch.dtype, stage: Stage, *, designs: bool = False
) -> list[aot.Launch]:
    """What a batch of 128 launches in a stage, in training and in inference.

    That is nested_conv and layernorm_residual; with `designs` the operators of the other designs,
    too.
    """
    channels, size, has_scale = stage

    def empty(*shape: int, like: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=like, device="meta")

    def run(stem: str, x: Tensor, others: tuple[Tensor | None, ...], *options: Any) -> None:
        module = importlib.import_module(f"convnest_kernels.triton.{stem}")
        module.forward(x, *others, *options, False)
        y, *kept = module.forward(x, *others, *options, True)
        needs = [True, *(other is not None for other in others)]
        activations = [x]
        if stem == "layernorm_residual":
            activations, others = [x, others[0]], others[1:]
        module.backward(y, *activations, *kept, *others, *options, needs)

    wide = 12 * channels
    x = empty(128, size, size, wide, like=dtype)
    t = empty(128, size, size, channels, like=dtype)
    conv, vector, narrow = empty(wide, 1, 7, 7), empty(wide), empty(channels)
    with aot.record(arch) as launches:
        run("nested_conv", x, (conv, vector, vector, vector), 1e-6, True)
        run("layernorm_residual", t, (t, narrow, narrow, narrow if has_scale else None), 1e-6)
        for norm_first in (False, True) if designs else ():
            run(
                "dwconv_gelu_layernorm", x, (conv, vector, vector, vector), 1e-6, "gelu", norm_first
            )
            run("gelu_layernorm", x, (vector, vector), 1e-6, norm_first)
    return launches


def model_launches(arch: str, dtypes: Iterable[torch.dtype] = DTYPES) -> list[aot.Launch]:
    """Every distinct launch of the 14 models' blocks, and of the other designs at the size T."""
    found: dict[aot.Launch, None] = {}
    for dtype in dtypes:
        for stage in stages():
            for launch in stage_launches(arch, dtype, stage, designs=stage[0] in _TINY):
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
            launches = stage_launches(arch, torch.bfloat16, (48, 56, False))
        finally:
            heuristics.uses_matrix_form = chosen
            heuristics.conv_tile.cache_clear()
        for launch in launches:
            tile = dict(launch.constexprs)
            if "depthwise" not in launch.kernel or tile.get("STORE_SUM") is False:
                continue
            threads = 32 * dict(launch.options)["num_warps"]
            outputs = tile["BLOCK_P"] * tile["BLOCK_W"] * tile["BLOCK_C"] / threads
            loop = aot.loop_mix(aot.compile_launch(launch, arch).asm["cubin"])
            row = aot.report(launch, arch)
            counts = {name: round(count / outputs, 2) for name, count in loop.most_common()}
            lines.append(
                {
                    "arch": arch,
                    "kernel": row.kernel,
                    "registers": row.registers,
                    "spills": row.spills,
                    "shared": row.shared,
                    "occupancy": row.occupancy,
                    "per_output": round(sum(counts.values()), 1),
                    "mix": counts,
                }
            )
    return lines


def forms_table(lines: list[dict[str, Any]]) -> str:
    """A Markdown table of `compare_forms`."""
    shown = ("FFMA", "FFMA2", "HMMA", "MUFU", "LDG", "LDS", "STS", "BAR", "SHFL")
    measured = ("registers", "shared", "occupancy")
    rows = [["arch", "kernel", "per output", *shown, *measured]]
    for line in lines:
        mix = line["mix"] | {"LDS": line["mix"].get("LDS", 0) + line["mix"].get("LDSM", 0)}
        row = [line["arch"], line["kernel"], str(line["per_output"])]
        row += [f"{mix.get(name, 0):g}" for name in shown]
        rows.append([*row, *(str(line[name]) for name in measured)])
    return markdown(rows, left=2)


def markdown(rows: list[list[str]], left: int) -> str:
    """A Markdown table, header first; all but the first `left` columns are numbers."""
    header, *body = rows
    rule = ["---"] * left + ["--:"] * (len(header) - left)
    return "".join(f"| {' | '.join(row)} |\n" for row in [header, rule, *body])


def update(archs: Iterable[str], processes: int, again: bool, path: Path = aot_table.PATH) -> None:
    """Compile what the table lacks for these architectures, and drop what nothing launches."""
    archs = list(archs)
    wanted = {
        (arch, launch.digest): (launch, arch) for arch in archs for launch in model_launches(arch)
    }
    kept = [row for row in aot_table.read(path) if row.arch not in archs or not again]
    known = {
        (row.arch, row.launch): row
        for row in kept
        if row.arch not in archs or _is_current(row, wanted)
    }
    jobs = [job for key, job in wanted.items() if key not in known]
    print(f"{len(jobs)} of {len(wanted)} to compile", file=sys.stderr, flush=True)
    with ProcessPoolExecutor(processes) as pool:
        futures = {pool.submit(aot.report, *job): job for job in jobs}
        for i, future in enumerate(as_completed(futures), 1):
            row = future.result()
            known[row.arch, row.launch] = row
            for fault in row.faults:
                print("over budget:", row, fault, file=sys.stderr, flush=True)
            if i % 100 == 0 or i == len(jobs):
                print(f"{i} of {len(jobs)}", file=sys.stderr, flush=True)
                aot_table.write(known.values(), path)
    aot_table.write(known.values(), path)


def _is_current(row: Row, wanted: dict[tuple[str, str], tuple[aot.Launch, str]]) -> bool:
    if (row.arch, row.launch) not in wanted:
        return False
    launch, _ = wanted[row.arch, row.launch]
    return (row.source, row.triton) == (aot.source_digest(launch.kernel), triton.__version__)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.triton_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--forms", action="store_true", help="compare the convolution's two forms")
    parser.add_argument("--all", action="store_true", help="compile what has not changed, too")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    if options.forms:
        nvidia = [arch for arch in options.arch if not arch.startswith("gfx")]
        lines = [line for arch in nvidia for line in compare_forms(arch)]
        listed = ",\n".join(json.dumps(line) for line in lines)
        (RESULTS / "triton_forms.json").write_text(f"[\n{listed}\n]\n")
        (RESULTS / "triton_forms.md").write_text(forms_table(lines))
        return 0
    update(options.arch, options.processes, options.all)
    rows = aot_table.read()
    (RESULTS / "triton_kernels.md").write_text(summary_page(rows))
    faults = [(row, fault) for row in rows for fault in row.faults]
    for fault in faults:
        print("over budget:", *fault, file=sys.stderr)
    return 1 if faults else 0


def summary_page(rows: list[Row]) -> str:
    """The text of bench/results/triton_kernels.md."""
    versions = " and ".join(sorted({row.triton for row in rows}))
    return (
        f"{len(rows)} kernels of the 14 models, compiled by Triton {versions}; not run. Ranges are "
        "over all tiles;\nthe mix is that of the largest. One row each: "
        "`convnest_kernels/triton/compile_report.csv`.\nBy `python -m bench.triton_report`.\n\n"
        + markdown(aot_table.summary(rows), left=3)
    )


if __name__ == "__main__":
    raise SystemExit(main())
