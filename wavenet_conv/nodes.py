"""Nodes shared across names: numbered level by level, each distinct one evaluated once.

A node's value depends on the tokens that it covers and on nothing else, so equal spans give equal nodes wherever they
stand, in one name or in a million (README: Nodes shared across names). Knows nothing of characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .mapping import fold_batch_norm
from .model import ConvWaveNet

TILE = 1024  # nodes in one matrix product, always: a node's bits cannot depend on how many others there are
TABULATED = 4096  # a level with no more possible nodes than this is evaluated once and for all, all of them
DIRECT = 2**24  # keys up to here are numbered by a table of that many bits and numbers, others by sorting
NEARLY_ALL = 0.8  # distinct share of a level above which numbering the next one costs more than it saves


class SharedNodes:
    """A model in evaluation mode, ready to be evaluated on distinct nodes only.

    What a node contributes to its parent at tap j, its product with that tap's matrix, is computed once for each
    distinct node; a parent is a gather, a sum and a tanh. Low levels with few possible nodes (the bigrams of a small
    alphabet) are tabulated here, once for all names.
    """

    @torch.no_grad()
    def __init__(self, conv: ConvWaveNet):
        folded = fold_batch_norm(conv)
        self.context, self.fan_ins, self.vocab_size = folded.context, folded.config.fan_ins, folded.config.vocab_size
        self._taps = [level.conv.weight.permute(2, 1, 0).contiguous() for level in folded.levels]
        self._bias = [level.conv.bias.clone() for level in folded.levels]
        self._head, self._head_bias = folded.head.weight[..., 0].t().contiguous(), folded.head.bias.clone()
        table, kinds, self.tabulated = folded.embedding.weight.clone(), self.vocab_size, 0
        self._table = self._contributions(0, _padded(table).split(TILE), len(table))
        while self.tabulated < len(self.fan_ins) - 1 and kinds ** self.fan_ins[self.tabulated] <= TABULATED:
            tuples = torch.cartesian_prod(*[torch.arange(kinds, device=table.device)] * self.fan_ins[self.tabulated])
            tuples = tuples.view(-1, self.fan_ins[self.tabulated])
            self.tabulated, kinds = self.tabulated + 1, len(tuples)
            self._table = self._contributions(self.tabulated, self._nodes(self._table, tuples), len(tuples))

    @torch.no_grad()
    def logits(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits after every distinct window, and for each output which of them is its and which token comes next.

        tokens: uint8 or int64 `(time,)`, the names end to end as `Vocabulary.pack` puts them, `context` zeros before
        each and after the last; lengths: int64 `(names,)`. Returns `(distinct, vocab)`, rows int64 and next tokens in
        the dtype of `tokens`, both `(sum(lengths + 1),)`, name after name.
        """
        contributions, children, rows, targets = self._below_top(tokens, lengths)
        logits = self._head.new_empty(len(children) + -len(children) % TILE, self.vocab_size)
        for out, nodes in zip(logits.split(TILE), self._nodes(contributions, children)):
            torch.addmm(self._head_bias, nodes, self._head, out=out)
        return logits[: len(children)], rows, targets

    @torch.no_grad()
    def log_probs(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """The log-probability, in nats, of what comes next at every output: `(sum(lengths + 1),)`.

        Arguments as `logits` takes them. Where the Triton kernel runs, every distinct pair of a window and what follows
        it is evaluated by that; else this is the log-softmax of `logits`, of which one entry a row is kept.
        """
        if self._head.is_cuda:
            kernels.warn_once_without_triton()
        if not kernels.usable(self._head.device, self._head.dtype, self.vocab_size):
            logits, rows, targets = self.logits(tokens, lengths)
            return logits.log_softmax(1).flatten().index_select(0, rows * self.vocab_size + targets)
        contributions, children, rows, targets = self._below_top(tokens, lengths)
        pairs, numbers = number([rows, targets.long()], max(len(children), self.vocab_size))
        windows = children[pairs[:, 0]]
        return kernels.last_level(contributions, windows, pairs[:, 1].contiguous(), self._head, self._head_bias)[
            numbers
        ]

    def _below_top(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What contributes to the last level, its distinct nodes' children, and each output's node and next token."""
        levels, rows, starts = self.number(tokens, lengths)
        contributions = self._table
        for level, children in enumerate(levels[:-1], start=self.tabulated + 1):
            contributions = self._contributions(level, self._nodes(contributions, children), len(children))
        return contributions, levels[-1], rows, tokens.index_select(0, starts + self.context)

    def number(self, tokens: Tensor, lengths: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Numbers the distinct nodes of every level above the tabulated ones.

        Returns for each such level the numbers of its distinct nodes' children, int64 `(distinct, fan_in)`, and for the
        last one each output's node, and where it starts. The choice whether to number at all is made here, from what
        the level below has shown.
        """
        ids, kinds, span = tokens.long(), self.vocab_size, 1  # ids: a node's number at every position where one starts
        for fan_in in self.fan_ins[: self.tabulated]:
            ids = _keys(_taps(ids, fan_in, span), kinds)
            kinds, span = kinds**fan_in, span * fan_in
        levels, share = [], 0.0
        for fan_in in self.fan_ins[self.tabulated :]:
            dilation, span = span, span * fan_in
            starts = node_positions(lengths, self.context, span)
            taps = [tap.index_select(0, starts) for tap in _taps(ids, fan_in, dilation)]
            children, numbers = number(taps, kinds) if share < NEARLY_ALL else every(taps)
            levels.append(children)
            if span < self.context:
                kinds, share = len(children), len(children) / max(1, len(starts))
                ids = torch.zeros_like(ids).index_copy_(0, starts, numbers)
        return levels, numbers, starts

    def _nodes(self, contributions: Tensor, children: Tensor) -> Iterator[Tensor]:
        """Tiles `(TILE, channels)` of the nodes with these children; the last one is filled up with node 0's."""
        fan_in, kinds, _ = contributions.shape
        rows = _padded(children) + torch.arange(fan_in, device=children.device) * kinds
        for tile in rows.split(TILE):
            # One pass over the rows of all taps: a gather and a sum, tap after tap.
            yield tanh_(F.embedding_bag(tile, contributions.flatten(0, 1), mode="sum"))

    def _contributions(self, level: int, tiles: Iterable[Tensor], count: int) -> Tensor:
        """What `count` nodes contribute to their parents in `level`: `(fan_in, nodes, channels)`, the bias in tap 0."""
        taps = self._taps[level]
        biases = [self._bias[level]] + [torch.zeros_like(self._bias[level])] * (len(taps) - 1)
        out = taps.new_empty(len(taps), count + -count % TILE, taps.shape[2])
        for index, tile in enumerate(tiles):
            for tap, bias in enumerate(biases):
                torch.addmm(bias, tile, taps[tap], out=out[tap, index * TILE : (index + 1) * TILE])
        return out


def node_positions(lengths: Tensor, context: int, span: int) -> Tensor:
    """Where the nodes that cover `span` tokens start, name after name, in the tokens of all names end to end.

    A name of L characters has `context + L` tokens of its own and `L + context + 1 - span` such nodes.
    """
    nodes = lengths + (context + 1 - span)
    names = torch.arange(len(lengths), device=lengths.device)
    return torch.arange(int(nodes.sum()), device=lengths.device) + (span - 1) * names.repeat_interleave(nodes)


def number(taps: list[Tensor], kinds: int) -> tuple[Tensor, Tensor]:
    """Numbers distinct tuples of children: a node's identity is its children's.

    taps: for each tap the children's numbers, below `kinds`, int64 `(positions,)`. Returns the children of each
    distinct node, int64 `(distinct, fan_in)`, and the number of the node at each position, int64 `(positions,)`.
    """
    if kinds ** len(taps) >= 2**62:  # more tuples than int64 has numbers: pairs first
        pairs = [number(taps[i : i + 2], kinds) for i in range(0, len(taps), 2)]
        _, numbers = number([numbers for _, numbers in pairs], max(len(children) for children, _ in pairs))
        return _examples(taps, numbers), numbers
    keys, space = _keys(taps, kinds), kinds ** len(taps)
    if space <= DIRECT and space <= 32 * len(keys):
        present = torch.zeros(space, dtype=torch.bool, device=keys.device).index_fill_(0, keys, True)
        numbers = present.cumsum(0).sub_(1).index_select(0, keys)
    else:
        _, numbers = keys.unique(return_inverse=True)
    return _examples(taps, numbers), numbers


def every(taps: list[Tensor]) -> tuple[Tensor, Tensor]:
    """As `number`, with every node called distinct: nothing is shared and nothing is looked for."""
    return torch.stack(taps, 1), torch.arange(len(taps[0]), device=taps[0].device)


def _examples(taps: list[Tensor], numbers: Tensor) -> Tensor:
    """The children of each number, read where one node that has it stands."""
    count = int(numbers.max()) + 1 if len(numbers) else 0
    places = torch.zeros(count, dtype=torch.int64, device=numbers.device)
    places.scatter_(0, numbers, torch.arange(len(numbers), device=numbers.device))
    return torch.stack([tap.index_select(0, places) for tap in taps], 1)


def _keys(taps: list[Tensor], kinds: int) -> Tensor:
    """Tuples of numbers below `kinds` as one number each, the first tap leading."""
    keys = taps[0]
    for tap in taps[1:]:
        keys = keys * kinds + tap
    return keys


def _taps(ids: Tensor, fan_in: int, dilation: int) -> list[Tensor]:
    """Shifted views: tap j of the parent at position p is `ids[p + j * dilation]`."""
    reach = (fan_in - 1) * dilation
    return [ids[j * dilation : len(ids) - reach + j * dilation] for j in range(fan_in)]


def _padded(rows: Tensor) -> Tensor:
    """Rows of zeros behind `rows`, up to a whole number of tiles."""
    return F.pad(rows, (0, 0, 0, -len(rows) % TILE))


def tanh_(x: Tensor) -> Tensor:
    """tanh in place; float32 on the CPU as 2 sigmoid(2x) - 1, right to 1e-7, since sigmoid is several times as fast."""
    if x.dtype == torch.float32 and not x.is_cuda:
        return x.mul_(2).sigmoid_().mul_(2).sub_(1)
    return torch.tanh_(x)
