"""Chunks of names: what `packing` makes of a list and engines score, and how large they may be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from torch import Tensor

# Tokens that get their ids together, which takes some hundred bytes each. Below 2**22, so that an int64 for each is
# less than the 32 MiB from which glibc gives fresh pages at every allocation.
CHUNK_TOKENS = 4_000_000


class Packed(NamedTuple):
    """Names as tokens; see `Vocabulary.pack`."""

    tokens: Tensor
    lengths: Tensor
    known: Tensor


class Codes(NamedTuple):
    """Names as text, which a device numbers by itself."""

    codes: Tensor  # uint8 (characters,), Latin-1, names end to end
    lengths: Tensor  # characters per name, int64
    known: Tensor  # bool; false for a missing name
    unknown: str  # what an unknown name does, "error" or "nan"
    pack: Callable[[], Packed]  # the same names as tokens, unknown ones as empty ones; or raises `NamesError`


Chunk = Packed | Codes


class Limits(NamedTuple):
    """The most that a chunk may hold; a name with more tokens than that is a chunk by itself."""

    names: int
    tokens: int
    context: int  # tokens per name, beside its characters

    def rows(self, width: int) -> int:
        """How many names of so many characters."""
        return max(1, min(self.names, self.tokens // (width + self.context)))

    def cuts(self, lengths: np.ndarray) -> Iterator[slice]:
        """Slices of names, of which there are no more than `names`."""
        ends, start, before = (lengths + self.context).cumsum(), 0, 0
        while start < len(ends):
            stop = max(start + 1, int(ends.searchsorted(before + self.tokens, "right")))
            yield slice(start, stop)
            start, before = stop, int(ends[stop - 1])


class Text(NamedTuple):
    """Names end to end, with padding before each and after the last."""

    text: str
    lengths: Tensor  # characters per name, int64
    missing: Tensor | None = None  # bool; a missing name is empty in the text. None: all are there
