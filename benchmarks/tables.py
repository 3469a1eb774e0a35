"""Declarative tables: a string declares the columns, the JSON has the rows; printed as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import rich.table
from rich import box
from rich.console import Console

Row = dict[str, Any]


class Table(NamedTuple):
    """A table and the remark below it.

    Args:
        title: Stands above the table.
        columns: `title=key format` per column, separated by `;`. A key is a path into the row such as `many.0.us`, or
            the title where it is left out; `~us` are the quartiles that `spread` has put beside `us`; `us/loop` is how
            many times faster the row is than the row of the method `loop`. The format is Python's; numbers in a list
            are formatted singly. A value that is not there is a dash.
        rows: From the results. A row with a `message` has that in place of its values.
        remark: Stands below the table.
    """

    title: str
    columns: str
    rows: Sequence[Row]
    remark: str = ""

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """The titles, and the texts of every row."""
        columns = [column.strip().partition("=") for column in self.columns.split(";")]
        keys = [(key or title).partition(" ") if key else (title, "", "") for title, _, key in columns]
        rows = [[self._cell(row, key, form) for key, _, form in keys] for row in self.rows]
        for row, texts in zip(self.rows, rows):
            texts[1:2] = [row.get("message", texts[1])]
        return [title for title, _, _ in columns], rows

    def _cell(self, row: Row, key: str, form: str) -> str:
        if key.startswith("~"):
            start, _, last = key[1:].rpartition(".")
            places = [f"{start}.{quartile}_{last}".strip(".") for quartile in ("q1", "q3")]
            return " to ".join(text(value_at(row, place), form) for place in places)
        key, _, method = key.partition("/")
        value = value_at(row, key)
        if method and value is not None:
            other = next(other[key] for other in self.rows if other.get("method") == method)
            value = value / other if key.endswith("per_second") else other / value
        return text(value, form)


def value_at(row: Row, path: str) -> Any:
    """The value at a path such as "many.0.us"; None where there is none."""
    value: Any = row
    for part in path.split("."):
        value = value[int(part)] if isinstance(value, list) else (value or {}).get(part)
    return value


def text(value: Any, form: str = "") -> str:
    """A value in a cell."""
    if isinstance(value, list):
        return " ".join(text(number, form) for number in value)
    return "-" if value is None else format(value, form)


def summary(results: Row) -> Iterable[str]:
    """The first lines of every page: the machine, what was run, and whether all results are equal."""
    yield f"{results['device']}, PyTorch {results['torch']}, {results['dtype']}."
    for name in ("model", "names"):
        if name in results:
            yield f"{name.capitalize()}: {words(results[name])}."
    yield f"{'Equal' if results['equality']['equal'] else 'NOT EQUAL'}: {words(results['equality'])}."


def words(values: Row) -> str:
    """Values by name, in words."""
    parts = []
    for name, value in values.items():
        if isinstance(value, dict):
            parts += [f"{name.replace('_', ' ')}: {words(value) if any(value.values()) else 'none'}"]
        elif not isinstance(value, (bool, type(None))):
            form = ".2g" if isinstance(value, float) else "," if isinstance(value, int) else ""
            parts += [f"{name.replace('_', ' ')} {value if isinstance(value, list) else format(value, form)}"]
    return ", ".join(parts)


def print_page(results: Row, tables: Iterable[Table]) -> None:
    """Prints the summary and the tables on stdout; the tables are Markdown too."""
    console = Console(width=400, highlight=False, markup=False, soft_wrap=True)  # a table that wraps is no Markdown
    console.print(*summary(results), sep="\n")
    for part in tables:
        titles, rows = part.cells()
        drawn = rich.table.Table(box=box.MARKDOWN)
        for index, title in enumerate(titles):
            drawn.add_column(title, justify="right" if index else "left")
        for row in rows:
            drawn.add_row(*row)
        console.print("", part.title, drawn, *filter(None, [part.remark]), sep="\n")
