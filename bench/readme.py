"""The README's performance section and each results folder's page, made from committed results.

python -m bench.readme            # write it
python -m bench.readme --check    # exit with 1 where it differs
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import report
from bench.cells import Cell
from bench.store import Store
from bench.timing import WANTED_SAMPLES

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
BEGIN = "<!-- performance: made by `python -m bench.readme` from bench/results; do not edit -->"
END = "<!-- end of performance -->"
Pairs = list[tuple[Cell, dict[str, Any]]]


# Below this ratio of medians we lose, whatever the spread; two runs differ by less than 3%.
LOSS = 0.97


@dataclass(frozen=True)
class Folder:
    """A results folder and its cells in which ours and a peer were timed."""

    path: Path
    results: dict[str, Any]

    @functools.cached_property
    def pairs(self) -> Pairs:
        return [
            (cell, record)
            for cell, record in report.ordered(self.results)
            if report.ours(record) and report.best_peer(record)
        ]

    @property
    def where(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def machine(self) -> str:
        found = self.results["machine"]
        return found.get("gpu") or f"{found['processor']} ({found['family']})"

    @property
    def is_gpu(self) -> bool:
        return "gpu" in self.results["machine"]

    @property
    def threads(self) -> str:
        """Of a CPU, in words; nothing for a GPU."""
        if self.is_gpu:
            return ""
        counts = sorted({cell.threads for cell, _ in self.pairs})
        return f", {' and '.join(map(str, counts))} thread{'s' * (counts != [1])}"

    @property
    def torch(self) -> str:
        return f"torch {self.results['machine']['versions']['torch']}"

    @property
    def taken(self) -> str:
        """When its newest cell was."""
        return max(record.get("taken", "") for record in self.results["records"].values())


def folders() -> list[Folder]:
    """The results folders; of GPUs and of CPUs the largest of the newest machine comes first."""
    found = [
        Folder(path.parent, Store(path.parent).read())
        for path in sorted(RESULTS.glob("*/results.json"))
    ]
    newest: dict[str, str] = {}
    for folder in found:
        newest[folder.machine] = max(newest.get(folder.machine, ""), folder.taken)
    return sorted(found, key=lambda f: (newest[f.machine], len(f.pairs)), reverse=True)


def section() -> str:
    """The text between the markers: a machine of each kind, and a line for each other folder."""
    parts = []
    found = folders()
    others = []
    for title, is_gpu in (("### On a GPU", True), ("### On a CPU", False)):
        kind = [folder for folder in found if folder.is_gpu == is_gpu]
        if kind:
            parts += [title, "", *_in_full(kind[0])]
        others += kind[1:]
    if others:
        parts += ["Other results:", "", *(_in_a_line(f, found) for f in others), ""]
    return "\n".join([BEGIN, "", *(parts or ["No results are committed yet.", ""]), END])


PEERS = {
    True: "the best peer is the fastest of eager in both layouts and torch.compile, as they were "
    "ready; medians of one interleaved run between CUDA events, the L2 cache overwritten before "
    "each, inference replayed from CUDA graphs on every side",
    False: "the best peer is the fastest of eager, torch.compile (frozen in inference), ONNX "
    "Runtime, OpenVINO and zentorch, as they apply; medians of one interleaved run",
}
FLOOR = (
    "The floor is the arithmetic at the machine's measured rates; other work on the machine "
    "lowers the part of it, not the ratios; taps count as multiply-adds, also in bfloat16, where "
    "they come in pairs and may be faster. Malloc is tuned to keep its memory, unless it says "
    "default: page faults then count, on every side."
)


def _in_full(folder: Folder) -> list[str]:
    pairs = folder.pairs
    lines = [
        f"**{folder.machine}**{folder.threads}, {folder.torch}; all figures, samples, plots and "
        f"the commands are in [{folder.where}]({folder.where}/README.md). "
        f"Speed-up is over eager PyTorch in channels_last; {PEERS[folder.is_gpu]}, "
        f"{WANTED_SAMPLES} samples each unless fewer are named."
        + (f" {FLOOR}" if not folder.is_gpu else ""),
        "",
    ]
    lines += _stage_table(pairs, "block", "One block of ConvNeSt-T, ours")
    lines += _network_table(pairs)
    lines += _operator_table(pairs)
    lines += _losses(folder)
    if (folder.path / "speedup.png").exists():
        lines += [f"![Speed-up by stage]({folder.where}/speedup.png)", ""]
    return lines


def _in_a_line(folder: Folder, all_folders: list[Folder]) -> str:
    text = (
        f"- [{folder.machine}{folder.threads}]({folder.where}/README.md), {folder.torch}, "
        f"{len(folder.pairs)} cells: {_against_peers(folder)}"
    )
    # Of one day: a cell taken anew since then is of other kernels.
    single = {
        (cell, _day(record)): record["contenders"][report.ours(record)]["median"]
        for other in all_folders
        if other.machine == folder.machine
        for cell, record in other.pairs
        if cell.threads == 1
    }
    ones = [
        (record, (dataclasses.replace(cell, threads=1), _day(record)))
        for cell, record in folder.pairs
        if cell.threads > 1
    ]
    gains = [
        single[one] / record["contenders"][report.ours(record)]["median"]
        for record, one in ones
        if one in single
    ]
    if gains:
        text += (
            f"; {statistics.geometric_mean(gains):.2f} times as fast as with one thread on the "
            f"same day ({min(gains):.2f} to {max(gains):.2f}, {len(gains)} cells)"
        )
    lost = [name for name, ratio, _ in _behind(folder.pairs) if ratio < LOSS]
    return text + "; we lose " + (f"{len(lost)}: {', '.join(lost)}." if lost else "none.")


def _day(record: dict[str, Any]) -> str:
    return record.get("taken", "").partition(" ")[0]


def _against_peers(folder: Folder) -> str:
    gains = [_versus_peer(record) for _, record in folder.pairs]
    if not gains:
        return "none with a peer"
    return (
        f"{statistics.geometric_mean(gains):.2f} times as fast as the best peer (geometric mean; "
        f"{min(gains):.2f} to {max(gains):.2f})"
    )


def _few(records: list[dict[str, Any]]) -> str:
    """How many samples there were, where there were fewer than wanted."""
    counts = [
        len(found["samples"])
        for record in records
        for found in record["contenders"].values()
        if "samples" in found
    ]
    return f" ({min(counts)} samples)" if counts and min(counts) < WANTED_SAMPLES else ""


def _group(pairs: Pairs) -> dict[tuple[str, str], Pairs]:
    """Stages of one setting, which is named in words."""
    groups: dict[tuple[str, str], Pairs] = {}
    for cell, record in pairs:
        key = cell.subject, _setting(cell)
        groups.setdefault(key, []).append((cell, record))
    return groups


def _setting(cell: Cell) -> str:
    return (
        f"{cell.mode}, {cell.dtype}, batch {cell.batch}"
        + ", default malloc" * (cell.allocator == "default" and cell.device == "cpu")
        + ", contiguous" * (cell.memory_format == "contiguous")
        + f", {cell.variant}" * (cell.variant != "convnest_tiny")
    )


def _versus_peer(record: dict[str, Any]) -> float:
    """How many times as fast as the best peer; below 1 we lose."""
    name, peer = report.ours(record), report.best_peer(record)
    assert name is not None and peer is not None
    ratio = report.speed_up(record, name, peer)
    assert ratio is not None
    return ratio


def _stage_table(pairs: Pairs, subject: str, title: str) -> list[str]:
    groups = {k: v for k, v in _group(pairs).items() if k[0] == subject}
    if not groups:
        return []
    head = ["mode", "speed-up over eager", "over the best peer", *_floor_column(pairs)]
    lines = [f"{title}, at its stages 1 to 4:", "", _row(head), "|---" * len(head) + "|"]
    for (_, setting), found in groups.items():
        name = setting + _few([record for _, record in found])
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
        columns = [" / ".join(column) for column in (eager, peer, floor)]
        lines.append(_row([name, *columns][: len(head)]))
    return [*lines, ""]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _floor_column(pairs: Pairs) -> list[str]:
    """A CPU's column; a GPU's floor, bytes and linear layers, says little of what bounds these."""
    return [] if pairs[0][0].device == "cuda" else ["of the floor"]


def _bold(ratio: float) -> str:
    """A loss stands out."""
    return f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**"


def _network_table(pairs: Pairs) -> list[str]:
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
            if not seconds:
                return "–"
            rate = cell.batch / seconds
            return f"{rate:.3g}" if rate < 1000 else f"{rate:,.0f}"

        other = [n for n in found if n.startswith("convnext") and "median" in found[n]]
        other.sort(key=lambda name, found=found: found[name]["median"])
        ours, peer = report.ours(record), report.best_peer(record)
        kept = [found[n].get("kept_for_backward") for n in (ours, report.REFERENCE) if n in found]
        kept_text = ", ".join(f"{k / 1e6:.0f}" for k in kept if k is not None)
        lines.append(
            f"| {cell.subject}, {cell.dtype}, batch {cell.batch}{_few([record])} | {rate(ours)} | "
            f"{rate(report.REFERENCE)} | {rate(peer)} ({peer}) | "
            f"{rate(other[0]) + f' ({other[0]})' if other else '–'} | {kept_text or '–'} |"
        )
    return [*lines, ""]


def _operator_table(pairs: Pairs) -> list[str]:
    groups = {
        key: found
        for key, found in _group(pairs).items()
        if key[0] not in ("block", "model", "training")
    }
    if not groups:
        return []
    head = ["operator", "mode", "over the best peer", *_floor_column(pairs)]
    lines = [
        "The operators alone, over the best peer, stages 1 to 4:",
        "", _row(head), "|---" * len(head) + "|",
    ]  # fmt: skip
    for (subject, setting), found in groups.items():
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
        name = setting + _few([record for _, record in found])
        columns = [f"`{subject}`", name, " / ".join(ratios), " / ".join(floors)]
        lines.append(_row(columns[: len(head)]))
    return [*lines, ""]


def _behind(pairs: Pairs) -> list[tuple[str, float, str]]:
    """The cells in which a peer's median is the better one: its name, our ratio, what to add."""
    found = []
    for cell, record in pairs:
        ratio = _versus_peer(record)
        if ratio >= 1:
            continue
        ours, peer = report.ours(record), report.best_peer(record)
        assert ours is not None and peer is not None
        where = f"stage {cell.stage}, " if cell.stage else ""
        text = f"{cell.subject} ({where}{_setting(cell)}): {ratio:.2f} times {peer}'s speed"
        a, b = record["contenders"][ours], record["contenders"][peer]
        overlap = ", p20 to p80 overlap" if a["p20"] <= b["p80"] else ""
        found.append((text, ratio, overlap))
    return found


