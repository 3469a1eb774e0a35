"""The networks of the lecture series' last three parts, a gated one, and any other list of kernel sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .layers import BatchNorm1d, Embedding, FlattenConsecutive, GatedBlock, Layer, Linear, ReLU, Sequential, Tanh

# name: (arguments of `build`, parameters), for the lecture's vocabulary of 27 tokens
NETWORKS: dict[str, tuple[dict, int]] = {
    "mlp-2-100": (dict(kernel_sizes=(3,), n_embd=2, n_hidden=100, batch_norm=False), 3_481),
    "mlp-2-300": (dict(kernel_sizes=(3,), n_embd=2, n_hidden=300, batch_norm=False), 10_281),
    "mlp-10-200": (dict(kernel_sizes=(3,), n_embd=10, n_hidden=200, batch_norm=False), 11_897),
    "mlp-bn": (dict(kernel_sizes=(3,), n_embd=10, n_hidden=200), 12_097),
    "flat": (dict(kernel_sizes=(8,), n_embd=10, n_hidden=200), 22_097),
    "tree-200": (dict(kernel_sizes=(2, 2, 2), n_embd=10, n_hidden=200), 170_897),
    "tree-68": (dict(kernel_sizes=(2, 2, 2), n_embd=10, n_hidden=68), 22_397),
    "wide": (dict(kernel_sizes=(2, 2, 2), n_embd=24, n_hidden=128), 76_579),
    "gated-96": (dict(kernel_sizes=(2, 2, 2, 2), n_embd=96, n_hidden=96, gated=True), 227_931),
}


def build(
    kernel_sizes: Sequence[int] = (2, 2, 2),
    *,
    vocab_size: int = 27,
    n_embd: int = 24,
    n_hidden: int | Sequence[int] = 128,
    batch_norm: bool | None = None,
    per_position: bool = False,
    gated: bool = False,
    generator: torch.Generator | None = None,
) -> Sequential:
    """Builds a tree in training mode, initialised as in the lecture; the head's weights are ten times smaller.

    Per kernel size, lowest first, it has FlattenConsecutive, Linear (without a bias before batch norm), BatchNorm1d
    (where wanted; `per_position` is the lecture's bug), Tanh. A gated tree has a GatedBlock per kernel size, n_embd
    wide, and ReLU, Linear, ReLU before the head. `n_hidden` is one width, or one per layer; of the gates if gated.
    """
    if gated and (batch_norm or per_position):
        raise ValueError("gated with batch_norm or per_position; a gated tree has no batch norm, leave them out")
    batch_norm = not gated if batch_norm is None else batch_norm
    widths = list(n_hidden) if isinstance(n_hidden, Sequence) else [n_hidden] * len(kernel_sizes)
    sizes = (*kernel_sizes, *widths, n_embd, vocab_size)
    if not 0 < len(kernel_sizes) == len(widths) or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(
            f"kernel sizes {kernel_sizes}, widths {widths}: give integers of at least 1, and one per layer"
        )
    layers: list[Layer] = [Embedding(vocab_size, n_embd, generator=generator)]
    channels = n_embd
    for kernel_size, width in zip(kernel_sizes, widths):
        if gated:
            last = len(layers) == len(widths)
            layers.append(GatedBlock(kernel_size, n_embd, width, last, generator=generator))
            continue
        linear = Linear(kernel_size * channels, width, bias=not batch_norm, generator=generator)
        norm = [BatchNorm1d(width, per_position=per_position)] if batch_norm else []
        layers += [FlattenConsecutive(kernel_size), linear, *norm, Tanh()]
        channels = width
    if gated:
        layers += [ReLU(), Linear(n_embd, n_embd, generator=generator), ReLU()]
    head = Linear(channels, vocab_size, generator=generator)
    head.weight *= 0.1
    return Sequential([*layers, head]).requires_grad()


def lecture_network(name: str, *, per_position: bool = False, generator: torch.Generator | None = None) -> Sequential:
    """Builds one of `NETWORKS` by name, such as "wide", the lecture's last."""
    return build(**NETWORKS[name][0], per_position=per_position, generator=generator)
