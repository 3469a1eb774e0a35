"""The lecture's training recipe: shuffled words, windows drawn one minibatch a step, plain SGD with one drop.

Knows trees and tensors only; reading lists of names, progress and tables are somebody else's.
Source: the makemore lectures, parts 2, 3 and 5.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers import Sequential

END = 0  # the token of `.`: the padding before a name and the end after it


def split_names(names: Iterable[str], seed: int = 42) -> tuple[list[str], list[str], list[str]]:
    """The names shuffled and cut at 80% and 90%: the training, validation and test parts.

    The order is that of `random.seed(seed); random.shuffle(names)`; neither `names` nor the global generator changes.
    """
    shuffled = list(names)
    random.Random(seed).shuffle(shuffled)
    first, second = int(0.8 * len(shuffled)), int(0.9 * len(shuffled))
    return shuffled[:first], shuffled[first:second], shuffled[second:]


def examples(names: Iterable[str], characters: str, context: int) -> tuple[Tensor, Tensor]:
    """Every window of every name and the token that follows it: X int64 `(n, context)`, Y int64 `(n,)`.

    The characters are tokens 1, 2, ... in the order given; a name of L characters gives L + 1 examples, in order.
    Raises `ValueError` naming a character that is not among them.
    """
    token_of = {character: token for token, character in enumerate(characters, start=1)}
    X: list[list[int]] = []
    Y: list[int] = []
    for name in names:
        unknown = [character for character in name if character not in token_of]
        if unknown:
            raise ValueError(f"name {name!r} has {unknown[0]!r}, which is not among the characters {characters!r}")
        sequence = [END] * context + [token_of[character] for character in name] + [END]
        X += [sequence[t : t + context] for t in range(len(name) + 1)]
        Y += sequence[context:]
    return torch.tensor(X, dtype=torch.int64).reshape(-1, context), torch.tensor(Y, dtype=torch.int64)


def train(
    tree: Sequential,
    X: Tensor,
    Y: Tensor,
    *,
    steps: int = 200_000,
    batch: int = 32,
    lr: float = 0.1,
    drop_at: int = 150_000,
    generator: torch.Generator,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> None:
    """Trains `tree` in place, in training mode, and leaves it there.

    Each step draws `batch` of the examples X int64 `(n, context)`, Y int64 `(n,)` with replacement, and moves every
    parameter by its gradient of the mean cross-entropy times `lr`; from step `drop_at` on (steps count from 0) times
    `lr / 10`. `on_step(steps done, loss)` gets the minibatch's loss in nats as a tensor without axes, before the move.
    Raises `ValueError` where there are no examples, or not one target each.
    """
    _check(X, Y)
    tree.train()
    parameters = tree.parameters()
    for step in range(steps):
        drawn = torch.randint(len(X), (batch,), generator=generator, device=generator.device)
        loss = F.cross_entropy(tree(X[drawn]), Y[drawn])
        gradients = torch.autograd.grad(loss, parameters)
        rate = lr if step < drop_at else lr / 10
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients):
                parameter -= rate * gradient
        if on_step is not None:
            on_step(step + 1, loss.detach())


@torch.no_grad()
def evaluate(tree: Sequential, X: Tensor, Y: Tensor, *, batch: int = 8192) -> float:
    """The mean cross-entropy in nats over all examples X int64 `(n, context)`, Y int64 `(n,)`, in evaluation mode.

    Afterwards every layer is in the mode that it was in. Raises `ValueError` where there are no examples, or not one
    target each.
    """
    _check(X, Y)
    modes = [(layer, layer.training) for layer in tree.layers if hasattr(layer, "training")]
    tree.eval()
    try:
        losses = [
            F.cross_entropy(tree(inputs), targets, reduction="sum").item()
            for inputs, targets in zip(X.split(batch), Y.split(batch))
        ]
    finally:
        for layer, mode in modes:
            layer.training = mode
    return sum(losses) / len(X)


def _check(X: Tensor, Y: Tensor) -> None:
    if len(X) != len(Y) or len(X) == 0:
        raise ValueError(f"{len(X)} examples and {len(Y)} targets; give at least one example, and one target for each")