def _losses(folder: Folder) -> list[str]:
    """Where we lose, in words, and what could not be measured of ours."""
    lost = [text + overlap for text, ratio, overlap in _behind(folder.pairs) if ratio < LOSS]
    near = [text for text, ratio, _ in _behind(folder.pairs) if ratio >= LOSS]
    count = len(folder.pairs)
    lines = [
        f"Over all {count} cells ours is {_against_peers(folder)}. "
        f"**Where we lose:** {len(lost)} of {count} cells" + (":" if lost else "."),
        "",
    ]
    lines += [*(f"- {text}" for text in lost), ""] if lost else []
    if near:
        lines += [f"Behind by less than {1 - LOSS:.0%}: {'; '.join(near)}.", ""]
    timed = {cell for cell, _ in folder.pairs}
    absent = [
        f"{cell.title} ({'; '.join(report.absent(record)) or 'no peer'})"
        for cell, record in report.ordered(folder.results)
        if cell not in timed
    ]
    return [*lines, f"Not measured: {'; '.join(absent)}.", ""] if absent else lines


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
    wanted = replaced(README.read_text(), section())
    pages = {folder.path / "README.md": report.page(folder.results) for folder in folders()}
    pages[README] = wanted
    differs = [p for p, page in pages.items() if not p.exists() or p.read_text() != page]
    for path in differs:
        if options.check:
            print(f"{path} differs from bench/results: run python -m bench.readme")
        else:
            path.write_text(pages[path])
    return int(options.check and bool(differs))


if __name__ == "__main__":
    sys.exit(main())
