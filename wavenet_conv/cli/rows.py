"""Rows of names and their scores, as tab-separated values or as JSON lines."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from math import inf, log

import torch
from torch import Tensor

_quoted = json.JSONEncoder(ensure_ascii=False).encode


class Rows:
    """The rows of names, as UTF-8; numbers have as many digits as their dtype needs to be read back exactly.

    Args:
        format: "tsv" (in which a name is written as inside a JSON string) or "jsonl".
        columns: The names of the columns; the first is the name's.

    Attributes:
        header: The bytes before the first row; empty in jsonl.
    """

    def __init__(self, format: str, columns: Sequence[str]):
        self._tsv = format == "tsv"
        self.header = ("\t".join(columns) + "\n").encode() if self._tsv else b""
        fields = ", ".join(f'"{column}": {{}}' for column in columns)
        self._row = ("\t".join("{}" for _ in columns) if self._tsv else f"{{{{{fields}}}}}") + "\n"

    def __call__(self, names: Sequence[str], *columns: Tensor | tuple[Tensor, Tensor]) -> bytes:
        """Format one row per name.

        Args:
            names: The names, n of them.
            columns: The other columns: a number per name `(n,)`, or several as values and offsets `(n + 1,)`, as
                `Scorer.position_log_probs` returns them.
        """
        quoted: Iterable[str] = map(_quoted, names)
        if self._tsv:
            quoted = (name[1:-1] for name in quoted)
        texts = (self._lists(*c) if isinstance(c, tuple) else self._numbers(c) for c in columns)
        return "".join(map(self._row.format, quoted, *texts)).encode()

    def _lists(self, values: Tensor, offsets: Tensor) -> Iterator[str]:
        numbers, ends = list(self._numbers(values)), offsets.tolist()
        for start, end in pairwise(ends):
            yield ",".join(numbers[start:end]) if self._tsv else f"[{', '.join(numbers[start:end])}]"

    def _numbers(self, values: Tensor) -> Iterator[str]:
        digits, tsv = ".17g" if values.dtype == torch.float64 else ".9g", self._tsv
        for value in values.tolist():  # JSON has no NaN and no infinity
            yield format(value, digits) if tsv or -inf < value < inf else "null"


def bits_per_character(names: Sequence[str], scores: Tensor) -> Tensor:
    """Bits per character of names with these natural-log likelihoods, the end counted as a character: `(names,)`."""
    return scores / (-log(2) * (torch.tensor(array("q", map(len, names))) + 1))
