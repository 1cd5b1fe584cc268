"""Alignment of plain-text tables; `doctor` needs nothing that is not installed anyway."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with aligned columns, the first row being the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def short(dtype: object) -> str:
    """A torch dtype's name without its module."""
    return str(dtype).removeprefix("torch.")
