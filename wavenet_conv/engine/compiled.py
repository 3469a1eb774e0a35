"""Nodes shared across names, in loops that Numba compiles, for the CPU. `shared.shared_logits_ref` defines the results.

A window's key is the number whose digits are its tokens. The distinct windows are found first, then only their
children, and so on down to the tabulated layers. What is kept of a node is what its parents read: its contribution at
one tap, or for a window the log-probabilities of all tokens.

A hash of its key says to which part a node belongs. There is a part for each thread, which finds and evaluates the
nodes of its part, and waits for the others between these steps. A node's bits depend on its key alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
from operator import mul
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import distinct
from .shared import SharedNodes
from .tile import ROWS

Array = np.ndarray
Each = Callable[[Callable[[int], None]], Any]  # calls a function with the number of every part

MANY = 2**14  # outputs from which more than one thread works
KEPT = 2**26  # numbers that all tables leave to the next chunk: 256 MiB of float32
SPARSE = 16  # a table with more slots for each node is not worth clearing


class Table:
    """The distinct nodes of a layer that are read at one tap; row `i * parts + part` holds node i of a part."""

    def __init__(self, parts: int, columns: int, dtype: Any):
        self.slots = [np.zeros((64, 2), np.uint64) for _ in range(parts)]  # hash tables with linear probing
        self.counts = [0] * parts  # nodes
        self.values = np.empty((0, columns), dtype)  # what parents read

    def clear(self) -> None:
        """Forgets all nodes, and keeps the memory."""
        for slots in self.slots:
            slots.fill(0)
        self.counts = [0] * len(self.counts)

    def make_room(self) -> None:
        """Lets `values` hold all nodes, and the rest of the last block of each part.

        The second time it gets all the room that may be kept: rows that are not written take no memory.
        """
        rows, columns = (max(self.counts) + ROWS) * len(self.counts), self.values.shape[1]
        if len(self.values) < rows:
            old, spare = self.values, KEPT // columns if len(self.values) else 0
            self.values = np.empty((rows + spare, columns), old.dtype)
            self.values[: len(old)] = old


class CompiledCache:
    """What a chunk of names leaves to the next: nodes by layer and tap, in as many parts as there are threads."""

    def __init__(self) -> None:
        self.parts = 1
        self.tables: dict[tuple[int, int], Table] = {}

    def clear(self) -> None:
        """Forgets all nodes. The memory is kept, unless clearing it would take longer than new memory."""
        if any(SPARSE * max(table.counts) < len(table.slots[0]) for table in self.tables.values()):
            self.tables = {}
        for table in self.tables.values():
            table.clear()

    def prepare(self, outputs: int) -> None:
        """Before a chunk: forgets nodes that were found by fewer threads, or where a table holds too many."""
        parts = torch.get_num_threads() if outputs >= MANY else 1
        if parts > self.parts or not self.tables:
            self.parts, self.tables = parts, {}
        for table in self.tables.values():
            if sum(table.counts) * table.values.shape[1] > KEPT // len(self.tables):
                table.clear()


class CompiledNodes:
    """A model whose layers are all linear maps and tanh, and which evaluates distinct nodes only.

    Args:
        shared: The same model in PyTorch, whose weights and table are read. `why_not_compiled` allows its weights.
    """

    def __init__(self, shared: SharedNodes):
        self.context, self.kernel_sizes, self.vocab_size = shared.context, shared.kernel_sizes, shared.vocab_size
        self.tabulated, nodes = shared.tabulated, shared.nodes
        self.table = tuple(part.numpy() for part in shared.table[0])  # per tap, what the table's nodes contribute
        # How many children a node of each layer may have at one tap.
        self.kinds = [np.uint64(self.vocab_size**span) for span in accumulate(self.kernel_sizes[:-1], mul, initial=1)]
        # Per layer and tap, from a child to what it contributes; the bias is in tap 0. The last one is the head.
        self.maps = [
            [(tap.numpy(), (bias if index == 0 else torch.zeros_like(bias)).numpy()) for index, tap in enumerate(taps)]
            for taps, bias in zip(nodes.taps, nodes.biases)
        ]
        self.maps.append([(nodes.head.weight.numpy(), nodes.head.bias.numpy())])

    new_cache = CompiledCache

    def log_probs(self, tokens: Tensor, lengths: Tensor, cache: CompiledCache) -> tuple[Tensor, Tensor]:
        """As `SharedNodes.log_probs`."""
        sizes, ends = lengths.numpy(), np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(sizes, out=ends[1:])
        names, count, outputs = (tokens.numpy(), sizes, ends), len(sizes), int(ends[-1]) + len(sizes)
        cache.prepare(outputs)
        parts, bounds = cache.parts, [count * part // cache.parts for part in range(cache.parts + 1)]
        keys, log_probs = np.empty((1, outputs), np.uint64), np.empty(outputs, self.maps[-1][0][1].dtype)
        totals = np.empty(count)
        with _each_part(parts, outputs) as each:
            each(
                lambda part: distinct.window_keys(
                    *names, self.context, bounds[part], bounds[part + 1], self.vocab_size, keys[0]
                )
            )
            (rows,), (values,) = self._find(len(self.kernel_sizes) - 1, [keys], cache, each)
            each(
                lambda part: distinct.look_up(
                    *names, self.context, bounds[part], bounds[part + 1], values, rows[0], log_probs, totals
                )
            )
        return torch.from_numpy(log_probs), torch.from_numpy(totals)

    def _find(
        self, layer: int, keys: Sequence[Array], cache: CompiledCache, each: Each
    ) -> tuple[Sequence[Array], tuple[Array, ...]]:
        """Evaluates the nodes of a layer that are new.

        Keys are several uint64 `(taps, n)`. Returns the rows of their nodes, in the same shapes, and for each tap what
        parents read there, `(rows, columns)`.
        """
        if layer < self.tabulated:
            return keys, self.table
        rows, readable = [np.empty_like(wanted) for wanted in keys], []
        for tap, (_, bias) in enumerate(self.maps[layer + 1]):
            table = cache.tables.setdefault((layer, tap), Table(cache.parts, len(bias), bias.dtype))
            pairs = [(wanted[tap], found[tap]) for wanted, found in zip(keys, rows)]
            children = self._number(layer, table, pairs, each)
            self.evaluate(layer, tap, table, *self._find(layer - 1, children, cache, each), each)
            readable.append(table.values)
        return rows, tuple(readable)

    def _number(self, layer: int, table: Table, pairs: Sequence[tuple[Array, Array]], each: Each) -> Sequence[Array]:
        """Writes the row of each key, for pairs of keys and rows; returns the new nodes' children's keys by part."""
        parts, slots, counts = len(table.counts), table.slots, table.counts
        before, room = list(counts), (self.kernel_sizes[layer], sum(len(keys) for keys, _ in pairs))
        children = [np.empty(room, np.uint64) for _ in range(parts)]

        def number(part: int) -> None:
            for keys, rows in pairs:
                state = (slots[part], counts[part], before[part], children[part])
                slots[part], counts[part] = distinct.number(keys, self.kinds[layer], part, parts, *state, rows)

        each(number)
        return [keys[:, : count - old] for keys, count, old in zip(children, counts, before)]

    def evaluate(
        self, layer: int, tap: int, table: Table, children: Sequence[Array], readable: tuple[Array, ...], each: Each
    ) -> None:
        """Evaluates the last nodes of each part of a table, which have these children."""
        table.make_room()
        weights, bias = self.maps[layer + 1][tap]
        vocab_size = self.vocab_size if layer == len(self.kernel_sizes) - 1 else 0

        def evaluate_part(part: int) -> None:
            count = table.counts[part]
            where = (count - children[part].shape[1], count, part, len(table.counts))
            distinct.evaluate(readable, children[part], *where, weights, bias, vocab_size, table.values)

        each(evaluate_part)


@contextmanager
def _each_part(parts: int, outputs: int) -> Iterator[Each]:
    """How to call a function for every part: by threads where there is much to do."""
    if parts == 1 or outputs < MANY:
        yield lambda function: list(map(function, range(parts)))
    else:
        with ThreadPoolExecutor(min(parts, torch.get_num_threads())) as pool:
            yield lambda function: list(pool.map(function, range(parts)))
