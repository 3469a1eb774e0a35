"""How many nodes names take in each layer: by the loop, the convolutional pass, a stream, and with shared nodes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from .config import WaveNetConfig
from .vocabulary import checked_names


class NodeCounts(NamedTuple):
    """Nodes per layer, lowest layer first; a head that fuses nodes is no layer.

    Attributes:
        loop: Of the trees of all windows, each tree computed in full.
        convolution: Of the convolutional pass, which computes one node at every position of a sequence.
        reused: How many of the loop's nodes the pass takes from an earlier window.
        stream: Of a stream, one per output.
        distinct: Different by content: two nodes of a layer are the same if they cover the same tokens.
    """

    loop: tuple[int, ...]
    convolution: tuple[int, ...]
    reused: tuple[int, ...]
    stream: tuple[int, ...]
    distinct: tuple[int, ...]


def count_nodes(names: Iterable[str], config: WaveNetConfig) -> NodeCounts:
    """Counts the nodes that all outputs of `names` take.

        count_nodes(["emma", "gemma"], WaveNetConfig()).distinct  # (7, 9, 10)

    A node's identity is the tuple of its children's ids. So names are read layer by layer, in memory that grows with
    their length and not with the context.

    Args:
        names: The names. Characters need not be in a vocabulary, as counts do not depend on its numbers.
        config: The shape of the model, for its kernel sizes.

    Raises:
        NamesError: `names` is one string, or holds something else than strings.
    """
    names = checked_names(names)
    outputs = [len(name) + 1 for name in names]
    rows: list[list[Any]] = [[None] * config.context + list(name) for name in names]  # None is padding
    layers = []
    for size, dilation in zip(config.kernel_sizes, config.dilations):
        ids: dict[tuple[Any, ...], int] = {}
        taps = ([row[tap * dilation :] for tap in range(size)] for row in rows)
        rows = [[ids.setdefault(children, len(ids)) for children in zip(*shifted)] for shifted in taps]
        trees = [count * config.context // (size * dilation) for count in outputs]
        # A short name's pass also computes nodes that no window has.
        reused = sum(max(tree - len(row), 0) for tree, row in zip(trees, rows))
        layers.append((sum(trees), sum(map(len, rows)), reused, sum(outputs), len(ids)))
    return NodeCounts(*zip(*layers))
