"""Time of each kernel of a training step on a GPU, by torch's profiler.

    python -m bench.kernels                            # cuda, into bench/results/<GPU>/kernels.*
    python -m bench.kernels --op nested_conv --stage 1 --backend cuda triton eager

Medians over 5 steps, the L2 cache overwritten before each. A pass is one wide tensor (the
operator's activation) moved at the copy bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench import floors, machine, sizes
from bench.cases import OPERATORS, Case, stage_cases

STEPS = 5
# Of the measurement itself, or of torch's casts of parameters.
LEFT_OUT = re.compile(
    r"^cuda|^cu[A-Z]|Activity Buffer|Lazy Function|Mem(set|cpy)|FillFunctor|copy_kernel"
)


def short(name: str) -> str:
    """A kernel's name without return type, namespaces, arguments and what it computes with."""
    name = re.sub(r"\(anonymous namespace\)::", "", name)
    name = re.sub(r"^void ", "", name)
    name = re.sub(r"\b(convnest::cuda|at::native|cudnn::cnn)::", "", name)
    return re.split(r"[(<]", name, maxsplit=1)[0] or name[:60]


def times(case: Case, dtype: str, backend: str, scratch: torch.Tensor) -> dict[str, float]:
    """Microseconds a step of each kernel."""
    train = sizes.calls(case, dtype, backend)["train"]
    train()
    train()
    found: dict[str, list[float]] = collections.defaultdict(list)
    for _ in range(STEPS):
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            scratch.zero_()
            train()
            torch.cuda.synchronize()
        step: dict[str, float] = collections.defaultdict(float)
        for event in profiled.events() or []:
            if not LEFT_OUT.search(event.name):
                step[short(event.name)] += event.time_range.elapsed_us()
        for name, spent in step.items():
            found[name].append(spent)
    return {name: round(statistics.median(spent), 1) for name, spent in found.items()}


def page(results: dict[str, Any]) -> str:
    copy = results["copy"]
    lines = [
        "# Time of each kernel of a training step",
        "",
        f"{results['machine']['gpu']}, {results['dtype']}, batch {results['batch']}, "
        f"`{results['command']}`: µs, and in brackets passes: wide tensors' worth of traffic at "
        f"the {copy / 1e9:.0f} GB/s of a copy.",
        "",
        "| operator | backend | kernel | stage 1 | stage 2 | stage 3 | stage 4 |",
        "|---" * 7 + "|",
    ]
    by_kernel: dict[tuple[str, str, str], dict[int, str]] = collections.defaultdict(dict)
    for row in results["rows"]:
        for name, spent in row["kernels"].items():
            passes = spent * 1e-6 * copy / row["wide_bytes"]
            cell = f"{spent:.0f} ({passes:.1f})"
            by_kernel[row["operator"], row["backend"], name][row["stage"]] = cell
    for (operator, backend, name), cells in by_kernel.items():
        columns = " | ".join(cells.get(stage, "–") for stage in range(1, 5))
        lines.append(f"| `{operator}` | {backend} | `{name}` | {columns} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--op", nargs="+", default=list(OPERATORS), choices=OPERATORS)
    add("--stage", nargs="+", type=int, default=[1, 2, 3, 4], choices=range(1, 5))
    add("--backend", nargs="+", default=["cuda"], choices=sizes.BACKENDS)
    add("--batch", type=int, default=128)
    add("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch sees no GPU here", file=sys.stderr)
        return 2
    scratch = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    rows = []
    for operator in args.op:
        for stage in args.stage:
            case = stage_cases("convnest_tiny", args.batch, operator)[stage - 1]
            wide = torch.Size(case.shape).numel() * getattr(torch, args.dtype).itemsize
            for backend in args.backend:
                kernels = times(case, args.dtype, backend, scratch)
                row = {"operator": operator, "stage": stage, "backend": backend}
                rows.append({**row, "wide_bytes": wide, "kernels": kernels})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
                torch.cuda.empty_cache()
    found = machine.describe("cuda")
    results = {
        "machine": found, "dtype": args.dtype, "batch": args.batch,
        "copy": floors.gpu_limits()["copy"], "rows": rows,
        "command": " ".join(["python -m bench.kernels", *sys.argv[1:]]),
    }  # fmt: skip
    folder = Path(__file__).parent / "results" / machine.folder(found["gpu"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "kernels.md").write_text(page(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
