"""Two runs of the same cells: what changed by more than the spread.

    python -m bench.compare OLD_FOLDER NEW_FOLDER

What is compared is each contender's ratio to the reference contender of its own run, not its time:
a machine that was slower that day moves both.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bench import report
from bench.store import Store, cell_of


def spread(found: dict[str, Any]) -> float:
    """How far p20 and p80 are from the median, as a part of it."""
    return (found["p80"] - found["p20"]) / found["median"] / 2


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A line for each contender whose ratio to the reference moved by more than the spread."""
    lines = []
    for key in sorted(old["records"].keys() & new["records"].keys()):
        before, after = old["records"][key], new["records"][key]
        for name in before["contenders"]:
            was = report.speed_up(before, name)
            now = report.speed_up(after, name) if name in after["contenders"] else None
            if was is None or now is None or name == report.REFERENCE:
                continue
            parts = [
                record["contenders"][n]
                for record in (before, after)
                for n in (name, report.REFERENCE)
            ]
            allowed = sum(spread(part) ** 2 for part in parts) ** 0.5
            if abs(now / was - 1) > allowed:
                word = "faster" if now > was else "SLOWER"
                lines.append(
                    f"{name} {word}: {was:.2f}× to {now:.2f}× of {report.REFERENCE} "
                    f"(spread {allowed:.0%}): {cell_of(after).title}"
                )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args()
    found = changes(Store(options.old).read(), Store(options.new).read())
    print("\n".join(found) or "nothing moved by more than the spread")
    return int(any("SLOWER" in line for line in found))


if __name__ == "__main__":
    sys.exit(main())
