"""Rows of names and scores: how they are written, and where they go."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from math import inf, log
from typing import TYPE_CHECKING

from ..errors import OutputError
from ..files import whole_file
from .options import output_errors

if TYPE_CHECKING:
    from torch import Tensor

_quoted = json.JSONEncoder(ensure_ascii=False).encode


class Rows:
    """Formats rows as "tsv" (names as inside a JSON string) or "jsonl"; the first column is the names.

    Numbers have as many digits as their dtype needs to be read back exactly.
    """

    def __init__(self, format: str, *columns: str):
        self._json = format == "jsonl"
        self.header = ("\t".join(columns) + "\n").encode() if format == "tsv" else b""
        fields = ", ".join(f'"{column}": {{}}' for column in columns)
        self._row = f"{{{{{fields}}}}}\n" if self._json else "\t".join("{}" for _ in columns) + "\n"

    def __call__(self, names: Sequence[str], *columns: Tensor | tuple[Tensor, Tensor]) -> bytes:
        """Rows of n names, in UTF-8; a column is numbers `(n,)`, or lists of them as values and offsets `(n + 1,)`."""
        quoted = map(_quoted, names) if self._json else (_quoted(name)[1:-1] for name in names)
        others = (self._lists(*c) if isinstance(c, tuple) else self._numbers(c) for c in columns)
        return "".join(map(self._row.format, quoted, *others)).encode()

    def _lists(self, values: Tensor, offsets: Tensor) -> Iterator[str]:
        numbers = list(self._numbers(values))
        for start, end in pairwise(offsets.tolist()):
            yield f"[{', '.join(numbers[start:end])}]" if self._json else ",".join(numbers[start:end])

    def _numbers(self, values: Tensor) -> Iterator[str]:
        digits = ".17g" if values.dtype.itemsize > 4 else ".9g"
        for value in values.tolist():  # JSON has no NaN and no infinity
            yield "null" if self._json and not -inf < value < inf else format(value, digits)


def bits_per_character(names: Sequence[str], scores: Tensor) -> Tensor:
    """Bits per character of names with these log-likelihoods, the end counted as a character: `(names,)`."""
    from ..vocabulary import lengths_of

    return scores / (-log(2) * (lengths_of(names) + 1))


@contextmanager
def open_output(path: str | None) -> Iterator[Callable[[bytes], object]]:
    """Give a function that writes to standard output, or to a file that is replaced when all is written.

    Raises `OutputError` if that fails, `BrokenPipeError` if the reader of standard output closed the pipe.
    """
    if path is None:
        yield write_output
        return
    with output_errors(path, "the file is as it was before"), whole_file(os.path.realpath(path)) as file:
        yield file.write


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
