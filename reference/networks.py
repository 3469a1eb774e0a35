"""The networks of the lecture series' last three parts, a gated one, and any other list of kernel sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .layers import (
    GELU,
    BatchNorm1d,
    Embedding,
    FlattenConsecutive,
    GatedBlock,
    Layer,
    LayerNorm,
    Linear,
    ReLU,
    Sequential,
    Sigmoid,
    SiLU,
    Tanh,
)

NORMS: dict[str, Any] = {"batch": BatchNorm1d, "layer": LayerNorm}
ACTIVATIONS: dict[str, Any] = {"tanh": Tanh, "relu": ReLU, "gelu": GELU, "silu": SiLU, "sigmoid": Sigmoid}

# name: (arguments of `build`, parameters), for the lecture's vocabulary of 27 tokens
NETWORKS: dict[str, tuple[dict, int]] = {
    "mlp-2-100": (dict(kernel_sizes=(3,), n_embd=2, n_hidden=100, norm="none"), 3_481),
    "mlp-2-300": (dict(kernel_sizes=(3,), n_embd=2, n_hidden=300, norm="none"), 10_281),
    "mlp-10-200": (dict(kernel_sizes=(3,), n_embd=10, n_hidden=200, norm="none"), 11_897),
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
    norm: str | Sequence[str] | None = None,
    activation: str | Sequence[str] = "tanh",
    head_kernel_size: int = 1,
    head_norm: str = "none",
    per_position: bool = False,
    gated: bool = False,
    generator: torch.Generator | None = None,
) -> Sequential:
    """Builds a tree in training mode, initialised as in the lecture, with ten times smaller logits.

    Per kernel size, lowest first, it has FlattenConsecutive, Linear (without a bias before batch norm), a norm (a key
    of `NORMS`, by default "batch", or "none"; `per_position` is the lecture's bug in batch norm) and an activation (a
    key of `ACTIVATIONS`, or "none"). The head is FlattenConsecutive, if it fuses nodes, Linear and a norm. A gated tree
    has a GatedBlock per kernel size, n_embd wide, then ReLU, Linear, ReLU and Linear. `n_hidden` (of the gates if
    gated), `norm` and `activation` are for all layers, or one per layer.
    """
    layers: list[Layer] = [Embedding(vocab_size, n_embd, generator=generator)]
    channels, count = n_embd, len(kernel_sizes)
    widths, norms = _per_layer(n_hidden, count), _per_layer(norm or ("none" if gated else "batch"), count)
    activations = _per_layer(activation, count)
    sizes = (*kernel_sizes, *widths, n_embd, vocab_size, head_kernel_size)
    if not 0 < count == len(widths) == len(norms) == len(activations) or not all(
        isinstance(size, int) and size > 0 for size in sizes
    ):
        raise ValueError(
            f"kernel sizes {kernel_sizes}, widths {widths}: give integers of at least 1, and one of each per layer"
        )
    if gated and ({*norms, *activations, head_norm} != {"none", "tanh"} or head_kernel_size > 1 or per_position):
        raise ValueError("a gated tree has no norm, other activation or merging head; leave these arguments out")
    for index, (kernel_size, width) in enumerate(zip(kernel_sizes, widths)):
        if gated:
            layers.append(GatedBlock(kernel_size, n_embd, width, index == count - 1, generator=generator))
            continue
        linear = Linear(kernel_size * channels, width, bias=norms[index] != "batch", generator=generator)
        layers += [FlattenConsecutive(kernel_size), linear, *_norm(norms[index], width, per_position)]
        layers += [] if activations[index] == "none" else [ACTIVATIONS[activations[index]]()]
        channels = width
    if gated:
        layers += [ReLU(), Linear(n_embd, n_embd, generator=generator), ReLU()]
    head, top = Linear(head_kernel_size * channels, vocab_size, generator=generator), _norm(head_norm, vocab_size)
    for weight in [norm.gamma for norm in top] or [head.weight]:
        weight *= 0.1
    layers += [FlattenConsecutive(head_kernel_size)] if head_kernel_size > 1 else []
    return Sequential([*layers, head, *top]).requires_grad()


def _per_layer(value: Any, layers: int) -> list[Any]:
    return [value] * layers if isinstance(value, (int, str)) else list(value)


def _norm(kind: str, width: int, per_position: bool = False) -> list[Any]:
    """A list with the norm of this kind, or an empty one."""
    if kind == "none":
        return []
    options = {"per_position": per_position} if kind == "batch" else {}
    return [NORMS[kind](width, **options)]


def lecture_network(name: str, *, per_position: bool = False, generator: torch.Generator | None = None) -> Sequential:
    """Builds one of `NETWORKS` by name, such as "wide", the lecture's last."""
    return build(**NETWORKS[name][0], per_position=per_position, generator=generator)
