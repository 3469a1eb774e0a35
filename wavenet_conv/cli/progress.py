"""The progress of a job on standard error: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from time import monotonic

QUIET_SECONDS = 2.0  # a shorter job prints no progress where there is no terminal


class Progress:
    """Shows a bar on a terminal, else a line after 2, 4, 8, ... seconds; used in a `with` statement.

    Args:
        total: The value of `completed` at the end; None if this is not known.
        rows: Whether standard output gets rows meanwhile; there is no bar where they are on a terminal themselves.
        every_update: Whether each update is a line where there is no bar.
        quiet: Whether nothing is shown.
    """

    def __init__(
        self, total: float | None = None, *, rows: bool = False, every_update: bool = False, quiet: bool = False
    ):
        from rich import progress  # takes longer to import than a usage error to print
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False, quiet=quiet)
        self._live = self._console.is_terminal and not (rows and sys.stdout and sys.stdout.isatty())
        text = progress.TextColumn("{task.description}", markup=False)
        columns = (text, progress.BarColumn(), progress.TimeRemainingColumn())
        self._bar = progress.Progress(*columns, console=self._console, disable=not self._live)
        self._task = self._bar.add_task("", total=total)
        self._total, self._every_update, self._begun, self._wait = total, every_update, monotonic(), QUIET_SECONDS
        self._text = self._printed = ""

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def update(self, completed: float | None, text: str) -> None:
        """Show how far the job is, in units of `total`, and a text."""
        self._text = text
        if self._live:
            self._bar.update(self._task, completed=completed, description=text)
        elif self._every_update or monotonic() - self._begun >= self._wait:
            self._wait *= 2
            self._print()

    def update_lines(self, lines: int, completed: float) -> None:
        """Show a number of lines, the share of `total` that is completed, and lines per second."""
        share = f" ({completed / self._total:.0%})" if self._total else ""
        rate = lines / max(monotonic() - self._begun, 1e-3)
        self.update(completed, f"{lines:,} lines{share}, {rate:,.0f} lines/s")

    def say(self, text: str) -> None:
        """Print a line, above the bar."""
        self._console.print(text)

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
        if self._printed not in ("", self._text):
            self._print()

    def _print(self) -> None:
        self._console.print(self._text)
        self._printed = self._text
