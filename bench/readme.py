"""The README's performance section, made from committed results; never edited by hand.

python -m bench.readme            # write it
python -m bench.readme --check    # exit with 1 where it differs
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from bench import report
from bench.cells import Cell
from bench.store import Store

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
BEGIN = "<!-- performance: made by `python -m bench.readme` from bench/results; do not edit -->"
END = "<!-- end of performance -->"


def folders() -> list[Path]:
    """The results folders, by name."""
    return sorted(path.parent for path in RESULTS.glob("*/results.json"))


def section() -> str:
    """The text between the markers."""
    parts = [part for folder in folders() for part in _of_folder(folder)]
    return "\n".join([BEGIN, "", *(parts or ["No results are committed yet.", ""]), END])


def _of_folder(folder: Path) -> list[str]:
    results = Store(folder).read()
    machine = results["machine"]
    pairs = [
        (cell, record)
        for cell, record in report.ordered(results)
        if report.ours(record) and report.best_peer(record)
    ]
    where = folder.relative_to(ROOT).as_posix()
    threads = sorted({cell.threads for cell, _ in pairs})
    on_cpu = f", {' and '.join(map(str, threads))} thread{'s' * (threads != [1])}"
    lines = [
        f"**{machine.get('gpu') or machine['processor']}** ({machine['family']}"
        f"{'' if 'gpu' in machine else on_cpu}), torch {machine['versions']['torch']}; all "
        f"figures, samples, plots and the command are in [{where}]({where}/README.md). "
        "Speed-up is over eager PyTorch in channels_last; the best peer is the fastest of eager, "
        "torch.compile (frozen in inference), ONNX Runtime and OpenVINO where they apply; medians "
        f"of one interleaved run ({_sample_counts(pairs)} samples each). The floor is the "
        "arithmetic at the machine's measured rates; where a shared machine was slow for a while, "
        "the part of the floor falls and the ratios do not. "
        "Malloc is tuned to keep its memory, unless it says default: page faults then count, on "
        "every side.",
        "",
    ]
    lines += _stage_table(pairs, "block", "One block of ConvNeSt-T, ours")
    lines += _network_table(pairs)
    lines += _operator_table(pairs)
    lines += _losses(pairs)
    if (folder / "speedup.png").exists():
        lines += [f"![Speed-up by stage]({where}/speedup.png)", ""]
    return lines


def _sample_counts(pairs: list[Any]) -> str:
    counts = {
        len(found["samples"])
        for _, record in pairs
        for found in record["contenders"].values()
        if "samples" in found
    }
    return f"{min(counts)} to {max(counts)}" if counts else "no"


def _group(pairs: list[Any]) -> dict[tuple[Any, ...], list[Any]]:
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for cell, record in pairs:
        key = cell.subject, cell.mode, cell.dtype, cell.batch, cell.allocator
        groups.setdefault(key, []).append((cell, record))
    return groups


def _versus_peer(record: dict[str, Any]) -> float:
    """How many times as fast as the best peer; below 1 we lose."""
    name, peer = report.ours(record), report.best_peer(record)
    assert name is not None and peer is not None
    ratio = report.speed_up(record, name, peer)
    assert ratio is not None
    return ratio


def _stage_table(pairs: list[Any], subject: str, title: str) -> list[str]:
    groups = {k: v for k, v in _group(pairs).items() if k[0] == subject}
    if not groups:
        return []
    lines = [
        f"{title}, at its stages 1 to 4:",
        "",
        "| mode | speed-up over eager | over the best peer | of the floor |",
        "|---|---|---|---|",
    ]
    for (_, mode, dtype, batch, allocator), found in groups.items():
        name = f"{mode}, {dtype}, batch {batch}" + ", default malloc" * (allocator == "default")
        eager, peer, floor = [], [], []
        by_stage = {cell.stage: record for cell, record in found}
        for stage in range(1, 5):
            record = by_stage.get(stage)
            ours = report.ours(record) if record else None
            if record is None or ours is None:
                for column in (eager, peer, floor):
                    column.append("–")
                continue
            ratio = report.speed_up(record, ours)
            eager.append(f"{ratio:.2f}" if ratio else "–")
            peer.append(_bold(_versus_peer(record)))
            bound = record.get("floor")
            floor.append(f"{bound / record['contenders'][ours]['median']:.0%}" if bound else "–")
        columns = (" / ".join(column) for column in (eager, peer, floor))
        lines.append(f"| {name} | " + " | ".join(columns) + " |")
    return [*lines, ""]


def _bold(ratio: float) -> str:
    """A loss stands out."""
    return f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**"


def _network_table(pairs: list[Any]) -> list[str]:
    chosen = [(c, r) for c, r in pairs if not c.stage]
    if not chosen:
        return []
    lines = [
        "Whole networks at 224², images/s (training: forward, backward and AdamW):",
        "",
        "| | ours | eager | best peer | timm ConvNeXt of the same size, best | kept MB, ours and "
        "eager |",
        "|---|---|---|---|---|---|",
    ]
    for cell, record in chosen:
        found = record["contenders"]

        def rate(name: str | None, found: Any = found, cell: Cell = cell) -> str:
            seconds = found.get(name, {}).get("median") if name else None
            return f"{cell.batch / seconds:.3g}" if seconds else "–"

        other = [n for n in found if n.startswith("convnext") and "median" in found[n]]
        other.sort(key=lambda name, found=found: found[name]["median"])
        ours, peer = report.ours(record), report.best_peer(record)
        kept = [found[n].get("kept_for_backward") for n in (ours, report.REFERENCE) if n in found]
        kept_text = ", ".join(f"{k / 1e6:.0f}" for k in kept if k is not None)
        lines.append(
            f"| {cell.subject}, {cell.dtype}, batch {cell.batch} | {rate(ours)} | "
            f"{rate(report.REFERENCE)} | {rate(peer)} ({peer}) | "
            f"{rate(other[0]) + f' ({other[0]})' if other else '–'} | {kept_text or '–'} |"
        )
    return [*lines, ""]


def _operator_table(pairs: list[Any]) -> list[str]:
    groups = {
        key: found
        for key, found in _group(pairs).items()
        if key[0] not in ("block", "model", "training")
    }
    if not groups:
        return []
    lines = [
        "The operators alone, over the best peer, stages 1 to 4:",
        "",
        "| operator | mode | over the best peer | of the floor |",
        "|---|---|---|---|",
    ]
    for (subject, mode, dtype, batch, _), found in groups.items():
        by_stage = {cell.stage: record for cell, record in found}
        ratios, floors = [], []
        for stage in range(1, 5):
            record = by_stage.get(stage)
            ours = report.ours(record) if record else None
            if record is None or ours is None:
                ratios.append("–")
                floors.append("–")
                continue
            ratios.append(_bold(_versus_peer(record)))
            bound = record.get("floor")
            floors.append(f"{bound / record['contenders'][ours]['median']:.0%}" if bound else "–")
        lines.append(
            f"| `{subject}` | {mode}, {dtype}, batch {batch} | {' / '.join(ratios)} | "
            f"{' / '.join(floors)} |"
        )
    return [*lines, ""]


def _losses(pairs: list[Any]) -> list[str]:
    """Where we lose, in words; medians whose p20 to p80 overlap are called a draw."""
    lost, drawn = [], []
    for cell, record in pairs:
        ratio = _versus_peer(record)
        if ratio >= 1:
            continue
        ours, peer = report.ours(record), report.best_peer(record)
        assert ours is not None and peer is not None
        a, b = record["contenders"][ours], record["contenders"][peer]
        where = f"stage {cell.stage}, " if cell.stage else ""
        text = (
            f"{cell.subject} ({where}batch {cell.batch}, {cell.dtype}, {cell.mode}"
            f"{', default malloc' * (cell.allocator == 'default')}): {ratio:.2f} times {peer}'s "
            "speed"
        )
        (drawn if a["p20"] <= b["p80"] else lost).append(text)
    gains = [_versus_peer(record) for _, record in pairs]
    lines = [
        f"Over all {len(pairs)} cells ours is {statistics.geometric_mean(gains):.2f} times as fast "
        f"as the best peer (geometric mean; {min(gains):.2f} to {max(gains):.2f}). "
        f"**Where we lose:** {len(lost)} of {len(pairs)} cells"
        + (":" if lost else ".")
    ]  # fmt: skip
    lines += ["", *(f"- {text}" for text in lost)] if lost else []
    if drawn:
        lines += ["", f"Behind, but within the spread of the samples: {'; '.join(drawn)}."]
    return [*lines, ""]


def replaced(text: str, made: str) -> str:
    """A README with the section in the place of the one it has."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md must have the lines {BEGIN!r} and {END!r}")
    return before + made + after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = README.read_text()
    wanted = replaced(text, section())
    if options.check:
        if text != wanted:
            print("README.md differs from bench/results: run python -m bench.readme")
        return int(text != wanted)
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
