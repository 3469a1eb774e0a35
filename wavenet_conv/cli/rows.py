"""Rows of names and scores: how they are written as text, and where they go."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from math import inf, log
from typing import TYPE_CHECKING, BinaryIO, Union

from ..errors import OutputError, UsageError
from ..files import whole_file
from .options import output_errors

if TYPE_CHECKING:
    from torch import Tensor

# One number per row, or lists of numbers as values and offsets `(n + 1,)`.
Column = Union["Tensor", tuple["Tensor", "Tensor"]]
Names = Sequence[str] | Sequence[str | None]

FORMATS = ("tsv", "jsonl", "csv", "parquet")
SIGTERM_EXIT = 128 + signal.SIGTERM  # what a shell reports

_quoted = json.JSONEncoder(ensure_ascii=False).encode
_special = re.compile('[",\r\n]').search


class Rows:
    """Formats rows as "tsv" (names as inside a JSON string), "jsonl" or "csv"; the first column is the names.

    Numbers have as many digits as their dtype needs to be read back exactly.
    """

    def __init__(self, format: str, *columns: str):
        self._format, self._json = format, format == "jsonl"
        delimiter = "," if format == "csv" else "\t"
        self.header = (delimiter.join(columns) + "\n").encode() if format in ("tsv", "csv") else b""
        fields = ", ".join(f'"{column}": {{}}' for column in columns)
        self._row = f"{{{{{fields}}}}}\n" if self._json else delimiter.join("{}" for _ in columns) + "\n"

    def __call__(self, names: Names, *columns: Column) -> bytes:
        """Rows of n names, in UTF-8; a name that is None is null, or empty in tsv and csv."""
        others = (self._lists(*c) if isinstance(c, tuple) else self._numbers(c) for c in columns)
        return "".join(map(self._row.format, self._names(names), *others)).encode()

    def _names(self, names: Names) -> Iterator[str]:
        if self._json:
            return map(_quoted, names)
        if self._format == "tsv":
            return (_quoted(name)[1:-1] if name else "" for name in names)
        return ('"{}"'.format(name.replace('"', '""')) if _special(name) else name for name in (n or "" for n in names))

    def _lists(self, values: Tensor, offsets: Tensor) -> Iterator[str]:
        numbers = list(self._numbers(values))
        for start, end in pairwise(offsets.tolist()):
            text = ",".join(numbers[start:end])
            yield {"jsonl": f"[{text}]", "csv": f'"{text}"'}.get(self._format, text)

    def _numbers(self, values: Tensor) -> Iterator[str]:
        digits = ".17g" if values.dtype.itemsize > 4 else ".9g"
        for value in values.tolist():  # JSON has no NaN and no infinity
            yield "null" if self._json and not -inf < value < inf else format(value, digits)


def bits_per_character(names: Sequence[str], scores: Tensor) -> Tensor:
    """Bits per character of names with these log-likelihoods, the end counted as a character: `(names,)`."""
    from ..vocabulary import lengths_of

    return scores / (-log(2) * (lengths_of(names) + 1))


def format_of(format: str | None, path: str | None) -> str:
    """The format that is given, or that the ending of the output means; raises `UsageError` for Parquet to a stream."""
    ending = (path or "").rpartition(".")[2].lower()
    if ending == "gz":
        raise UsageError(f"--output {path}: the output is not compressed; omit --output and write | gzip > {path}")
    found = format or (ending if ending in FORMATS else "tsv")
    if found == "parquet" and path is None:
        raise UsageError("--format parquet: a Parquet file cannot be written to standard output; give --output FILE")
    return found


def open_rows(
    path: str | None, format: str, header: dict[str, Column]
) -> AbstractContextManager[Callable[[Names, dict[str, Column]], object]]:
    """Open an output for rows: gives a function of names and columns, of the names and dtypes of `header`.

    Raises as `open_output` does; the header is written at once.
    """
    if format == "parquet":
        from .parquet import parquet_rows

        return parquet_rows(str(path), header)
    return _text_rows(path, Rows(format, "name", *header))


@contextmanager
def _text_rows(path: str | None, rows: Rows) -> Iterator[Callable[[Names, dict[str, Column]], object]]:
    with open_output(path) as write:
        write(rows.header)
        yield lambda names, columns: write(rows(names, *columns.values()))


@contextmanager
def open_output(path: str | None) -> Iterator[Callable[[bytes], object]]:
    """Give a function that writes to standard output, or to a file that is replaced when all is written.

    Raises `OutputError` if that fails, `BrokenPipeError` if the reader of standard output closed the pipe.
    """
    if path is None:
        yield write_output
        return
    with open_file(path) as file:
        yield file.write


@contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
    """Open a file that is replaced when all is written, and is as it was after an error, Ctrl-C or SIGTERM."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(SIGTERM_EXIT))
    try:
        with output_errors(path, "the file is as it was before"), whole_file(os.path.realpath(path)) as file:
            yield file
    finally:
        signal.signal(signal.SIGTERM, before)


def write_output(data: bytes = b"") -> None:
    """Write bytes to standard output and flush it; raises as `open_output` does."""
    if sys.stdout is None and not data:
        return
    if sys.stdout is None:
        raise OutputError("standard output is closed; redirect it to a file")
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError as error:
        # What is still buffered goes nowhere, so that the interpreter does not complain about it when it exits.
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError) or (os.name == "nt" and error.errno == errno.EINVAL):
            raise BrokenPipeError from error
        raise OutputError(f"standard output: {error.strerror}; the output is not complete") from error
