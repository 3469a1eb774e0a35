"""The progress of a job on standard error: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

from time import monotonic
from types import TracebackType

from rich import progress
from rich.console import Console

QUIET_SECONDS = 2.0  # a job shorter than this prints no progress where there is no terminal


class Progress:
    """The progress of a job, used in a `with` statement.

    On a terminal it is a bar. Elsewhere it is a line after 2, 4, 8, ... seconds, or a line per update.

    Args:
        total: What `completed` ends at; None if this is not known.
        bar: Whether a terminal shows a bar. A command that writes rows to the same terminal wants none.
        every_update: Whether each update is a line where there is no bar.
        quiet: Whether nothing at all is shown, as on the ranks of a distributed job other than the first.
    """

    def __init__(
        self, total: float | None = None, *, bar: bool = True, every_update: bool = False, quiet: bool = False
    ):
        self._console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False, quiet=quiet)
        columns = (
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.TimeRemainingColumn(),
        )
        self._live = bar and self._console.is_terminal
        self._bar = progress.Progress(*columns, console=self._console, disable=not self._live)
        self._total, self._every_update = total, every_update
        self._task = self._bar.add_task("", total=total)
        self._begun, self._wait = monotonic(), QUIET_SECONDS
        self._text = self._printed = ""

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def update(self, completed: float | None, text: str) -> None:
        """Show how far the job is, in units of `total`, and a text."""
        self._text = text
        if self._live:
            self._bar.update(self._task, completed=completed, description=text)
        elif self._every_update:
            self._print()
        elif monotonic() - self._begun >= self._wait:
            self._wait *= 2
            self._print()

    def update_lines(self, lines: int, completed: float) -> None:
        """Show a number of lines, the share of `total` that is completed, and the lines per second."""
        share = f" ({completed / self._total:.0%})" if self._total else ""
        rate = lines / max(monotonic() - self._begun, 1e-3)
        self.update(completed, f"{lines:,} lines{share}, {rate:,.0f} lines/s")

    def say(self, text: str) -> None:
        """Print a line on standard error, above the bar."""
        self._console.print(text)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the bar; print the last text if an earlier one was printed."""
        self._bar.stop()
        if self._printed not in ("", self._text):
            self._print()

    def _print(self) -> None:
        self._console.print(self._text)
        self._printed = self._text
