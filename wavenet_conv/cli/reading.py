"""Names from text, CSV, TSV or Parquet, chunk by chunk, and where each one stands in its file."""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import Protocol

from ..errors import NamesError, UsageError
from ..lines import CHUNK_BYTES, CHUNK_LINES, Lines, split_lines

Name = str | None  # None is a missing value
DELIMITERS = {".csv": ",", ".tsv": "\t"}


class Source(Protocol):
    """Names in the order of a file, of which `count` are read; `size` is the last value of `position()`, if known."""

    size: int | None
    count: int

    def read(self, limit: int = CHUNK_LINES) -> Sequence[Name]:
        """Return the next names, at most `limit`; none after the last."""

    def place(self, index: int) -> str:
        """The file and the line or the row of a name of the last chunk."""

    def position(self) -> int:
        """How much of the file has been read."""


def open_source(path: str, column: str | None) -> AbstractContextManager[Source]:
    """Open `.csv`, `.tsv` or `.parquet`, by the ending, else text; "-" is text, or CSV if a column is given."""
    plain = path.lower().removesuffix(".gz")
    if plain.endswith(".parquet"):
        from .parquet import ParquetNames

        return ParquetNames(path, column)
    delimiter = next((DELIMITERS[ending] for ending in DELIMITERS if plain.endswith(ending)), None)
    if delimiter is None and column is None:
        return TextNames(path)
    if delimiter is None and path != "-":
        raise UsageError(f"--column: {path} is read as text, by its ending; columns are in .csv, .tsv and .parquet")
    return TableNames(path, delimiter or ",", column)


def index_of(column: str | None, columns: Sequence[str], label: str, candidates: Sequence[str]) -> int:
    """Which column has the names: `column`, or the only candidate if that is None; raises `UsageError`."""
    wanted = candidates[0] if column is None and len(candidates) == 1 else column
    if wanted is not None and columns.count(wanted) == 1:
        return columns.index(wanted)
    if wanted in columns:
        raise UsageError(f"{label}: it has several columns {wanted!r}; rename all but one")
    if not candidates:
        raise UsageError(f"{label}: it has no column of strings, only: {', '.join(columns)}")
    found = "it has several columns" if column is None else f"it has no column {column!r}"
    raise UsageError(f"{label}: {found}; give --column NAME, one of: {', '.join(columns)}")


class TextNames:
    """Each line of a text is a name, as `split_lines` says."""

    def __init__(self, path: str):
        self._lines, self.count, self._first = Lines(path), 0, 1
        self.size, self.position = self._lines.size, self._lines.position

    def __enter__(self) -> TextNames:
        return self

    def __exit__(self, *error: object) -> None:
        self._lines.__exit__()

    def read(self, limit: int = CHUNK_LINES) -> list[str]:
        """Return the next lines, at most `limit`; none after the last."""
        self._first = self._lines.count + 1
        names = split_lines(self._lines.read(limit))
        self.count = self._lines.count
        return names

    def place(self, index: int) -> str:
        """The file and the line of a name of the last chunk."""
        return f"{self._lines.label}, line {self._first + index}"


class TableNames(TextNames):
    """A column of a CSV or TSV file with a header. An empty field is the empty name; blank lines are skipped."""

    def __init__(self, path: str, delimiter: str, column: str | None):
        super().__init__(path)
        csv.field_size_limit(CHUNK_BYTES)
        self._limit, self._pending, self._starts = 1, False, array("q")
        self._reader = csv.reader(self._text(), delimiter=delimiter, strict=True)
        self._width, self._index = 0, 0
        header = next(self._rows(), None)
        if header is None:
            raise UsageError(f"{self._lines.label}: no header in it; give a table whose first row names the columns")
        self._width, self._index = len(header), index_of(column, header, self._lines.label, header)

    def read(self, limit: int = CHUNK_LINES) -> list[str]:
        """Return the names of the next rows, at most `limit`; none after the last."""
        self._limit, self._starts, names = limit, array("q"), []
        for row in islice(self._rows(), min(limit, CHUNK_LINES)):
            names.append(row[self._index])
            if not self._pending:  # the rows that came in together
                break
        self.count += len(names)
        return names

    def place(self, index: int) -> str:
        """The file and the first line of a row of the last chunk."""
        return f"{self._lines.label}, line {self._starts[index]}"

    def _text(self) -> Iterator[str]:
        """The lines with their ends; `_pending` says whether more can be read without waiting."""
        while text := self._lines.read(self._limit):
            lines = text.split("\n")
            if not lines[-1]:
                lines.pop()
            self._pending = True
            yield from (f"{line}\n" for line in lines[:-1])
            self._pending = False
            yield f"{lines[-1]}\n"

    def _rows(self) -> Iterator[list[str]]:
        """The rows that are not blank; raises `NamesError` with the line for one that does not fit the header."""
        while True:
            start = self._reader.line_num + 1
            try:
                row = next(self._reader, None)
            except csv.Error as error:
                raise NamesError(f"{self._lines.label}, row from line {start}: {error}") from error
            if row is None:
                return
            if row and self._width and len(row) != self._width:
                found = f"a row of {len(row)} fields, but the header has {self._width}"
                raise NamesError(f"{self._lines.label}, line {start}: {found}; quote fields that contain the delimiter")
            if row:
                self._starts.append(start)
                yield row
