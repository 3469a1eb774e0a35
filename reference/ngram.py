"""Character n-grams by interpolated modified Kneser-Ney smoothing: a table of counts, and a strong rival."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from math import fsum, log, log10
from pathlib import Path

END = "."  # the start before a name and the end after it, as in the lecture
# Discounts of an order whose counts of counts would divide by zero, or leave nothing for unseen tokens: KenLM's.
FALLBACK = (0.0, 0.5, 1.0, 1.5)


class KneserNey:
    """Interpolated modified Kneser-Ney over characters (Chen and Goodman 1999, doi:10.1006/csla.1999.0128).

    Estimated from adjusted counts with KenLM's conventions (Heafield et al. 2013, "Scalable Modified Kneser-Ney
    Language Model Estimation"). One start symbol stands before a name, and is context only. Unigrams are interpolated
    with the uniform distribution over all characters and the end.

    Args:
        names: The names to count; at least one.
        characters: What names consist of. A character that no name has gets its share of the uniform distribution.
        order: The length of the longest n-gram, at least 1; a prediction sees the last `order - 1` tokens.

    Raises:
        ValueError: There are no names, the order is below 1, or a name has a character outside `characters`.

    Attributes:
        probs: Of each n-gram: the probability of its last token after the others.
        backoffs: Of each context: the factor of the probabilities after the context without its first token.
        discounts: Per order: what is subtracted from a count of 0, of 1, of 2, and of 3 or more.
    """

    def __init__(self, names: Iterable[str], characters: str, order: int = 6):
        names, self.characters, self.order = list(names), "".join(sorted(set(characters) - {END})), order
        if not names or order < 1:
            raise ValueError(f"{len(names)} names and order {order}; give at least one name and an order of at least 1")
        counts = adjusted_counts(map(self._sequence, names), order)
        counts[0].update(dict.fromkeys(END + self.characters, 0))
        self.discounts = [discounts_of(grams.values()) for grams in counts]
        self.probs, self.backoffs = {"": 1 / len(counts[0])}, dict[str, float]()
        for grams, discounts in zip(counts, self.discounts):
            totals, left = Counter[str](), defaultdict[str, float](float)
            for gram, count in grams.items():
                totals[gram[:-1]] += count
                left[gram[:-1]] += discounts[min(count, 3)]
            self.backoffs |= {context: left[context] / total for context, total in totals.items()}
            for gram, count in grams.items():
                context, discounted = gram[:-1], count - discounts[min(count, 3)]
                self.probs[gram] = discounted / totals[context] + self.backoffs[context] * self.probs[gram[1:]]
        del self.probs[""]

    def prob(self, context: str, token: str) -> float:
        """The probability of `token` after `context` (a name begins with `.`); `ValueError` if the token is unknown."""
        if len(token) != 1 or token not in self.probs:
            raise ValueError(f"token {token!r} is neither {END!r} nor one of {self.characters!r}")
        context, scale = context[max(0, len(context) - self.order + 1) :], 1.0
        while context + token not in self.probs:
            scale, context = scale * self.backoffs.get(context, 1.0), context[1:]
        return scale * self.probs[context + token]

    def log_probs(self, name: str) -> list[float]:
        """The log-probability, in nats, of each character of a name and of its end; `ValueError` if one is unknown."""
        sequence = self._sequence(name)
        return [log(self.prob(sequence[:place], sequence[place])) for place in range(1, len(sequence))]

    def log_prob(self, name: str) -> float:
        """The natural-log likelihood of a name, its end included; raises as `log_probs`."""
        return fsum(self.log_probs(name))

    def write_arpa(self, path: str | Path) -> None:
        """Writes an ARPA file, in which each character is a word; KenLM reads orders from 2 to 6, or as it was built.

        Raises `ValueError` for a character that separates words in this format: white space.
        """
        for character in self.characters:
            if character.isspace() or character == "\0":
                raise ValueError(f"character {character!r} separates words in an ARPA file; remove it from the names")
        orders: dict[int, list[str]] = {1: ["-99\t<unk>", f"-99\t<s>\t{log10(self.backoffs.get(END, 1)):.9g}"]}
        for gram, prob in self.probs.items():
            backoff = f"\t{log10(self.backoffs[gram]):.9g}" if gram in self.backoffs and gram != END else ""
            words = ["</s>" if token == END else token for token in gram]
            words[0] = "<s>" if gram[0] == END and len(gram) > 1 else words[0]
            orders.setdefault(len(gram), []).append(f"{log10(prob):.9g}\t{' '.join(words)}{backoff}")
        lines = ["\\data\\", *(f"ngram {length}={len(entries)}" for length, entries in orders.items())]
        for length, entries in orders.items():
            lines += ["", f"\\{length}-grams:", *entries]
        beside = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
        beside.write_bytes("\n".join([*lines, "", "\\end\\", ""]).encode())
        os.replace(beside, path)  # a reader sees the previous file or the whole new one

    def _sequence(self, name: str) -> str:
        for unknown in sorted(set(name) - set(self.characters)):
            raise ValueError(f"name {name!r}: character {unknown!r} is not in {self.characters!r}")
        return END + name + END


def adjusted_counts(sequences: Iterable[str], order: int) -> list[Counter[str]]:
    """Per order: how many different tokens stand before each n-gram; of the longest and at a start, how often it is."""
    counts = [Counter[str]() for _ in range(order)]
    for sequence in sequences:
        for end in range(2, len(sequence) + 1):
            counts[min(end, order) - 1][sequence[max(0, end - order) : end]] += 1
    for lower, higher in zip(counts[-2::-1], counts[:0:-1]):
        lower.update(gram[1:] for gram in higher)
    return counts


def discounts_of(counts: Iterable[int]) -> tuple[float, ...]:
    """What is subtracted from a count of 0, 1, 2, and 3 or more: equation 26 of Chen and Goodman, or `FALLBACK`."""
    times = Counter(counts)
    if not (times[1] and times[2] and times[3]):
        return FALLBACK
    share = times[1] / (times[1] + 2 * times[2])
    found = [count - (count + 1) * share * times[count + 1] / times[count] for count in (1, 2, 3)]
    return (0.0, *found) if min(found) > 0 else FALLBACK
