"""A results folder: one results.json that runs add to, cell by cell, so that a run can go on."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.cells import Cell


class Store:
    """`machine`, `limits`, `commands` and `records` (by cell key) of a folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "results.json"

    def read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {"machine": None, "limits": None, "commands": [], "records": {}}
        results = json.loads(self.path.read_text())
        # By today's keys: a cell may have gained a field since the file was written.
        results["records"] = {cell_of(r).key: r for r in results["records"].values()}
        return results

    def update(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the file in one step, also beside other runs into the same folder."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            results = self.read()
            change(results)
            partial = self.path.with_suffix(".new")
            partial.write_text(_dump(results))
            os.replace(partial, self.path)

    def add(self, cell: Cell, record: dict[str, Any]) -> None:
        self.update(lambda results: results["records"].__setitem__(cell.key, record))


def _dump(results: dict[str, Any]) -> str:
    """JSON with a line for each record: diffs then show which cells were taken anew."""
    head = {key: value for key, value in results.items() if key != "records"}
    lines = [
        f"  {json.dumps(key)}: {json.dumps(record)}"
        for key, record in sorted(results["records"].items())
    ]
    body = ",\n".join(lines)
    return json.dumps(head, indent=1)[:-2] + ',\n "records": {\n' + body + "\n }\n}\n"


def cell_of(record: dict[str, Any]) -> Cell:
    return Cell(**record["cell"])
