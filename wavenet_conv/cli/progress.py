"""The progress of a job on standard error."""

from __future__ import annotations

import sys
from time import monotonic


class Progress:
    """Shows a bar on a terminal, in a `with` statement; elsewhere a line per update if `every_update`, else nothing.

    `total` is the value of `completed` at the end, if known. There is no bar on a terminal that shows `rows` meanwhile.
    """

    def __init__(self, total: float | None = None, rows: bool = False, every_update: bool = False, quiet: bool = False):
        from rich import progress  # takes longer to import than a usage error to print
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False, quiet=quiet)
        self._live = self._console.is_terminal and not (rows and sys.stdout and sys.stdout.isatty())
        text = progress.TextColumn("{task.description}", markup=False)
        columns = (text, progress.BarColumn(), progress.TimeRemainingColumn())
        self._bar = progress.Progress(*columns, console=self._console, disable=not self._live)
        self._task, self._every_update, self._begun = self._bar.add_task("", total=total), every_update, monotonic()

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def update(self, completed: float | None, text: str) -> None:
        """Show how far the job is, in units of `total`, and a text."""
        if self._live:
            self._bar.update(self._task, completed=completed, description=text)
        elif self._every_update:
            self.say(text)

    def update_lines(self, lines: int, completed: float) -> None:
        """Show a number of lines, and lines per second."""
        self.update(completed, f"{lines:,} lines, {lines / max(monotonic() - self._begun, 1e-3):,.0f} lines/s")

    def say(self, text: str) -> None:
        """Print a line, above the bar."""
        self._console.print(text)

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
