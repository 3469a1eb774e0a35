"""The training recipe of the makemore lectures, parts 2, 3 and 5: minibatches of windows, SGD, one drop of the rate."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers import Sequential

END = 0  # the token of `.`: the padding before a name and the end after it


def split_names(names: Iterable[str], seed: int = 42) -> tuple[list[str], list[str], list[str]]:
    """The training, validation and test parts: names shuffled as by `random.seed(seed)`, and cut at 80% and 90%."""
    shuffled = list(names)
    random.Random(seed).shuffle(shuffled)
    first, second = int(0.8 * len(shuffled)), int(0.9 * len(shuffled))
    return shuffled[:first], shuffled[first:second], shuffled[second:]


def examples(names: Iterable[str], characters: str, context: int) -> tuple[Tensor, Tensor]:
    """Every window of every name and the token that follows it: X int64 `(n, context)`, Y int64 `(n,)`, in order.

    The characters are the tokens 1, 2, ... in the order given.
    """
    token_of = {character: token for token, character in enumerate(characters, start=1)}
    X: list[list[int]] = []
    Y: list[int] = []
    for name in names:
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
    batch_size: int = 32,
    lr: float = 0.1,
    drop_at: int = 150_000,
    generator: torch.Generator,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> None:
    """Trains a tree in place, on examples drawn with replacement, and leaves it in training mode.

    From step `drop_at` on, counted from 0, the rate is `lr / 10`. `on_step` gets the steps so far and the mean loss.
    """
    if len(X) != len(Y) or len(X) == 0:
        raise ValueError(f"{len(X)} examples and {len(Y)} targets; give at least one example and one target for each")
    tree.train()
    parameters = tree.parameters()
    for step in range(steps):
        drawn = torch.randint(len(X), (batch_size,), generator=generator, device=generator.device)
        loss = F.cross_entropy(tree(X[drawn]), Y[drawn])
        gradients = torch.autograd.grad(loss, parameters)
        rate = lr if step < drop_at else lr / 10
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients):
                parameter -= rate * gradient
        if on_step is not None:
            on_step(step + 1, loss.detach())


@torch.no_grad()
def evaluate(tree: Sequential, X: Tensor, Y: Tensor, *, batch_size: int = 8192) -> float:
    """The mean cross-entropy in nats over all examples, in evaluation mode; restores the mode of every layer."""
    modes = [(layer, layer.training) for layer in tree.layers if hasattr(layer, "training")]
    tree.eval()
    parts = zip(X.split(batch_size), Y.split(batch_size))
    total = sum(F.cross_entropy(tree(x), y, reduction="sum").item() for x, y in parts)
    for layer, mode in modes:
        layer.training = mode
    return total / len(X)
