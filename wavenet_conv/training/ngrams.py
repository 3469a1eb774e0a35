"""What n-grams expect at each position of a list: interpolated modified Kneser-Ney on arrays, as a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..numbering import from_engine
from ..vocabulary import Vocabulary

ORDER, FOLDS = 6, 10
FALLBACK = (0.5, 1.0, 1.5)  # discounts of counts of 1, 2, and 3 or more, where counts of counts give none


class Level(NamedTuple):
    """The distinct n-grams of one length, each a context and the token after it; all int64."""

    names: Tensor  # the name of each position with so many tokens before it,
    grams: Tensor  # and the n-gram there
    contexts: Tensor  # per n-gram, its context
    tokens: Tensor  # per n-gram, its last token
    suffixes: Tensor  # per n-gram, the n-gram of the level below without its first token
    first: Tensor  # per n-gram, 1 if it begins where names do
    shorter: Tensor  # per context, that of the level below without its first token


class NGrams:
    """The n-grams of a list, of which some names are counted and others predicted.

    `reference.ngram.KneserNey` defines the numbers (Chen and Goodman 1999, doi:10.1006/csla.1999.0128).

    Args:
        names: All names, with characters of the vocabulary.
        vocab: The vocabulary.
        order: The length of the longest n-gram; a prediction sees the last `order - 1` tokens.
    """

    def __init__(self, names: Sequence[str], vocab: Vocabulary, order: int = ORDER):
        packed, lengths, _ = vocab.pack(names, context=1)
        sequence, outputs = from_engine(packed, vocab.end).long(), lengths + 1
        tokens, following, self.vocab_size = sequence[:-1], sequence[1:], len(vocab)
        self.names = torch.arange(len(names)).repeat_interleave(outputs)  # of each position
        depths = torch.arange(len(tokens)) - (outputs.cumsum(0) - outputs)[self.names] + 1
        self.depths = depths  # tokens before each prediction
        contexts = grams = torch.zeros_like(tokens)
        self.levels, self.contexts = list[Level](), []  # contexts: per level, of each position
        for length in range(order):
            places = (depths >= length).nonzero()[:, 0]
            if not len(places):  # no name is so long
                break
            before, below = contexts, grams
            keys = contexts.roll(1)[places] * self.vocab_size + tokens[places] if length else contexts
            distinct, ids = keys.unique(return_inverse=True)
            contexts = torch.zeros_like(tokens).scatter_(0, places, ids)
            shorter = torch.zeros_like(distinct).scatter_(0, ids, before[places])
            keys, ids = (ids * self.vocab_size + following[places]).unique(return_inverse=True)
            grams = torch.zeros_like(tokens).scatter_(0, places, ids)
            suffixes = torch.zeros_like(keys).scatter_(0, ids, below[places])
            first = torch.zeros_like(keys).scatter_(0, ids, (depths[places] == length).long())
            parts = keys // self.vocab_size, keys % self.vocab_size
            self.levels.append(Level(self.names[places], ids, *parts, suffixes, first, shorter))
            self.contexts.append(contexts)

    def predictions(self, counted: Tensor, wanted: Tensor) -> Tensor:
        """The probabilities of all tokens at each position of the `wanted` names: float64 `(positions, vocab)`.

        They come from the counts of the names `counted`, at least one; both are bool `(names,)`.
        """
        places = wanted[self.names].nonzero()[:, 0]
        seen = [torch.bincount(level.grams[counted[level.names]], minlength=len(level.tokens)) for level in self.levels]
        result = torch.empty(len(places), self.vocab_size, dtype=torch.float64)
        below = torch.zeros(1, dtype=torch.int64)
        probs = torch.full((1, self.vocab_size), 1 / self.vocab_size, dtype=torch.float64)
        for length, level in enumerate(self.levels):
            counts = seen[length]
            if length + 1 < len(self.levels):  # how many different tokens stand before; at a name's start, how often
                above, longer = self.levels[length + 1], seen[length + 1]
                different = torch.bincount(above.suffixes[longer > 0], minlength=len(counts))
                counts = torch.where(level.first > 0, counts, different)
            rows = (self.depths[places] >= length).nonzero()[:, 0]
            contexts, ids = self.contexts[length][places[rows]].unique(return_inverse=True)
            lower = probs[torch.searchsorted(below, level.shorter[contexts])]
            below, probs = contexts, interpolated(level, counts, contexts, lower)
            result[rows] = probs[ids]
        return result


def interpolated(level: Level, counts: Tensor, contexts: Tensor, lower: Tensor) -> Tensor:
    """The probabilities after some contexts of a level, in ascending order, from those after the shorter ones."""
    discounts = discounts_of(counts)[counts.clamp(max=3)]
    totals, left = (torch.zeros(len(level.shorter), dtype=torch.float64) for _ in range(2))
    totals.index_add_(0, level.contexts, counts.double())
    left.index_add_(0, level.contexts, discounts)
    backoffs = torch.where(totals > 0, left / totals, 1.0)  # a context that was not counted is shortened
    probs = backoffs[contexts][:, None] * lower
    rows = torch.full_like(level.shorter, -1).index_copy_(0, contexts, torch.arange(len(contexts)))[level.contexts]
    known = ((counts > 0) & (rows >= 0)).nonzero()[:, 0]
    discounted = (counts - discounts)[known] / totals[level.contexts[known]]
    probs[rows[known], level.tokens[known]] += discounted
    return probs


def discounts_of(counts: Tensor) -> Tensor:
    """What is subtracted from a count of 0, 1, 2, and 3 or more, float64: equation 26 of Chen and Goodman."""
    times = torch.bincount(counts.clamp(max=5), minlength=6).double()
    share = times[1] / (times[1] + 2 * times[2])
    found = torch.arange(1, 4) - torch.arange(2, 5) * share * times[2:5] / times[1:4]
    if not (times[1:4].all() and (found > 0).all()):
        found = torch.tensor(FALLBACK)
    return torch.cat([torch.zeros(1), found]).double()


def cross_fitted(names: Sequence[str], vocab: Vocabulary, folds: int = FOLDS, order: int = ORDER) -> Tensor:
    """What n-grams of the other folds expect at each position of a list: float64 `(positions, vocab)`.

    N-grams have memorised the names that they were counted from, so each name is predicted by those of the other folds;
    a repeated name may be in several. Name i is in fold `i % folds`. A list of one name is predicted by itself.
    """
    grams, fold = NGrams(names, vocab, order), torch.arange(len(names)) % min(folds, len(names))
    result = torch.empty(len(grams.names), len(vocab), dtype=torch.float64)
    for part in range(int(fold.max()) + 1):
        wanted = fold == part
        result[wanted[grams.names]] = grams.predictions(~wanted if len(names) > 1 else wanted, wanted)
    return result


def predicted(names: Sequence[str], counted: Sequence[str], vocab: Vocabulary, order: int = ORDER) -> Tensor:
    """What n-grams of the names `counted` expect at each position of other names: float64 `(positions, vocab)`."""
    is_new = torch.arange(len(counted) + len(names)) >= len(counted)
    return NGrams([*counted, *names], vocab, order).predictions(~is_new, is_new)
