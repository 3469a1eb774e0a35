"""The progress of a job on standard error: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from time import monotonic

QUIET_SECONDS = 2.0  # a shorter job prints no progress where there is no terminal


class Progress:
    """Shows a bar on a terminal, else a line after 2, 4, 8, ... seconds or `every_update`; used in a `with` statement.

    `total` is the value of `completed` at the end, if known. There is no bar on a terminal that shows `rows` meanwhile.
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
        self._total, self._every_update, self._begun = total, every_update, monotonic()
        self._printed_at, self._unprinted = 0.0, ""

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def update(self, completed: float | None, text: str) -> None:
        """Show how far the job is, in units of `total`, and a text."""
        seconds, self._unprinted = monotonic() - self._begun, text
        if self._live:
            self._bar.update(self._task, completed=completed, description=text)
        elif self._every_update or seconds >= max(QUIET_SECONDS, 2 * self._printed_at):
            self.say(text)
            self._printed_at, self._unprinted = seconds, ""

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
        if self._printed_at and self._unprinted:
            self.say(self._unprinted)
