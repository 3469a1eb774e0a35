"""Nodes shared across names: every distinct node of a list of names is evaluated once.

`shared_logits_ref` is the idea in thirty lines, and defines the results. `SharedNodes` does the same faster: ids
without sorting (`ids`), contributions computed once per node, low layers tabulated, nodes kept from chunk to chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from math import prod

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .ids import IdCache, IdTable, ids_of_names, node_ids, pack_keys, unpack_keys
from .nodes import NodeWeights
from .weights import Weights

TILE = 1024  # rows of a matrix product; only the last one of a layer may have fewer, see `smallest_tile`
CUDA_TILE = 65_536  # of one on a GPU, where the last one has as many too
TABULATED = 4096  # a layer with at most this many possible nodes is evaluated once, all of them
CACHED = 2**26  # numbers that a chunk leaves to the next, in contributions and in log-probabilities: 256 MiB of float32

# What parents read of a layer's nodes: contributions `(kernel_size, nodes, c_out)`, and in a gated model values
# `(nodes, 2 * n_embd)`.
Readable = tuple[Tensor, Tensor | None]


@torch.no_grad()
def shared_logits_ref(weights: Weights, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Logits after every distinct window: the definition, one `torch.unique` per layer.

    Windows int64 `(n, context)` to logits `(distinct, vocab)` and each window's row of them, int64 `(n,)`.
    """
    h, ids = weights.embedding, windows
    s = torch.zeros_like(h)
    for layer in weights.layers:
        kernel_size = len(layer.taps)
        tuples = rearrange(ids, "n (node child) -> (n node) child", child=kernel_size)
        children, ids = tuples.unique(dim=0, return_inverse=True)  # a node's identity is the tuple of its children's
        ids = ids.view(len(windows), -1)
        total = layer.bias + sum(h[children[:, tap]] @ layer.taps[tap] for tap in range(kernel_size))
        if layer.skip is None:
            h = layer.activate(total)
        else:
            f, g = total.chunk(2, dim=1)
            z, rightmost = torch.tanh(f) * torch.sigmoid(g), children[:, -1]
            s = s[rightmost] + z @ layer.skip.weight + layer.skip.bias
            if layer.residual is not None:
                h = h[rightmost] + z @ layer.residual.weight + layer.residual.bias
    if weights.hidden is not None:
        h = torch.relu(torch.relu(s) @ weights.hidden.weight + weights.hidden.bias)
    return h @ weights.head.weight + weights.head.bias, ids[:, 0]


class NodeCache:
    """What one chunk of a stream leaves to the next: ids, what nodes contribute, log-probabilities after windows."""

    def __init__(self) -> None:
        self.ids = IdCache()
        self.contributions: Tensor | None = None  # (kernel_size, room, c_out) of the lowest layer above the tables
        self.values: Tensor | None = None  # (room, 2 * n_embd) beside them in a gated model
        self.log_probs: Tensor | None = None  # (room, columns) after cached windows, then the chunk's other windows

    def clear(self) -> None:
        """Forgets all nodes and windows, and keeps the memory."""
        self.ids = IdCache()

    def trim(self) -> None:
        """Before a chunk: forgets what takes too much memory, and nodes whose ids are not in a table."""
        ids = self.ids
        if ids.nodes.table is None or _too_many(self.contributions, ids.nodes.count):
            self.clear()
        elif _too_many(self.log_probs, ids.windows.count):
            ids.windows = IdTable()

    def room_for_contributions(self, used: int, like: Tensor, shape: tuple[int, ...], width: int) -> Readable:
        """Memory for contributions of this shape and values of this width (0: none), of which `used` rows are kept."""
        self.contributions = _room(self.contributions, used, like, *shape)
        if width:
            self.values = _room(self.values, used, like, shape[-2], width)
        return self.contributions, self.values

    def room_for_log_probs(self, used: int, like: Tensor, rows: int, columns: int) -> Tensor:
        """Memory for log-probabilities, of which `used` rows are kept."""
        self.log_probs = _room(self.log_probs, used, like, rows, columns)
        return self.log_probs


