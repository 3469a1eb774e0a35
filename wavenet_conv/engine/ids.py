"""Node ids: integers that name distinct nodes. Reads tokens and ids only.

A node's value depends on the tokens that it covers and on nothing else. So a node's identity is the tuple of its
children's ids, and the ids of a layer are assigned to the distinct tuples (`torch.unique` defines this).
`shared.shared_logits_ref` shows the idea in thirty lines; this module does the same in fewer passes over memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

TABLE_KEYS = 2**24  # up to so many possible keys, ids are looked up in a table; otherwise keys are sorted
FEW = 2048  # tokens up to which looking for equal nodes takes longer than it saves
NEARLY_ALL_DISTINCT = 0.8  # share of distinct nodes above which looking for equal parents costs more than it saves


class IdTable:
    """Ids 0, 1, ... of keys, in the order in which the keys were first seen."""

    def __init__(self) -> None:
        self.count = 0  # ids assigned
        self.table: Tensor | None = None  # int32 (possible keys,), -1 for a key that has not been seen

    def assign(self, keys: Tensor, space: int) -> tuple[Tensor, Tensor]:
        """Looks up int32 or int64 keys from 0 to `space - 1`, and assigns ids to new ones; `space` may grow.

        Returns the new keys, int64, in the order of their ids, and the id of every key, int32 `(positions,)`.
        """
        if self.table is None or len(self.table) < space:
            old, self.table = self.table, torch.full((space,), -1, dtype=torch.int32, device=keys.device)
            if old is not None:
                self.table[: len(old)] = old
        wanted, ids, missing = keys, None, None
        if self.count:
            ids = self.table.index_select(0, keys)
            missing = (ids < 0).nonzero()[:, 0]
            wanted = keys.index_select(0, missing)
        wanted = wanted.long()
        new = torch.zeros(space, dtype=torch.bool, device=keys.device).index_fill_(0, wanted, True).nonzero()[:, 0]
        first, self.count = self.count, self.count + len(new)
        self.table.scatter_(0, new, torch.arange(first, self.count, dtype=torch.int32, device=keys.device))
        found = self.table.index_select(0, wanted)
        return new, found if ids is None or missing is None else ids.scatter_(0, missing, found)


class IdCache:
    """Ids that one chunk of a stream leaves to the next."""

    def __init__(self) -> None:
        self.nodes = IdTable()  # of the lowest layer above the tabulated ones
        self.windows = IdTable()  # of windows near a name's start, see `window_ids`
        self.distinct = 0.0  # share of distinct windows among the others, in the chunk where it was last counted

    def distinct_windows(self, taps: list[Tensor], kinds: int) -> tuple[Tensor, Tensor]:
        """`node_ids` of windows away from a name's start; nearly all of them distinct is taken for all."""
        children, ids = node_ids(taps, kinds) if self.distinct < NEARLY_ALL_DISTINCT else all_distinct(taps)
        self.distinct = len(children) / len(taps[0])
        return children, ids


def node_ids(
    taps: list[Tensor], kinds: int, outside: Tensor | None = None, table: IdTable | None = None
) -> tuple[Tensor, Tensor]:
    """Assigns ids to distinct nodes.

    Args:
        taps: For each tap the ids of the children, integers below `kinds`, `(positions,)`.
        kinds: Number of distinct children.
        outside: Positions that hold no node; they get the id of the first position.
        table: Ids assigned earlier, which are extended where a table can hold the keys.

    Returns:
        Children of the new distinct nodes, int64 `(distinct, kernel_size)`, and the id at each position `(positions,)`.
    """
    space = kinds ** len(taps)
    if space >= 2**62:  # more tuples than int64 has numbers: first pairs, then tuples of pairs
        pairs = [node_ids(taps[i : i + 2], kinds, outside) for i in range(0, len(taps), 2)]
        groups, ids = node_ids([ids for _, ids in pairs], max(len(children) for children, _ in pairs), outside)
        return torch.cat([children[group] for (children, _), group in zip(pairs, groups.unbind(1))], 1), ids
    keys = pack_keys(taps, kinds)
    if outside is not None and len(outside):
        keys = keys.index_fill(0, outside, int(keys[0]))
    table = IdTable() if table is None else table
    if table.table is None and space > min(TABLE_KEYS, 32 * len(keys)):
        new, ids = keys.unique(return_inverse=True)
    else:
        new, ids = table.assign(keys, space)
    return unpack_keys(new, kinds, len(taps)), ids


