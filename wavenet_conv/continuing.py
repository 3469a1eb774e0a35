"""What comes next: the likeliest characters after a prefix, and the likeliest whole names that begin with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .errors import ConfigError, SamplingError
from .numbering import to_engine
from .precision import exact_float32_on
from .vocabulary import checked_names

if TYPE_CHECKING:
    from .scoring import Scorer

MAX_LENGTH = 100  # characters
NUMBERS = 2**24  # probabilities that a step of a beam search holds: 128 MiB; other prefixes wait


def next_characters(scorer: Scorer, prefixes: Iterable[str], top_k: int = 10) -> list[list[tuple[str | None, float]]]:
    """The likeliest next characters after each prefix.

    Args:
        scorer: The scorer of a model.
        prefixes: The prefixes, each of any length; "" is the start of a name.
        top_k: How many characters per prefix, at most all.

    Returns:
        Per prefix pairs `(character, probability)`, the likeliest first. The character None is the end of the name.

    Raises:
        ConfigError: `top_k` is not an integer of at least 1.
        NamesError: A prefix has a character outside the vocabulary.
        SamplingError: The model's logits are NaN or infinite.
    """
    _check(top_k=top_k)
    prefixes, characters = checked_names(prefixes), [None, *scorer.vocab.characters]
    falling, order = _log_probs(scorer, _windows(scorer, prefixes)).exp().sort(dim=1, descending=True, stable=True)
    rows = zip(order[:, :top_k].tolist(), falling[:, :top_k].tolist())
    return [[(characters[token], value) for token, value in zip(*row)] for row in rows]


def complete(
    scorer: Scorer, prefixes: Iterable[str], top_k: int = 10, *, width: int = 64, max_length: int = MAX_LENGTH
) -> list[list[tuple[str, float]]]:
    """The likeliest whole names that begin with each prefix, by beam search.

    Per prefix and step the search keeps the `width` likeliest beginnings of names, without those that cannot come among
    the best `top_k` names any more. If it never has to leave another one out, the result is exact.

    Args:
        scorer: The scorer of a model.
        prefixes: The prefixes; "" gives the likeliest names of all.
        top_k: How many names per prefix, at most all that there are.
        width: How many beginnings per prefix.
        max_length: Most characters per name, the prefix included. Longer names are left out.

    Returns:
        Per prefix pairs `(name, log-likelihood)`, the likeliest first. Log-likelihoods are those of `Scorer.score`, in
        nats, the prefix included.

    Raises:
        ConfigError: A number is not an integer of at least 1, or a prefix is longer than `max_length`.
        NamesError: A prefix has a character outside the vocabulary.
        SamplingError: The model's logits are NaN or infinite.
    """
    _check(top_k=top_k, width=width, max_length=max_length)
    prefixes = checked_names(prefixes)
    for prefix in prefixes:
        if len(prefix) > max_length:
            given = f"the prefix {prefix!r:.40} has {len(prefix)} characters and max_length is {max_length}"
            raise ConfigError(f"{given}; give a max_length of at least {len(prefix)}")
    together, found = max(1, NUMBERS // (width * len(scorer.vocab))), []
    for first in range(0, len(prefixes), together):
        found += _names(scorer, prefixes[first : first + together], top_k, width, max_length)
    return found


class _Rows(NamedTuple):
    """Beginnings of names, or whole names."""

    owners: Tensor  # int64 (rows,), the prefix of each
    scores: Tensor  # float64 (rows,), the log-probability of what follows the prefix
    tokens: Tensor  # int64 (rows, steps), what follows the prefix; after an end, zeros

    def take(self, places: Tensor) -> _Rows:
        return _Rows(*(part[places] for part in self))

    def followed_by(self, scores: Tensor, tokens: Tensor) -> _Rows:
        """The rows with one more token each, and their scores with it."""
        return _Rows(self.owners, scores, torch.cat([self.tokens, tokens[:, None]], 1))


def _names(
    scorer: Scorer, prefixes: list[str], top_k: int, width: int, max_length: int
) -> list[list[tuple[str, float]]]:
    """`complete` for prefixes whose beams are searched together."""
    windows, left = _windows(scorer, prefixes), torch.tensor([max_length - len(prefix) for prefix in prefixes])
    owners, scores = torch.arange(len(prefixes)), torch.zeros(len(prefixes), dtype=torch.float64)
    live = _Rows(owners, scores, owners.new_zeros(len(owners), 0))
    ended = live.take(owners[:0])
    while len(live.owners):
        after = live.scores[:, None] + _log_probs(scorer, windows)
        before = ended.followed_by(ended.scores, torch.zeros_like(ended.owners))
        now = live.followed_by(after[:, 0], torch.zeros_like(live.owners))
        ended = _Rows(*map(torch.cat, zip(before, now)))
        best, ranks = _best(ended.owners, ended.scores, top_k)
        ended, last = ended.take(best), ranks == top_k - 1
        least = torch.full_like(left, -torch.inf, dtype=torch.float64)  # what the score of another name must exceed
        least[ended.owners[last]] = ended.scores[last]
        hopeful = (after[:, 1:] > least[live.owners, None]) & (left[live.owners, None] > live.tokens.shape[1])
        parents, columns = hopeful.nonzero(as_tuple=True)
        kept, _ = _best(live.owners[parents], after[parents, columns + 1], width)
        parents, tokens = parents[kept], columns[kept] + 1
        live = live.take(parents).followed_by(after[parents, tokens], tokens)
        windows = torch.cat([windows[parents.to(windows.device), 1:], tokens[:, None].to(windows.device)], 1)
    alphabet, of_names = ["", *scorer.vocab.characters], ended.owners.tolist()
    texts = ("".join(alphabet[token] for token in row) for row in ended.tokens.tolist())
    names = [prefixes[owner] + text for owner, text in zip(of_names, texts)]
    found: list[list[tuple[str, float]]] = [[] for _ in prefixes]
    for owner, name, score in zip(of_names, names, scorer.score(names).tolist()):
        found[owner].append((name, score))
    return [sorted(pairs, key=lambda pair: -pair[1]) for pairs in found]


def _best(owners: Tensor, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` rows of each prefix with the highest scores, and their ranks from 0: int64, prefix after prefix."""
    order = scores.argsort(descending=True, stable=True)
    order = order[owners[order].argsort(stable=True)]
    sizes = owners.bincount()
    ranks = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[owners[order]]
    return order[ranks < count], ranks[ranks < count]


def _windows(scorer: Scorer, prefixes: list[str]) -> Tensor:
    """The window after each prefix, in the engines' numbers: int64 `(prefixes, context)` on the scorer's device."""
    tokens, lengths = scorer.vocab.encode(prefixes, context=scorer.context)
    windows = tokens.gather(1, lengths[:, None] + torch.arange(scorer.context))
    return to_engine(windows, scorer.vocab.end).to(scorer.device)


def _log_probs(scorer: Scorer, windows: Tensor) -> Tensor:
    """Log-probabilities after windows, in the engines' numbers: float64 `(windows, vocab)` on the CPU."""
    with exact_float32_on(scorer.device):
        logits = scorer.nodes.window_logits(windows).cpu().double()
    if not logits.isfinite().all():
        raise SamplingError("the model's logits are NaN or infinite; train it again")
    return logits.log_softmax(1)


def _check(**numbers: int) -> None:
    for name, value in numbers.items():
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} is {value!r}; it must be an integer of at least 1")