class SharedNodes:
    """A model that evaluates distinct nodes only.

    Attributes:
        nodes: The weights.
        tabulated: How many of the lowest layers are tabulated: few nodes are possible, and all of them are evaluated
            once, here.
        table: What parents read of the highest tabulated layer, or of the embedding; a node's id is its key.
    """

    new_cache = NodeCache

    @torch.no_grad()
    def __init__(self, weights: Weights):
        self.nodes = nodes = NodeWeights.prepare(weights)
        self.context, self.kernel_sizes = weights.config.context, weights.kernel_sizes
        self.vocab_size = nodes.vocab_size
        kinds, self.tabulated, rows = self.vocab_size, 0, whole_tile(nodes)
        tiles = _padded(nodes.embedding, rows, rows).split(rows)
        self.table = _first(contribute(nodes, 0, tiles, kinds, NodeCache()), kinds)
        while self.tabulated < len(self.kernel_sizes) - 1 and kinds ** self.kernel_sizes[self.tabulated] <= TABULATED:
            size, self.tabulated = self.kernel_sizes[self.tabulated], self.tabulated + 1
            self.table = tabulate(nodes, self.tabulated, self.table, kinds, size)
            kinds **= size

    @cached_property
    def tile(self) -> int:
        """The fewest rows of a matrix product."""
        return CUDA_TILE if self.nodes.embedding.is_cuda else smallest_tile(self.nodes)

    @torch.no_grad()
    def logits(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits after every distinct window, `(distinct, vocab)`; for each output its row, and the token that follows.

        Names lie end to end in `tokens` `(time,)`, as `Vocabulary.pack` returns them with their lengths `(names,)`.
        """
        readable, children, rows, targets = self._below_last(tokens, lengths, NodeCache())
        return self._logits(readable, children), rows, targets

    @torch.no_grad()
    def window_logits(self, windows: Tensor, cache: NodeCache | None = None) -> Tensor:
        """Logits after windows int64 `(n, context)` that need not come from one name: `(n, vocab)`.

        Nodes below the last layer are shared; `cache` as in `log_probs`.
        """
        cache = NodeCache() if cache is None else cache
        cache.trim()
        ids, kinds, readable, taps = windows, self.vocab_size, self.table, [windows]
        for layer, size in enumerate(self.kernel_sizes):
            taps = list(rearrange(ids, "n (node tap) -> tap n node", tap=size))
            if layer < self.tabulated:
                ids, kinds = pack_keys(taps, kinds), kinds**size
            elif layer < len(self.kernel_sizes) - 1:
                children, numbers = node_ids([tap.flatten() for tap in taps], kinds, table=cache.ids.nodes)
                tiles = evaluate(self.nodes, layer, readable, children, self.tile)
                used = max(cache.ids.nodes.count - len(children), 0)
                readable = contribute(self.nodes, layer + 1, tiles, len(children), cache, used)
                ids, kinds, cache = numbers.view_as(taps[0]), max(used + len(children), 1), NodeCache()
        return self._logits(readable, torch.cat(taps, 1).long())

    @torch.no_grad()
    def log_probs(self, tokens: Tensor, lengths: Tensor, cache: NodeCache | None = None) -> tuple[Tensor, Tensor]:
        """The log-probability, in nats, of the token that follows each output, and their sum for each name.

        Arguments as in `logits`; `cache` has nodes of earlier chunks and is extended.

        Returns:
            `(sum(lengths + 1),)`, name after name, and float64 `(names,)`.
        """
        head, cache = self.nodes.head, NodeCache() if cache is None else cache
        cache.trim()
        used, columns = cache.ids.windows.count, len(head.bias)
        readable, children, rows, targets = self._below_last(tokens, lengths, cache, cache_windows=True)
        out = cache.room_for_log_probs(used, head.weight, used + len(children) + whole_tile(self.nodes), columns)
        for nodes in evaluate(self.nodes, -1, readable, children, self.tile):
            logits = torch.addmm(head.bias, nodes, head.weight)
            torch.log_softmax(logits, 1, out=out[used : (used := used + len(nodes))])
        found = out.flatten().index_select(0, rows * columns + targets)
        # Adds one after the other, which `sum` does not.
        return found, torch.segment_reduce(found.double(), "sum", lengths=lengths + 1, unsafe=True)

    def _below_last(
        self, tokens: Tensor, lengths: Tensor, cache: NodeCache, cache_windows: bool = False
    ) -> tuple[Readable, Tensor, Tensor, Tensor]:
        """What the last layer reads, the children of its distinct nodes, and each output's node and next token."""
        layers, rows, starts = ids_of_names(
            tokens,
            lengths,
            self.kernel_sizes,
            self.vocab_size,
            tabulated=self.tabulated,
            cache=cache.ids,
            cache_windows=cache_windows,
        )
        readable, used = self.table, max(cache.ids.nodes.count - len(layers[0]), 0)
        for layer, children in enumerate(layers[:-1], start=self.tabulated + 1):
            tiles = evaluate(self.nodes, layer - 1, readable, children, self.tile)
            readable = contribute(self.nodes, layer, tiles, len(children), cache, used)
            cache, used = NodeCache(), 0  # layers above get new ids in every chunk
        return readable, layers[-1], rows, tokens.index_select(0, starts + self.context)

    def _logits(self, readable: Readable, children: Tensor) -> Tensor:
        head = self.nodes.head
        tiles = evaluate(self.nodes, -1, readable, children, self.tile)
        logits = [torch.addmm(head.bias, nodes, head.weight) for nodes in tiles]
        return torch.cat([head.weight.new_empty(0, len(head.bias)), *logits])[: len(children), : self.vocab_size]


def smallest_tile(nodes: NodeWeights) -> int:
    """The fewest rows, a power of 2, with which all products of this model have the bits of one of TILE rows.

    So a node's bits do not depend on how many other nodes there are. Libraries for matrix products choose their method
    by the number of rows, and processors differ in where the bits change; so this tries the model's own matrices.
    """
    weights = [tap for taps in nodes.taps for tap in taps] + [gate.weight for gate in nodes.gates] + [nodes.head.weight]
    numbers = torch.arange(TILE * max(map(len, weights)), device="cpu").to(weights[0]).sin_()
    pairs = [(numbers[: TILE * len(weight)].view(TILE, -1), weight) for weight in weights]
    whole, rows = [x @ weight for x, weight in pairs], TILE
    while rows > 1 and all(
        torch.equal(x[: rows // 2] @ weight, y[: rows // 2]) for (x, weight), y in zip(pairs, whole)
    ):
        rows //= 2
    return rows


def whole_tile(nodes: NodeWeights) -> int:
    """The most rows of a matrix product of this model."""
    return CUDA_TILE if nodes.embedding.is_cuda else TILE


def tabulate(nodes: NodeWeights, layer: int, below: Readable, kinds: int, kernel_size: int) -> Readable:
    """What parents in `layer` read of all nodes that are possible below it.

    Those have `kernel_size` children out of `kinds`, of which parents read `below`.
    """
    children = unpack_keys(torch.arange(kinds**kernel_size, device=nodes.embedding.device), kinds, kernel_size)
    tiles = evaluate(nodes, layer - 1, below, children, whole_tile(nodes))
    return _first(contribute(nodes, layer, tiles, len(children), NodeCache()), len(children))


def evaluate(nodes: NodeWeights, layer: int, readable: Readable, children: Tensor, tile: int) -> Iterator[Tensor]:
    """Yields tiles `(whole_tile, channels)` of the nodes with these children; the last one may have fewer rows.

    The last one is filled up with node 0's, to a power of 2 that is at least `tile`.
    """
    contributions, values = readable
    size, room, _ = contributions.shape
    whole = whole_tile(nodes)
    rows = _padded(children, tile, whole) + torch.arange(size, device=children.device) * room
    starts = torch.arange(0, whole * size, size, device=children.device)
    for part in rows.flatten().split(whole * size) if len(rows) else ():
        # A gather and a sum, tap after tap, in one pass over the rows.
        summed = F.embedding_bag(part, contributions.flatten(0, 1), starts[: len(part) // size], mode="sum")
        rightmost = None if values is None else values.index_select(0, part[size - 1 :: size] - (size - 1) * room)
        yield nodes.values(layer, summed, rightmost)


def contribute(
    nodes: NodeWeights, layer: int, tiles: Iterable[Tensor], count: int, cache: NodeCache, used: int = 0
) -> Readable:
    """What `count` nodes in tiles contribute to their parents in `layer`, behind the `used` ones in the cache.

    The bias of the parents is in tap 0.
    """
    taps, bias = nodes.taps[layer], nodes.biases[layer]
    size, c_in, c_out = taps.shape
    # Tiles are written whole: the next one, or the next chunk, overwrites what the last one was filled up with.
    shape = (size, used + count + whole_tile(nodes), c_out)
    out, values = cache.room_for_contributions(used, taps, shape, 0 if nodes.hidden is None else 2 * c_in)
    for tile in tiles:
        rows = slice(used, used := used + len(tile))
        if values is not None:
            values[rows], tile = tile, tile[:, :c_in]
        torch.addmm(bias, tile, taps[0], out=out[0, rows])
        for tap in range(1, size):
            torch.mm(tile, taps[tap], out=out[tap, rows])
    return out, values


def _first(readable: Readable, count: int) -> Readable:
    """A copy for the first nodes, without room for tiles."""
    contributions, values = readable
    return contributions[:, :count].clone(), None if values is None else values[:count].clone()


def _too_many(buffer: Tensor | None, rows: int) -> bool:
    return buffer is not None and buffer[..., :rows, :].numel() > CACHED


def _room(buffer: Tensor | None, used: int, like: Tensor, *shape: int) -> Tensor:
    """`buffer` if it has enough rows, else a new one; the second one gets all the room that may be kept.

    Rows are the second-to-last dimension; the first `used` ones are copied. Pages that are never written take no
    memory, except on a GPU: there the second one gets twice the rows.
    """
    if buffer is not None and buffer.shape[-2] >= shape[-2]:
        return buffer
    spare = 0 if buffer is None else 2 * shape[-2] if like.is_cuda else CACHED * shape[-2] // prod(shape)
    room = like.new_empty(*shape[:-2], max(shape[-2], spare), shape[-1])
    if used and buffer is not None:
        room[..., :used, :] = buffer[..., :used, :]
    return room


def _padded(rows: Tensor, tile: int, whole: int) -> Tensor:
    """Rows of zeros behind `rows`, up to a whole number of tiles; the last one has a power of 2, at least `tile`."""
    left = len(rows) % whole
    return F.pad(rows, (0, 0, 0, max(tile, 1 << (left - 1).bit_length()) - left if left else 0))
