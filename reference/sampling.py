"""The lecture's way to draw names: the whole tree for every character, one name after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers import Sequential
from .running import context_of

# (probabilities (1, vocab), the name's number, its position) to a token
Draw = Callable[[Tensor, int, int], int]


def sample_loop(
    tree: Sequential, count: int, draw: Draw, *, prefix: Sequence[int] = (), max_length: int = 100
) -> list[list[int]]:
    """The tokens of `count` names, without the `.` behind them; each begins with `prefix`.

    A name that has `max_length` tokens ends there. The lecture's loop, but for the prefix, the end by length and the
    draw that is left to the caller.
    """
    names = []
    for name in range(count):
        out = list(prefix)
        context = ([0] * context_of(tree) + out)[-context_of(tree) :]
        while len(out) < max_length:
            probs = F.softmax(tree(torch.tensor([context])), dim=1)
            ix = draw(probs, name, len(out))
            if ix == 0:
                break
            context = context[1:] + [ix]
            out.append(ix)
        names.append(out)
    return names


def multinomial(generator: torch.Generator | None = None) -> Draw:
    """The lecture's draw."""
    return lambda probs, name, position: torch.multinomial(probs, num_samples=1, generator=generator).item()


def inverse_cdf(uniforms: Callable[[int, int], float]) -> Draw:
    """Draws the token on which `uniforms(name, position)`, in [0, 1), falls when probabilities are laid end to end."""

    def draw(probs: Tensor, name: int, position: int) -> int:
        summed = probs[0].cumsum(0)
        return int((summed / summed[-1] <= uniforms(name, position)).sum())

    return draw
