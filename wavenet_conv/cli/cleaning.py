"""What a name is turned into before it is scored, and what is said about names that a model cannot read."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import compress
from typing import TYPE_CHECKING

from .reading import Name

if TYPE_CHECKING:
    from torch import Tensor

    from ..vocabulary import Vocabulary

SHOWN = 10  # unknown characters that are listed
SAMPLED = 1000  # names without a score for which options are tried

OPTIONS: dict[str, Callable[[str], str]] = {  # in the order in which they are applied
    "--normalize NFC": partial(unicodedata.normalize, "NFC"),
    "--normalize NFKC": partial(unicodedata.normalize, "NFKC"),
    "--lower": str.lower,
    "--strip": str.strip,
}


class Cleaner:
    """Applies options to names: those of `OPTIONS` in `chosen`.

    It also counts the names that have no score, and their unknown characters.
    """

    def __init__(self, vocab: Vocabulary, chosen: Iterable[str]):
        self._known, self._missing = set(vocab.characters), vocab.padding
        self._steps = [OPTIONS[option] for option in OPTIONS if option in chosen]
        self._rows, self._nulls, self._unread = 0, 0, 0
        self._characters, self._sample = Counter[str](), list[str]()

    def __call__(self, names: Sequence[Name]) -> list[str]:
        """The texts to score; a missing value becomes a character that no vocabulary has, so that its score is NaN."""
        texts = [self._missing if name is None else name for name in names]
        for step in self._steps:
            texts = [self._missing if name is None else step(text) for name, text in zip(names, texts)]
        return texts

    def hints(self, texts: Iterable[str]) -> list[str]:
        """The options, not chosen yet, after which one of the texts has fewer unknown characters."""
        unread = [(text, set(text) - self._known) for text in texts]
        found = [
            option
            for option, step in OPTIONS.items()
            if step not in self._steps and any(set(step(text)) - self._known < unknown for text, unknown in unread)
        ]
        normal = [option for option in found if option.startswith("--normalize")]
        return [option for option in found if option not in normal[1:]]  # what NFC does, NFKC does too

    def count(self, names: Sequence[Name], texts: Sequence[str], scores: Tensor) -> None:
        """Note which names have no score."""
        self._rows += len(texts)
        if (lost := scores.isnan()).any():
            unread = list(compress(zip(names, texts), lost.tolist()))
            found = [text for name, text in unread if name is not None]
            self._unread, self._nulls = self._unread + len(unread), self._nulls + len(unread) - len(found)
            self._characters.update("".join(found))
            self._sample += found[: SAMPLED - len(self._sample)]

    def summary(self) -> str:
        """One line about all names without a score; "" if each has one."""
        if not self._unread:
            return ""
        unknown = [c for c, _ in self._characters.most_common() if c not in self._known]
        parts = [f"{self._unread:,} of {self._rows:,} scores are NaN"]
        if self._nulls:
            parts.append(f"missing values: {self._nulls:,}")
        if unknown:
            more = f" and {len(unknown) - SHOWN:,} more" if len(unknown) > SHOWN else ""
            parts.append(f"unknown characters: {' '.join(map(_shown, unknown[:SHOWN]))}{more}")
        if hints := self.hints(self._sample):
            parts.append(f"try {' or '.join(hints)}")
        return "; ".join(parts)


def _shown(character: str) -> str:
    """A character in quotes; a combining one as an escape, since it would join the quote."""
    return ascii(character) if unicodedata.combining(character) else repr(character)
