"""What a run shows: a progress bar, a line per epoch, the closing table."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table


class Display:
    """Lines and one progress bar; to stderr where stdout is kept for JSON."""

    def __init__(self, json: bool) -> None:
        self.console = Console(stderr=json, highlight=False, markup=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def line(self, text: str) -> None:
        self.console.print(text)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        table = Table(title=title, title_justify="left", title_style="bold")
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def bar(self, text: str, total: int, done: int = 0) -> Display:
        """Begin a bar; use it as a context manager, and `advance` inside."""
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task(text, total=total, completed=done)
        return self

    def __enter__(self) -> Display:
        assert self._progress is not None
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._progress is not None
        self._progress.stop()
        self._progress = None

    def update(self, **fields: Any) -> None:
        """Change the bar: `advance=1`, `completed=3`, `total=10`, `description="..."`."""
        assert self._progress is not None
        self._progress.update(self._task, **fields)
