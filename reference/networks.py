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
    """A tree in training mode with the lecture's initialisation: the head's weights are ten times smaller.

    Per kernel size: FlattenConsecutive, Linear (with a bias only where there is no batch norm), BatchNorm1d, Tanh; gated:
    a GatedBlock, n_hidden wide inside the gate, no batch norm, and ReLU, Linear, ReLU before the head. n_hidden: one
    width for all levels, or one a level. per_position: the lecture's batch-norm bug. Raises `ValueError` naming a
    kernel size or a width below 1, and for a gated tree with batch norm.
    """
    if gated and (batch_norm or per_position):
        raise ValueError("gated and batch_norm or per_position; a gated tree has no batch norm, leave it out")
    batch_norm = not gated if batch_norm is None else batch_norm
    if not isinstance(kernel_sizes, Sequence) or not kernel_sizes:
        raise ValueError(f"kernel_sizes is {kernel_sizes!r}; give at least one, such as (2, 2, 2)")
    widths = list(n_hidden) if isinstance(n_hidden, Sequence) else [n_hidden] * len(kernel_sizes)
    if len(widths) != len(kernel_sizes):
        raise ValueError(f"{len(kernel_sizes)} kernel sizes and {len(widths)} widths; give one width for all, or one each")
    for what, sizes in (("kernel size", kernel_sizes), ("width", [n_embd, *widths]), ("vocabulary", [vocab_size])):
        for size in sizes:
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"a {what} of {size!r}; it must be an integer of at least 1")
    layers: list[Layer] = [Embedding(vocab_size, n_embd, generator=generator)]
    channels = n_embd
    for level, (kernel_size, width) in enumerate(zip(kernel_sizes, widths), start=1):
        if gated:
            layers.append(GatedBlock(kernel_size, n_embd, width, last=level == len(widths), generator=generator))
        else:
            layers += [
                FlattenConsecutive(kernel_size),
                Linear(kernel_size * channels, width, bias=not batch_norm, generator=generator),
                *([BatchNorm1d(width, per_position=per_position)] if batch_norm else []),
                Tanh(),
            ]
            channels = width
    if gated:
        layers += [ReLU(), Linear(n_embd, n_embd, generator=generator), ReLU()]
    head = Linear(channels, vocab_size, generator=generator)
    head.weight *= 0.1
    tree = Sequential([*layers, head])
    for parameter in tree.parameters():
        parameter.requires_grad = True
    return tree


def lecture_network(name: str, *, per_position: bool = False, generator: torch.Generator | None = None) -> Sequential:
    """One of `NETWORKS` by its name, such as "wide", the lecture's last; raises `ValueError` listing the names."""
    if name not in NETWORKS:
        raise ValueError(f"no network is called {name!r}; there are {', '.join(NETWORKS)}")
    return build(**NETWORKS[name][0], per_position=per_position, generator=generator)
