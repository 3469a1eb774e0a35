"""The lecture's way to draw names: the whole tree for every character, one name at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers import Sequential
from .running import context_of

# (probabilities (1, vocab), index of the name, position in it) to a token
Draw = Callable[[Tensor, int, int], int]


def sample_loop(
    tree: Sequential, count: int, draw: Draw, *, prefix: Sequence[int] = (), max_length: int = 100, end: int = 0
) -> list[list[int]]:
    """The tokens of `count` names, without the final `end`; each starts with `prefix` and has at most `max_length`."""
    names = []
    for name in range(count):
        out = list(prefix)
        context = ([end] * context_of(tree) + out)[-context_of(tree) :]
        while len(out) < max_length:
            probs = F.softmax(tree(torch.tensor([context])), dim=1)
            ix = draw(probs, name, len(out))
            if ix == end:
                break
            context = context[1:] + [ix]
            out.append(ix)
        names.append(out)
    return names


def multinomial(generator: torch.Generator | None = None) -> Draw:
    """The lecture's draw."""
    return lambda probs, name, position: torch.multinomial(probs, num_samples=1, generator=generator).tolist()[0][0]


def inverse_cdf(uniforms: Callable[[int, int], float]) -> Draw:
    """Draws by the inverse of the cumulative distribution at `uniforms(name, position)`, in [0, 1)."""

    def draw(probs: Tensor, name: int, position: int) -> int:
        summed = probs[0].cumsum(0)
        return int((summed / summed[-1] <= uniforms(name, position)).sum())

    return draw
