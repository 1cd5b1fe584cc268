"""Tables of results, with ratios and fractions: rich in a terminal, Markdown for pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.cells import Cell
from bench.contenders import CONTENDERS, REFERENCE
from bench.store import cell_of
from bench.timing import WANTED_SAMPLES

PREDICTED = Path(__file__).parent / "results" / "cuda_predicted.md"
HEAD = [
    "contender", "ms", "p20 to p80", "samples", "speed-up", "of floor", "kept MB", "peak MB",
    "RSS MB", "faults",
]  # fmt: skip


def ordered(results: dict[str, Any]) -> list[tuple[Cell, dict[str, Any]]]:
    """Records by subject, mode, dtype, allocator, memory format, batch and stage."""
    pairs = [(cell_of(record), record) for record in results["records"].values()]

    def key(pair: tuple[Cell, dict[str, Any]]) -> tuple[Any, ...]:
        c = pair[0]
        how = c.mode, c.dtype != "float32", c.allocator, c.memory_format
        return c.subject, *how, c.batch, c.stage, c.key

    return sorted(pairs, key=key)


def speed_up(record: dict[str, Any], name: str, over: str = REFERENCE) -> float | None:
    """How many times as fast as `over`, by medians of one run; None if either is not there."""
    found = record["contenders"]
    if any("median" not in found.get(n, {}) for n in (name, over)):
        return None
    return found[over]["median"] / found[name]["median"]


def ours(record: dict[str, Any]) -> str | None:
    """The fastest of our backends that was timed."""
    return _fastest(record, True)


def best_peer(record: dict[str, Any]) -> str | None:
    """The fastest contender that does the same job and is not ours."""
    return _fastest(record, False)


def _fastest(record: dict[str, Any], is_ours: bool) -> str | None:
    timed = {
        name: found["median"]
        for name, found in record["contenders"].items()
        if "median" in found
        and CONTENDERS[name].ours == is_ours
        and not name.startswith("convnext")  # another network: beside, not instead
    }
    return min(timed, key=lambda name: timed[name]) if timed else None


def rows(record: dict[str, Any]) -> list[list[str]]:
    """A table's lines of one cell, fastest first; then who did not take part, and why."""
    timed = {n: f for n, f in record["contenders"].items() if "median" in f}
    lines = []
    for name, found in sorted(timed.items(), key=lambda item: item[1]["median"]):
        ratio = speed_up(record, name)
        floor = record.get("floor")
        own = not name.startswith("convnext")
        memory = [
            found.get(kind) for kind in ("kept_for_backward", "peak_allocated", "peak_resident")
        ]
        faults = found.get("page_faults")
        lines.append(
            [
                name,
                f"{1e3 * found['median']:.3g}",
                f"{1e3 * found['p20']:.3g} to {1e3 * found['p80']:.3g}",
                str(len(found["samples"])),
                f"{ratio:.2f}×" if ratio else "",
                f"{floor / found['median']:.0%}" if floor and own else "",
                *("" if m is None else f"{m / 1e6:.1f}" for m in memory),
                "" if faults is None else f"{faults:.0f}",
            ]
        )
    return lines


def absent(record: dict[str, Any]) -> list[str]:
    """Who was skipped or refused, with the reason."""
    lines = [f"cell failed: {record['failed']}"] if "failed" in record else []
    for name, found in record["contenders"].items():
        for state in ("skipped", "refused"):
            if state in found:
                lines.append(f"{name} {state}: {found[state]}")
    return lines