def window_ids(taps: list[Tensor], kinds: int, vocab_size: int, cache: IdCache) -> tuple[Tensor, Tensor]:
    """`node_ids` for windows: those near a name's start by a table that chunks share, the others chunk by chunk.

    The node of nothing but padding has id 0, and those with one character behind padding come next. So a window whose
    children before the last two are 0, and the last but one below `vocab_size`, has seen few characters. In a list of
    short names most windows are such, and few of them are distinct; nearly all others are.
    """
    if len(taps) == 1 or vocab_size * kinds > TABLE_KEYS:
        children, ids = node_ids(taps, kinds)
        return children, ids + cache.windows.count
    later = taps[-2] >= vocab_size
    for tap in taps[:-2]:
        later |= tap != 0
    others = later.nonzero()[:, 0]
    keys = pack_keys([taps[-1], taps[-2]], vocab_size).index_fill_(0, others, 0)
    new, ids = cache.windows.assign(keys, vocab_size * kinds)
    children = F.pad(torch.stack([new % vocab_size, new // vocab_size], 1), (len(taps) - 2, 0))
    if len(others):
        more, numbers = cache.distinct_windows([tap.index_select(0, others) for tap in taps], kinds)
        ids.scatter_(0, others, (numbers + cache.windows.count).int())
        children = torch.cat([children, more])
    return children, ids


def ids_of_names(
    tokens: Tensor,
    lengths: Tensor,
    kernel_sizes: Sequence[int],
    vocab_size: int,
    *,
    tabulated: int = 0,
    cache: IdCache | None = None,
    cache_windows: bool = False,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Assigns ids to the distinct nodes of every layer above the tabulated ones.

    Args:
        tokens: uint8 or int64 `(time,)`, the names end to end as `Vocabulary.pack` returns them.
        lengths: int64 `(names,)`, characters per name.
        kernel_sizes: Of all layers, lowest first.
        vocab_size: Number of tokens.
        tabulated: How many of the lowest layers are tabulated: their ids are keys, and all of them exist.
        cache: Ids of earlier chunks, which are extended.
        cache_windows: Whether `cache` may also hold windows; their ids then continue from there.

    Returns:
        Per layer the children of its new distinct nodes, int64 `(distinct, kernel_size)`; and for each output, int64
        `(outputs,)`, the id of its window and where that starts in `tokens`.
    """
    cache, context = IdCache() if cache is None else cache, prod(kernel_sizes)
    table: IdTable | None = cache.nodes
    ids, kinds, span = tokens, vocab_size, 1  # ids: of the node that starts at each position
    for size in kernel_sizes[:tabulated]:
        ids = pack_keys(tap_views(ids, size, span), kinds)
        kinds, span = kinds**size, span * size
    layers, share = [], float(len(tokens) <= FEW and not cache.nodes.count)
    for size in kernel_sizes[tabulated:-1]:
        taps, span = tap_views(ids, size, span), span * size
        if share < NEARLY_ALL_DISTINCT:
            children, ids = node_ids(taps, kinds, crossing_starts(lengths, context, span), table)
            kinds = max(len(children), 0 if table is None else table.count, 1)
        else:
            starts = node_starts(lengths, context, span)
            children, numbers = all_distinct([tap.index_select(0, starts) for tap in taps])
            ids = torch.zeros_like(taps[0], dtype=torch.int64).index_copy_(0, starts, numbers)
            kinds = max(len(children), 1)
        share = len(children) / max(int(lengths.sum()) + len(lengths) * (context + 1 - span), 1)
        layers.append(children)
        table = None  # layers above get new ids in every chunk
    starts = node_starts(lengths, context, context)
    taps = [tap.index_select(0, starts) for tap in tap_views(ids, kernel_sizes[-1], span)]
    if not cache_windows or len(layers) != 1 or cache.nodes.table is None:
        cache = IdCache()  # in the next chunk the same children may have other ids
    if share < NEARLY_ALL_DISTINCT:
        children, rows = window_ids(taps, kinds, vocab_size, cache)
    else:
        children, rows = all_distinct(taps)
        rows += cache.windows.count
    return [*layers, children], rows.long(), starts


def all_distinct(taps: list[Tensor]) -> tuple[Tensor, Tensor]:
    """As `node_ids`, with an id of its own for every position: nothing is shared and nothing is looked up."""
    return torch.stack(taps, 1).long(), torch.arange(len(taps[0]), device=taps[0].device)


def pack_keys(taps: Sequence[Tensor], kinds: int) -> Tensor:
    """Packs tuples of ids below `kinds` into one number each, first tap leading: int32 if they fit, else int64."""
    keys = taps[0].to(torch.int32 if kinds ** len(taps) < 2**31 else torch.int64)
    for tap in taps[1:]:
        keys = torch.add(tap, keys, alpha=kinds)
    return keys


def unpack_keys(keys: Tensor, kinds: int, kernel_size: int) -> Tensor:
    """The tuples that `pack_keys` packed: int64 `(keys, kernel_size)`."""
    digits = [keys.long()]
    for _ in range(kernel_size - 1):
        digits[:1] = [digits[0] // kinds, digits[0] % kinds]
    return torch.stack(digits, 1)


def tap_views(ids: Tensor, kernel_size: int, dilation: int) -> list[Tensor]:
    """Shifted views: tap j of the parent that starts at position p is `ids[p + j * dilation]`."""
    reach = (kernel_size - 1) * dilation
    return [ids[j * dilation : len(ids) - reach + j * dilation] for j in range(kernel_size)]


def node_starts(lengths: Tensor, context: int, span: int) -> Tensor:
    """Positions where the nodes that cover `span` tokens start, name after name, in names laid end to end.

    A name of L characters has `context + L` tokens of its own and `L + context + 1 - span` such nodes.
    """
    ends = torch.cumsum(lengths + (context + 1 - span), 0)
    steps = torch.ones(int(ends[-1]) if len(ends) else 0, dtype=torch.int64, device=lengths.device)
    steps[:1] = 0
    steps.scatter_(0, ends[:-1], span)  # from a name's last node to the first node of the next name
    return torch.cumsum(steps, 0, out=steps)


def crossing_starts(lengths: Tensor, context: int, span: int) -> Tensor:
    """Positions that `node_starts` leaves out: `span` tokens from there would reach into the next name."""
    ends = torch.cumsum(lengths + context, 0)
    return (ends[:, None] - torch.arange(1, span, device=ends.device)).flatten()
