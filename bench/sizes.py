"""Every kernel size of the operators on a GPU, on each backend: what "auto" goes by.

    python -m bench.sizes                      # into bench/results/<GPU>/sizes.json and sizes.md
    python -m bench.sizes --compile 15         # Triton's kernels alone, in 15 processes beforehand

A stage of ConvNeSt-T (2 by default) at batch 128, bfloat16 and float32. Times are those of CUDA
graphs (of forward, and of forward with backward), the L2 cache overwritten before each replay: the
median of 10. Accuracy is what the tests hold, not this.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import machine, process, timing
from bench.cases import CONV_OPERATORS, OPERATORS, Case, make_inputs, stage_cases
from convnest_kernels.triton.heuristics import KERNEL_SIZES

BACKENDS = ("cuda", "triton", "eager")
DTYPES = ("bfloat16", "float32")
SAMPLES = 10


def cases(stage: int, batch: int, kernel_sizes: list[int]) -> list[Case]:
    found = []
    for operator in OPERATORS:
        case = stage_cases("convnest_tiny", batch, operator)[stage - 1]
        sizes = kernel_sizes if operator in CONV_OPERATORS else [7]
        found += [dataclasses.replace(case, kernel_size=size) for size in sizes]
    return found


def calls(case: Case, dtype: str, backend: str) -> dict[str, Callable[[], Any]]:
    """Forward without gradients, and a training step."""
    one = dataclasses.replace(case, shape=(1, *case.shape[1:]))  # drawing all of it takes long
    small = make_inputs(one, getattr(torch, dtype), device="cuda")

    def whole(x: Tensor | None) -> Tensor | None:
        if x is None or x.shape != one.shape:
            return x
        drawn = torch.randn(case.shape, device="cuda", dtype=x.dtype)
        return drawn.requires_grad_(x.requires_grad)

    tensors = [whole(x) for x in small.args]
    wanted = [x for x in tensors if x is not None]
    dy = whole(small.dy)

    def infer() -> Tensor:
        with torch.no_grad():
            return case.function(*tensors, backend=backend)

    def train() -> tuple[Tensor, ...]:
        return torch.autograd.grad(case.function(*tensors, backend=backend), wanted, dy)

    return {"infer": infer, "train": train}


def measure(case: Case, dtype: str, backend: str, clock: timing.CudaClock) -> dict[str, float]:
    """Seconds of both modes."""
    found = {}
    for mode, call in calls(case, dtype, backend).items():
        try:
            replay = timing.as_graph(call)
        except RuntimeError:  # what cannot be captured is timed with its launches
            replay = call
        seconds = [clock.sample(replay, 1)[0] for _ in range(SAMPLES)]
        found[mode] = float(f"{statistics.median(seconds):.4g}")
        del replay
        torch.cuda.empty_cache()
    return found


def compile_one(case: Case, dtype: str) -> None:
    """Fill Triton's cache."""
    small = dataclasses.replace(case, shape=(2, *case.shape[1:]))
    for call in calls(small, dtype, "triton").values():
        call()
    torch.cuda.synchronize()


def page(results: dict[str, Any]) -> str:
    lines = [
        "# Kernel sizes and dtypes on each GPU backend",
        "",
        f"{results['machine']['gpu']}, stage {results['stage']} of ConvNeSt-T at batch "
        f"{results['batch']}, torch {results['machine']['versions']['torch']}, "
        f"`{results['command']}`; ms of forward / of a training step, medians of {SAMPLES}.",
        "",
        f"| operator | kernel | dtype | {' | '.join(BACKENDS)} |",
        "|---" * (3 + len(BACKENDS)) + "|",
    ]
    for row in results["rows"]:
        size = f"{row['kernel_size']}×{row['kernel_size']}" if row["kernel_size"] else "–"
        cells = [
            f"{1e3 * row[name]['infer']:.3f} / {1e3 * row[name]['train']:.3f}" for name in BACKENDS
        ]
        lines.append(f"| `{row['operator']}` | {size} | {row['dtype']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--stage", type=int, default=2, choices=range(1, 5))
    add("--batch", type=int, default=128)
    add("--kernel-sizes", type=int, nargs="+", default=list(KERNEL_SIZES), choices=KERNEL_SIZES)
    add("--compile", type=int, metavar="PROCESSES", help="compile Triton's kernels alone")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch sees no GPU here", file=sys.stderr)
        return 2
    wanted = list(itertools.product(cases(args.stage, args.batch, args.kernel_sizes), DTYPES))
    if args.compile:
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(
            args.compile, spawn, process.end_with_parent
        ) as pool:
            for future in [pool.submit(compile_one, *one) for one in wanted]:
                future.result()
        return 0
    clock = timing.CudaClock()
    found = machine.describe("cuda")
    results: dict[str, Any] = {
        "machine": found, "stage": args.stage, "batch": args.batch, "rows": [],
        "command": " ".join(["python -m bench.sizes", *sys.argv[1:]]),
    }  # fmt: skip
    folder = Path(__file__).parent / "results" / machine.folder(found["gpu"])
    folder.mkdir(parents=True, exist_ok=True)
    for case, dtype in wanted:
        row: dict[str, Any] = {
            "operator": case.operator,
            "kernel_size": case.kernel_size if case.operator in CONV_OPERATORS else 0,
            "dtype": dtype,
        }
        for backend in BACKENDS:
            row[backend] = measure(case, dtype, backend, clock)
        results["rows"].append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        # After each, so that a run which is cut off leaves what it took.
        (folder / "sizes.json").write_text(json.dumps(results, indent=1) + "\n")
        (folder / "sizes.md").write_text(page(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
