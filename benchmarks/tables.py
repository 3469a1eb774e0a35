"""Declarative tables: a string declares the columns, the JSON has the rows; printed as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]


class Table(NamedTuple):
    """A table of rows from the results, and the remark below it.

    `columns` has `title=key format` per column, separated by `;`. A key is a path into the row such as `methods.0.us`,
    by default the title; `~us` are the quartiles beside `us`; `us/loop` is how many times faster the row is than that
    of the method `loop`. A missing value is a dash; a column without any value is left out.
    """

    title: str
    columns: str
    rows: Sequence[Row]
    remark: str = ""

    def cells(self) -> list[list[str]]:
        """Per column its title and the texts of all rows."""
        found = []
        for column in self.columns.split(";"):
            title, _, declared = column.strip().partition("=")
            key, _, form = declared.partition(" ")
            found.append([title, *(self._cell(row, key or title, form) for row in self.rows)])
        return [column for column in found if set(column[1:]) != {"-"}]

    def markdown(self) -> str:
        """The table in Markdown, its first column to the left and the others to the right."""
        columns = self.cells()
        widths = [max(map(len, column)) for column in columns]
        rows = [[cell.rjust(width) for cell, width in zip(cells, widths)] for cells in zip(*columns)]
        rows = [[first.lstrip().ljust(widths[0]), *others] for first, *others in rows]
        rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
        return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)

    def _cell(self, row: Row, key: str, form: str) -> str:
        if key.startswith("~"):
            start, dot, last = key[1:].rpartition(".")
            quartiles = [value_at(row, f"{start}{dot}{quartile}_{last}") for quartile in ("q1", "q3")]
            return "-" if None in quartiles else " to ".join(text(quartile, form) for quartile in quartiles)
        key, _, method = key.partition("/")
        value = value_at(row, key)
        if method and value is not None:
            other = next(other[key] for other in self.rows if other.get("method") == method)
            value = value / other if key.endswith("per_second") else other / value
        return text(value, form)


def value_at(row: Row, path: str) -> Any:
    """The value at a path such as "methods.0.us"; None where there is none."""
    value: Any = row
    for part in path.split("."):
        value = value[int(part)] if isinstance(value, list) else (value or {}).get(part)
    return value


def text(value: Any, form: str = "") -> str:
    """A value in a cell."""
    if isinstance(value, list):
        return " ".join(text(number, form) for number in value)
    return "-" if value is None else format(value, form)


def with_shares(rows: Iterable[Row], rate: float, unit: str = "position") -> list[Row]:
    """The rows with `share`: of this rate of multiply-adds, where the row has counted its own."""
    work = f"multiply_adds_per_{unit}"
    return [row | {"share": row[f"{unit}s_per_second"] * row[work] / rate} if row.get(work) else row for row in rows]


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


def summary(results: Row) -> list[str]:
    """The machine, what was run, and whether all results are equal or why that cannot be said: one sentence each."""
    lines = [f"{results['device']}, PyTorch {results['torch']}, {results['dtype']}."]
    lines += [f"{name.capitalize()}: {words(results[name])}." for name in ("model", "names") if name in results]
    verdict = f"{'Equal' if results['equality']['equal'] else 'NOT EQUAL'}: {words(results['equality'])}."
    return [*lines, results.get("caveat") or verdict]


def print_page(results: Row, tables: Iterable[Table]) -> None:
    """Prints the summary and the tables, which are Markdown too."""
    print(*summary(results), sep="\n")
    for part in tables:
        print("", part.title, "", part.markdown(), *(["", part.remark] if part.remark else []), sep="\n")