def print_table(results: dict[str, Any]) -> None:
    """A rich table for each cell."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=max(Console().width, 126))
    for cell, record in ordered(results):
        table = Table(title=cell.title, title_justify="left", title_style="bold")
        for i, column in enumerate(HEAD):
            table.add_column(column, justify="left" if i == 0 else "right")
        for line in rows(record):
            mark = "bold green" if CONTENDERS[line[0]].ours else None
            table.add_row(*line, style=mark)
        console.print(table)
        for line in absent(record):
            console.print(f"  {line}", style="dim", markup=False)


def markdown(results: dict[str, Any]) -> str:
    """All cells, and the machine with its limits."""
    machine = results["machine"] or {}
    commits = {
        record["conditions"]["commit"]
        for record in results["records"].values()
        if record.get("conditions", {}).get("commit")
    } or {machine.get("commit")}
    versions = ", ".join(f"{n} {v}" for n, v in machine.get("versions", {}).items())
    lines = [
        "# Benchmark results",
        "",
        f"Machine: {_machine(machine)}, {machine.get('system')}. "
        f"Versions: Python {machine.get('python')}, {versions}. "
        f"Taken at {', '.join(sorted(map(str, commits)))}.",
        "",
        "Commands:",
        "",
        *(f"    {command}" for command in results["commands"]),
        "",
        "Speed-ups are over eager PyTorch in channels_last (NHWC), from medians of one interleaved "
        "run. The floor is the arithmetic (linear layers, taps inside the image, erf GELUs) at the "
        "measured rates, or the bytes at the measured bandwidth if that is more; training counts "
        "three times the arithmetic. Kept: for backward. Peak: of torch's own allocations during a "
        "call, without a kernel's own workspace; RSS: what the process gained in a call. "
        "Faults: page faults a call. "
        f"Where a line has fewer than {WANTED_SAMPLES} samples, its time was up. Checked against "
        "float64 before a time was taken: blocks and operators up to 8 images in full, of larger "
        "batches 8 images, of whole networks 2 (the timed batch's first and last among them).",
        "",
        *_limits(results["limits"]),
    ]
    for cell, record in ordered(results):
        lines += ["", f"## {cell.title}", ""]
        lines += ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
        lines += ["| " + " | ".join(line) + " |" for line in rows(record)]
        lines += [""] + [f"- {line}" for line in absent(record)]
    return "\n".join(lines) + "\n"


def _machine(machine: dict[str, Any]) -> str:
    if "gpu" not in machine:
        kernels = machine.get("isa")
        return f"{machine.get('processor')} ({machine.get('family')}, kernels for {kernels})"
    driver = (machine.get("nvidia-smi") or {}).get("driver_version")
    return f"{machine['gpu']} (compute capability {machine['capability']}, driver {driver})"


def page(results: dict[str, Any]) -> str:
    """The README of a results folder; what is only predicted has its own page."""
    text = markdown(results)
    if "gpu" not in (results["machine"] or {}):
        text += (
            f"\nGPU kernels: predicted, not measured, in [{PREDICTED.name}](../{PREDICTED.name}).\n"
        )
    return text


def with_predictions(results: dict[str, Any]) -> str:
    """All cells and, in its own section, what is only predicted."""
    text = markdown(results)
    if "gpu" not in (results["machine"] or {}) and PREDICTED.exists():
        title, _, body = PREDICTED.read_text().partition("\n")
        body = body.replace("\n# ", "\n## ")
        text += f"\n# Predicted, not measured: the GPU kernels\n\n#{title}\n{body}"
    return text


def size_name(size: int) -> str:
    """Bytes in KiB or MiB."""
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


def _limits(limits: dict[str, Any] | None) -> list[str]:
    if limits is None:
        return []
    if "copy" in limits:
        rates = [f"copy {limits['copy'] / 1e9:.0f} GB/s"]
        rates += [
            f"{dtype} matmul {limits[dtype] / 1e12:.1f} TFLOP/s"
            for dtype in ("float32", "bfloat16", "float16")
        ]
        return ["Measured limits: " + ", ".join(rates) + "."]
    copies = ", ".join(
        f"{rate / 1e9:.0f} GB/s within {size_name(size)}" for size, rate in limits["bandwidths"]
    )
    return [
        "Measured limits of the cores used: "
        f"{limits['float32_flops'] / 1e9:.0f} GFLOP/s float32 FMA, "
        f"{limits['bfloat16_flops'] / 1e9:.0f} GFLOP/s bfloat16 dot, "
        f"{limits['gelus'] / 1e9:.2f} G GELU/s; copy {copies}."
    ]
