"""Nodes shared across names: numbered layer by layer, each distinct one evaluated once.

A node's value depends on the tokens that it covers and on nothing else, so equal spans give equal nodes wherever they
stand, in one name or in a million (README: Nodes shared across names). Knows nothing of characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import prod

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from . import kernels
from .mapping import blank, fold_batch_norm
from .model import ConvWaveNet

TILE = 1024  # nodes in one matrix product, always: a node's bits cannot depend on how many others there are
TABULATED = 4096  # a layer with no more possible nodes than this is evaluated once and for all, all of them
DIRECT = 2**24  # keys up to here are numbered by a table with an entry for each, others by sorting
NEARLY_ALL = 0.8  # distinct share of a layer above which numbering the next one costs more than it saves
COLUMNS = 16  # no matrix product has fewer columns, and the head's are filled up to a multiple of this
CARRIED = 2**26  # contributions, and as many log-probabilities, that a chunk leaves to the next: 256 MiB of float32


# A layer's nodes as its parents read them: contributions and, in a gated model, values; see `Carried`.
Below = tuple[Tensor, Tensor | None]


class Numbers:
    """The numbers of keys, 0, 1, ... as they are met. table: int32 `(possible keys,)`, -1 for one not met."""

    def __init__(self) -> None:
        self.count = 0
        self.table: Tensor | None = None

    def number(self, keys: Tensor, space: int) -> tuple[Tensor, Tensor]:
        """The keys that are new, int64, ascending as their numbers do, and the number of each key, int32.

        keys: int32 or int64 `(positions,)`, from 0 to `space - 1`; the space may grow from call to call.
        """
        if self.table is None or len(self.table) < space:
            old, self.table = self.table, torch.full((space,), -1, dtype=torch.int32, device=keys.device)
            if old is not None:
                self.table[: len(old)] = old
        wanted, numbers, missing = keys, None, None
        if self.count:
            numbers = self.table.index_select(0, keys)
            missing = (numbers < 0).nonzero()[:, 0]
            wanted = keys.index_select(0, missing)
        wanted = wanted.long()
        new = torch.zeros(space, dtype=torch.bool, device=keys.device).index_fill_(0, wanted, True).nonzero()[:, 0]
        first, self.count = self.count, self.count + len(new)
        self.table.scatter_(0, new, torch.arange(first, self.count, dtype=torch.int32, device=keys.device))
        found = self.table.index_select(0, wanted)
        return new, found if numbers is None else numbers.scatter_(0, missing, found)


class Carried:
    """What one chunk of a stream leaves to the next: nodes of the first layer above the tables, windows, room to write.

    nodes: their numbers; contributions: `(kernel_size, room, channels)`, what they contribute to their parents; values: of a
    gated model, beside them, `(room, 2 * n_embd)`. windows: the numbers of windows near a name's start, see
    `number_windows`; log_probs: `(room, columns)`, of what follows those, and behind them the other windows of the
    chunk. distinct: the share of different ones among these others in the chunk where that was last counted.
    """

    def __init__(self) -> None:
        self.contributions: Tensor | None = None
        self.values: Tensor | None = None
        self.log_probs: Tensor | None = None
        self.forget()

    def trim(self) -> None:
        """Before a chunk: forgets what is too much to keep, and nodes that were numbered without a table."""
        if self.nodes.table is None or self.contributions[:, : self.nodes.count].numel() > CARRIED:
            self.forget()
        elif self.windows.count and self.log_probs[: self.windows.count].numel() > CARRIED:
            self.windows = Numbers()

    def forget(self) -> None:
        """Forgets all nodes and windows, whose children are such nodes, and keeps the room."""
        self.nodes, self.windows, self.distinct = Numbers(), Numbers(), 0.0


class SharedNodes:
    """A model in evaluation mode, ready to be evaluated on distinct nodes only.

    What a node contributes to its parent at tap j, its product with that tap's matrix, is computed once for each
    distinct node; a parent is a gather, a sum and a tanh. A gated parent also gathers the two values (h, s) of its
    rightmost child, side by side, and adds its own. Low layers with few possible nodes (the bigrams of a small
    alphabet) are tabulated here, once for all names.
    """

    @torch.no_grad()
    def __init__(self, conv: ConvWaveNet):
        folded = _widened(fold_batch_norm(conv))
        self.context, self.kernel_sizes, self.vocab_size = folded.context, folded.config.kernel_sizes, folded.config.vocab_size
        self._taps = [layer.conv.weight.permute(2, 1, 0).contiguous() for layer in folded.layers]
        self._bias = [layer.conv.bias.clone() for layer in folded.layers]
        self._gates = _Gates(folded, self._taps, self._bias) if folded.config.gated else None
        # A matrix product with 32 columns takes two thirds of the time of one with 27: columns that are never drawn.
        spare = -self.vocab_size % COLUMNS
        self._head = F.pad(folded.head.weight[..., 0].t(), (0, spare))
        self._head_bias = F.pad(folded.head.bias, (0, spare), value=-torch.inf)
        table, kinds, self.tabulated = folded.embedding.weight.clone(), self.vocab_size, 0
        table = table if self._gates is None else torch.cat([table, torch.zeros_like(table)], 1)
        self._table = self._contributions(0, _padded(table).split(TILE), len(table), Carried())
        while self.tabulated < len(self.kernel_sizes) - 1 and kinds ** self.kernel_sizes[self.tabulated] <= TABULATED:
            kernel_size, self.tabulated = self.kernel_sizes[self.tabulated], self.tabulated + 1
            children = _digits(torch.arange(kinds**kernel_size, device=table.device), kinds, kernel_size)
            kinds, nodes = len(children), self._nodes(self.tabulated - 1, self._table, children)
            self._table = self._contributions(self.tabulated, nodes, kinds, Carried())

    @torch.no_grad()
    def logits(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits after every distinct window, and for each output which of them is its and which token comes next.

        tokens: uint8 or int64 `(time,)`, the names end to end as `Vocabulary.pack` puts them, `context` zeros before
        each and after the last; lengths: int64 `(names,)`. Returns `(distinct, vocab)`, rows int64 and next tokens in
        the dtype of `tokens`, both `(sum(lengths + 1),)`, name after name.
        """
        below, children, rows, targets = self._below_top(tokens, lengths, Carried())
        return self._logits(below, children), rows, targets

    @torch.no_grad()
    def window_logits(self, windows: Tensor, carried: Carried | None = None) -> Tensor:
        """Logits after windows that need not lie in one name, int64 `(windows, context)`: `(windows, vocab)`.

        Below the last layer each distinct node of all windows is evaluated once; carried as `log_probs` takes it.
        """
        carried = Carried() if carried is None else carried
        carried.trim()
        ids, kinds, below = windows, self.vocab_size, self._table
        for layer, kernel_size in enumerate(self.kernel_sizes):
            taps = list(rearrange(ids, "windows (nodes tap) -> tap windows nodes", tap=kernel_size))
            if layer < self.tabulated:
                ids, kinds = _keys(taps, kinds), kinds**kernel_size
            elif layer < len(self.kernel_sizes) - 1:
                children, numbers = number([tap.flatten() for tap in taps], kinds, carried=carried.nodes)
                nodes, start = self._nodes(layer, below, children), max(carried.nodes.count - len(children), 0)
                below = self._contributions(layer + 1, nodes, len(children), carried, start)
                ids, kinds, carried = numbers.view_as(taps[0]), max(start + len(children), 1), Carried()
        return self._logits(below, torch.cat(taps, 1).long())

    @torch.no_grad()
    def tree_logits(self, windows: Tensor) -> Tensor:
        """As `window_logits`, and nothing shared but the tables: sooner done for a few windows, int64 as well."""
        ids, kinds, (table, values) = windows.flatten(), self.vocab_size, self._table
        for kernel_size in self.kernel_sizes[: self.tabulated]:
            ids, kinds = _keys(list(ids.view(-1, kernel_size).unbind(1)), kinds).long(), kinds**kernel_size
        values = None if values is None else values.index_select(0, ids)
        for layer, kernel_size in list(enumerate(self.kernel_sizes))[self.tabulated :]:
            if layer == self.tabulated:
                taps = ids.view(-1, kernel_size).unbind(1)
                x = sum(of_tap.index_select(0, tap) for of_tap, tap in zip(table, taps))
            else:
                x = torch.addmm(self._bias[layer], x.reshape(-1, kernel_size * x.shape[1]), self._taps[layer].flatten(0, 1))
            if values is None:
                x = torch.tanh_(x)
            else:
                values = self._gates.nodes(layer, x, values[kernel_size - 1 :: kernel_size])
                x = values[:, : self._gates.n_embd]
        return torch.addmm(self._head_bias, x, self._head)[:, : self.vocab_size]

    def _logits(self, below: Below, children: Tensor) -> Tensor:
        logits = self._head.new_empty(len(children) + -len(children) % TILE, len(self._head_bias))
        for out, nodes in zip(logits.split(TILE), self._nodes(-1, below, children)):
            torch.addmm(self._head_bias, nodes, self._head, out=out)
        return logits[: len(children), : self.vocab_size]

    @torch.no_grad()
    def log_probs(self, tokens: Tensor, lengths: Tensor, carried: Carried | None = None) -> Tensor:
        """The log-probability, in nats, of what comes next at every output: `(sum(lengths + 1),)`.

        tokens and lengths as `logits` takes them; carried: one for all chunks of a stream, so that nodes which one has
        evaluated serve the next (nothing is kept without). Where the Triton kernel runs, every distinct pair of a
        window and what follows it is evaluated by that; else, and for a gated model, this is the log-softmax of the
        logits, of which one entry is picked for each output.
        """
        if self._head.is_cuda and self._gates is None:
            kernels.warn_once_without_triton()
        carried = Carried() if carried is None else carried
        by_kernel = self._gates is None and kernels.usable(self._head.device, self._head.dtype, self.vocab_size)
        carried.trim()
        first = carried.windows.count
        below, children, rows, targets = self._below_top(tokens, lengths, carried, not by_kernel)
        if by_kernel:
            pairs, numbers = number([rows, targets], max(len(children), self.vocab_size))
            head, bias = self._head[:, : self.vocab_size].contiguous(), self._head_bias[: self.vocab_size]
            windows, following = children[pairs[:, 0]], pairs[:, 1].contiguous()
            return kernels.last_layer(below[0], windows, following, head, bias)[numbers]
        room = first + len(children) + TILE  # every tile is written whole
        out = carried.log_probs = _room(carried.log_probs, first, self._head, room, len(self._head_bias))
        for tile, nodes in zip(out[first:].split(TILE), self._nodes(-1, below, children)):
            torch.log_softmax(torch.addmm(self._head_bias, nodes, self._head), 1, out=tile)
        return out.flatten().index_select(0, rows * len(self._head_bias) + targets)

    def _below_top(
        self, tokens: Tensor, lengths: Tensor, carried: Carried, windows: bool = False
    ) -> tuple[Below, Tensor, Tensor, Tensor]:
        """What contributes to the last layer, its distinct nodes' children, and each output's node and next token."""
        layers, rows, starts = self.number(tokens, lengths, carried, windows)
        below, start = self._table, max(carried.nodes.count - len(layers[0]), 0)
        for layer, children in enumerate(layers[:-1], start=self.tabulated + 1):
            nodes = self._nodes(layer - 1, below, children)
            below = self._contributions(layer, nodes, len(children), carried, start)
            carried, start = Carried(), 0  # the layers above are numbered anew for each chunk
        return below, layers[-1], rows, tokens.index_select(0, starts + self.context)

    def number(
        self, tokens: Tensor, lengths: Tensor, carried: Carried | None = None, windows: bool = False
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Numbers the distinct nodes of every layer above the tabulated ones.

        Returns for each such layer the numbers of its distinct nodes' children, int64 `(distinct, kernel_size)`, only of
        new ones where `carried` has the others, and for the last layer each output's node, int64, and where it starts.
        windows: whether `carried` may have nodes of the last layer, too; their numbers then go on from there. The
        choice whether to number at all is made here, from what the layer below has shown.
        """
        carried = Carried() if carried is None else carried
        below: Numbers | None = carried.nodes
        ids, kinds, span = tokens, self.vocab_size, 1  # ids: a node's number at every position where one starts
        for kernel_size in self.kernel_sizes[: self.tabulated]:
            ids = _keys(taps_of(ids, kernel_size, span), kinds)
            kinds, span = kinds**kernel_size, span * kernel_size
        layers, share = [], 0.0
        for kernel_size in self.kernel_sizes[self.tabulated : -1]:
            taps, span = taps_of(ids, kernel_size, span), span * kernel_size
            if share < NEARLY_ALL:
                children, ids = number(taps, kinds, crossing(lengths, self.context, span), below)
                kinds = max(len(children), 0 if below is None else below.count, 1)
            else:
                starts = node_positions(lengths, self.context, span)
                children, numbers = every([tap.index_select(0, starts) for tap in taps])
                ids = torch.zeros_like(taps[0], dtype=torch.int64).index_copy_(0, starts, numbers)
                kinds = max(len(children), 1)
            nodes = int(lengths.sum()) + len(lengths) * (self.context + 1 - span)
            share = len(children) / max(nodes, 1)
            layers.append(children)
            below = None  # the layers above are numbered anew for each chunk
        starts = node_positions(lengths, self.context, self.context)
        taps = [tap.index_select(0, starts) for tap in taps_of(ids, self.kernel_sizes[-1], span)]
        if not windows or len(layers) != 1 or carried.nodes.table is None:
            carried = Carried()  # the same children may have other numbers in the next chunk
        if share < NEARLY_ALL:
            children, rows = number_windows(taps, kinds, self.vocab_size, carried)
        else:
            children, rows = every(taps)
            rows += carried.windows.count
        return [*layers, children], rows.long(), starts

    def _nodes(self, layer: int, below: Below, children: Tensor) -> Iterator[Tensor]:
        """Tiles `(TILE, channels)` of the layer's nodes with these children; the last is filled up with node 0's."""
        contributions, values = below
        kernel_size, room, _ = contributions.shape
        rows = _padded(children) + torch.arange(kernel_size, device=children.device) * room
        starts = torch.arange(0, TILE * kernel_size, kernel_size, device=children.device)
        for tile in rows.flatten().split(TILE * kernel_size) if len(rows) else ():
            # One pass over the rows of all taps: a gather and a sum, tap after tap.
            summed = F.embedding_bag(tile, contributions.flatten(0, 1), starts, mode="sum")
            if values is None:
                yield tanh_(summed)
            else:
                rightmost = tile[kernel_size - 1 :: kernel_size] - (kernel_size - 1) * room
                yield self._gates.nodes(layer, summed, values.index_select(0, rightmost))

    def _contributions(
        self, layer: int, tiles: Iterable[Tensor], count: int, carried: Carried, start: int = 0
    ) -> Below:
        """What nodes contribute to their parents in `layer`: `(kernel_size, room, channels)`, the bias in tap 0.

        The `count` nodes of the tiles come behind the `start` that `carried` has. Those of a gated model are kept too.
        """
        taps, channels = self._taps[layer], self._taps[layer].shape[1]
        # Every tile is written whole: the next one, or the next chunk, overwrites what the last was filled up with.
        room = start + count + TILE
        out = carried.contributions = _room(carried.contributions, start, taps, len(taps), room, taps.shape[2])
        if self._gates is not None:
            carried.values = _room(carried.values, start, taps, room, 2 * channels)
        for tile in tiles:
            rows = slice(start, start := start + TILE)
            if self._gates is not None:
                carried.values[rows], tile = tile, tile[:, :channels]
            torch.addmm(self._bias[layer], tile, taps[0], out=out[0, rows])
            for tap in range(1, len(taps)):
                torch.mm(tile, taps[tap], out=out[tap, rows])
        return out, carried.values


class _Gates:
    """What becomes of a gated node's sum: its gate, its residual and its skip, and at the top the layer `hidden`.

    As `sigmoid(x) = (1 + tanh(x / 2)) / 2`, `tanh_` serves for both. The two halvings, exact in any floating point, are
    left to the weights: those that make the gate's half of a sum, which are changed here, and those that follow it.
    """

    def __init__(self, model: ConvWaveNet, taps: list[Tensor], biases: list[Tensor]):
        for weight in [*taps, *biases]:
            weight[..., weight.shape[-1] // 2 :] /= 2
        after = [layer.convs()[1:] for layer in model.layers]  # residual, which the last layer has not, and skip
        self.matrices = [torch.cat([conv.weight[..., 0].t() for conv in convs], 1) / 2 for convs in after]
        self.biases = [torch.cat([conv.bias for conv in convs]) for convs in after]
        self.hidden, self.hidden_bias = model.hidden.weight[..., 0].t().contiguous(), model.hidden.bias.clone()
        self.n_embd = len(self.hidden)

    def nodes(self, layer: int, summed: Tensor, rightmost: Tensor) -> Tensor:
        """Nodes (h, s) side by side, `(n, 2 * n_embd)`; in the last layer what the head reads, `(n, n_embd)`.

        summed: f and half g, `(n, 2 * gate)`, overwritten; rightmost: (h, s) of the rightmost child.
        """
        f, g = tanh_(summed).chunk(2, 1)
        z, matrix = f * g.add_(_ONE), self.matrices[layer]
        nodes = torch.addmm(rightmost[:, -matrix.shape[1] :], z, matrix).add_(self.biases[layer])
        if matrix is not self.matrices[-1]:
            return nodes
        return torch.addmm(self.hidden_bias, nodes.relu_(), self.hidden).relu_()


def _widened(model: ConvWaveNet) -> ConvWaveNet:
    """An equal model with channels of zeros where there would be fewer than COLUMNS, and biases of zeros.

    In a product with fewer columns the rows at a tile's end have other last bits than equal rows before them.
    """
    config, old = model.config, model.state_dict()
    n_embd, *widths = (max(width, COLUMNS) for width in (config.n_embd, *config.n_hidden))
    wide = blank(replace(config, n_embd=n_embd, n_hidden=tuple(widths), bias=True), model.embedding.weight)
    for name, tensor in wide.state_dict().items():
        tensor.zero_()
        if name in old:
            halves = (2 if config.gated and ".conv." in name else 1, -1)  # filter and gate are widened each
            source = old[name].unflatten(0, halves)
            tensor.unflatten(0, halves)[tuple(map(slice, source.shape))] = source
    return wide


def node_positions(lengths: Tensor, context: int, span: int) -> Tensor:
    """Where the nodes that cover `span` tokens start, name after name, in the tokens of all names end to end.

    A name of L characters has `context + L` tokens of its own and `L + context + 1 - span` such nodes.
    """
    ends = torch.cumsum(lengths + (context + 1 - span), 0)
    steps = torch.ones(int(ends[-1]) if len(ends) else 0, dtype=torch.int64, device=lengths.device)
    steps[:1] = 0
    steps.scatter_(0, ends[:-1], span)  # from a name's last node to the first of the next
    return torch.cumsum(steps, 0, out=steps)


def crossing(lengths: Tensor, context: int, span: int) -> Tensor:
    """The starts that `node_positions` leaves out: where `span` tokens would reach into the next name."""
    ends = torch.cumsum(lengths + context, 0)
    return (ends[:, None] - torch.arange(1, span, device=ends.device)).flatten()


def number(
    taps: list[Tensor], kinds: int, outside: Tensor | None = None, carried: Numbers | None = None
) -> tuple[Tensor, Tensor]:
    """Numbers distinct tuples of children: a node's identity is its children's.

    taps: for each tap the children's numbers, below `kinds`, integers `(positions,)`; outside: positions that hold no
    node, numbered as the first position is; carried: what has been numbered before, which goes on from there where a
    table can. Returns the children of each new distinct node, int64 `(distinct, kernel_size)`, and the number of the node
    at each position, int32 or int64 `(positions,)`.
    """
    space = kinds ** len(taps)
    if space >= 2**62:  # more tuples than int64 has numbers: pairs first
        pairs = [number(taps[i : i + 2], kinds, outside) for i in range(0, len(taps), 2)]
        groups, numbers = number([ids for _, ids in pairs], max(len(children) for children, _ in pairs), outside)
        return torch.cat([children[group] for (children, _), group in zip(pairs, groups.unbind(1))], 1), numbers
    keys = _keys(taps, kinds)
    if outside is not None and len(outside):
        keys = keys.index_fill(0, outside, int(keys[0]))
    carried = Numbers() if carried is None else carried
    if carried.table is None and space > min(DIRECT, 32 * len(keys)):
        new, numbers = keys.unique(return_inverse=True)
    else:
        new, numbers = carried.number(keys, space)
    return _digits(new, kinds, len(taps)), numbers


def number_windows(taps: list[Tensor], kinds: int, few: int, carried: Carried) -> tuple[Tensor, Tensor]:
    """As `number`, for windows: those near a name's start by a table, which goes on from chunk to chunk.

    The node of nothing but padding has number 0, and those with one character behind padding come next. So a window
    whose children before the last two are 0, and the last but one below `few`, has seen few characters. In a list of
    short names most windows are such and few of those are distinct; the others nearly all are. They get the numbers
    behind, anew in every chunk, and where nearly all of them were distinct in an earlier chunk they are all called so.
    """
    if len(taps) == 1 or few * kinds > DIRECT:
        children, rows = number(taps, kinds)
        return children, rows + carried.windows.count
    others = taps[-2] >= few
    for tap in taps[:-2]:
        others |= tap != 0
    others = others.nonzero()[:, 0]
    keys = _keys([taps[-1], taps[-2]], few).index_fill_(0, others, 0)
    new, rows = carried.windows.number(keys, few * kinds)
    children = F.pad(torch.stack([new % few, new // few], 1), (len(taps) - 2, 0))
    if len(others):
        taps = [tap.index_select(0, others) for tap in taps]
        more, numbers = number(taps, kinds) if carried.distinct < NEARLY_ALL else every(taps)
        carried.distinct = len(more) / len(others)
        rows.scatter_(0, others, (numbers + carried.windows.count).int())
        children = torch.cat([children, more])
    return children, rows


def every(taps: list[Tensor]) -> tuple[Tensor, Tensor]:
    """As `number`, with every node called distinct: nothing is shared and nothing is looked for."""
    return torch.stack(taps, 1).long(), torch.arange(len(taps[0]), device=taps[0].device)


def _keys(taps: list[Tensor], kinds: int) -> Tensor:
    """Tuples of numbers below `kinds` as one number each, the first tap leading: int32 where they fit, else int64."""
    keys = taps[0].to(torch.int32 if kinds ** len(taps) < 2**31 else torch.int64)
    for tap in taps[1:]:
        keys = torch.add(tap, keys, alpha=kinds)
    return keys


def _digits(keys: Tensor, kinds: int, kernel_size: int) -> Tensor:
    """The tuples that `_keys` made keys of: int64 `(keys, kernel_size)`."""
    digits = [keys.long()]
    for _ in range(kernel_size - 1):
        digits[:1] = [digits[0] // kinds, digits[0] % kinds]
    return torch.stack(digits, 1)


def taps_of(ids: Tensor, kernel_size: int, dilation: int) -> list[Tensor]:
    """Shifted views: tap j of the parent at position p is `ids[p + j * dilation]`."""
    reach = (kernel_size - 1) * dilation
    return [ids[j * dilation : len(ids) - reach + j * dilation] for j in range(kernel_size)]


def _room(buffer: Tensor | None, kept: int, like: Tensor, *shape: int) -> Tensor:
    """`buffer` where it has as many rows, else a new one: for a second chunk with all the room that is kept for one.

    Rows are the second-to-last dimension; the first `kept` are those of `buffer`. Pages that are never written take no
    memory.
    """
    if buffer is not None and buffer.shape[-2] >= shape[-2]:
        return buffer
    spare = 0 if buffer is None else CARRIED * shape[-2] // prod(shape)
    room = like.new_empty(*shape[:-2], max(shape[-2], spare), shape[-1])
    if kept:
        room[..., :kept, :] = buffer[..., :kept, :]
    return room


def _padded(rows: Tensor) -> Tensor:
    """Rows of zeros behind `rows`, up to a whole number of tiles."""
    return F.pad(rows, (0, 0, 0, -len(rows) % TILE))


_ONE = torch.tensor(1.0)  # a number would be made a tensor of at every call
_GRAIN = 32768  # PyTorch gives a thread no fewer elements than this


def tanh_(x: Tensor) -> Tensor:
    """tanh in place, an element's bits independent of its place; on the CPU in float32 to 2e-7.

    There it is 2 sigmoid(2x) - 1, since sigmoid takes a fifth of the time of tanh. PyTorch's sigmoid computes whole
    vectors, and what is left over of each thread's part one by one, with other last bits: where parts are no whole
    vectors, sigmoid is written out in operations that round alike for one and for many.
    """
    if x.dtype != torch.float32 or x.is_cuda:
        return torch.tanh_(x)
    parts = max(1, min(torch.get_num_threads(), -(-x.numel() // _GRAIN)))
    x = x.add_(x)
    x = x.sigmoid_() if x.numel() % (64 * parts) == 0 else x.neg_().exp_().add_(_ONE).reciprocal_()
    return torch.sub(x.add_(x), _ONE, out=x)
