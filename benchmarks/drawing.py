"""Names that models draw, a character at a time, and whether they are new, different and as long as a list's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cache
from itertools import accumulate
from random import Random

import torch
from torch import Tensor

from benchmarks.networks import State
from benchmarks.tables import Row
from reference.ngram import END, KneserNey
from wavenet_conv import Vocabulary

LONGEST = 100  # characters; a name is cut there

# Reads the next token of each name, int64 `(batch,)`, and the state; gives logits `(batch, vocab)` and the new state,
# whose tensors are `(batch, ...)`. The first token is the `.` before a name, and the state before it `()`.
Step = Callable[[Tensor, State], tuple[Tensor, State]]


@torch.no_grad()
def draw_names(step: Step, vocab: Vocabulary, count: int, generator: torch.Generator, batch_size: int) -> list[str]:
    """Draws names by `torch.multinomial`, at most `batch_size` side by side; a name that has ended is dropped."""
    names: list[str] = []
    for start in range(0, count, batch_size):
        state: State = ()
        rows = torch.arange(min(batch_size, count - start))
        tokens, drawn = torch.zeros_like(rows), torch.zeros(len(rows), LONGEST, dtype=torch.int64)
        for place in range(LONGEST):
            logits, state = step(tokens, state)
            tokens = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
            drawn[rows, place], going = tokens, tokens > 0
            rows, tokens, state = rows[going], tokens[going], tuple(part[going] for part in state)
            if not len(rows):
                break
        names += vocab.decode(drawn[:, : place + 1])
    return names


def window_step(model: Callable[[Tensor], Tensor], context: int) -> Step:
    """The step of a model that reads windows `(batch, context)`: the whole window again for each character."""

    def step(tokens: Tensor, state: State) -> tuple[Tensor, State]:
        (window,) = state or (tokens.new_zeros(len(tokens), context),)
        window = torch.cat([window[:, 1:], tokens[:, None]], 1)
        return model(window), (window,)

    return step


def ngram_drawer(model: KneserNey) -> Callable[[int, int], list[str]]:
    """A function of a count and a seed that draws names in Python; the cumulative weights of a context are kept."""
    tokens, seen = END + model.characters, model.order - 1

    @cache
    def weights_after(context: str) -> list[float]:
        return list(accumulate(model.prob(context, token) for token in tokens))

    def draw(count: int, seed: int) -> list[str]:
        choices, names = Random(seed).choices, []
        for _ in range(count):
            sequence = END
            while len(sequence) <= LONGEST:
                context = sequence[max(0, len(sequence) - seen) :]
                (drawn,) = choices(tokens, cum_weights=weights_after(context))
                if drawn == END:
                    break
                sequence += drawn
            names.append(sequence[1:])
        return names

    return draw


def facts_of(drawn: Sequence[str], train: Collection[str], held_out: Collection[str]) -> Row:
    """What names show: shares, None where there is nothing to share, and the mean length in characters.

    Args:
        drawn: The names; each counts as often as it was drawn.
        train: Names that the model has learned from; a model that only repeats draws no others.
        held_out: Names that it has not learned from, but could have.

    Returns:
        `in_training`: the share that is in `train`. `in_held_out`: of the others, the share that is in `held_out`.
        `distinct`: how many are different, as a share. `mean_length`.
    """
    known, real = set(train), set(held_out)
    others = [name for name in drawn if name not in known]
    return {
        "in_training": _share(len(drawn) - len(others), len(drawn)),
        "in_held_out": _share(sum(name in real for name in others), len(others)),
        "distinct": _share(len(set(drawn)), len(drawn)),
        "mean_length": _share(sum(map(len, drawn)), len(drawn)),
    }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
