"""Ids name distinct nodes: the same id for the same tuple of children, however ids are looked up."""

import math

import hypothesis.strategies as st
import pytest
import torch
from engine.cases import ABC
from hypothesis import given, settings

from wavenet_conv.engine import ids
from wavenet_conv.engine.ids import IdCache, crossing_starts, ids_of_names, node_ids, node_starts, window_ids

DTYPES = st.sampled_from([torch.uint8, torch.int32, torch.int64])
KEYS = st.sampled_from([ids.TABLE_KEYS, 0])


def tuples(kernel_size, largest=6, **options):
    return st.lists(st.tuples(*[st.integers(0, largest)] * kernel_size), **options)


@settings(max_examples=100)
@given(st.data())
def test_ids_are_those_of_torch_unique(data):
    """From a table, by sorting, and pair by pair where int64 cannot hold a key."""
    kernel_size = data.draw(st.integers(1, 5))
    rows = torch.tensor(data.draw(tuples(kernel_size, min_size=1, max_size=60)))
    kinds = data.draw(st.sampled_from([7, 1000, 2**21, 2**30]))
    dtype = data.draw(DTYPES) if kinds == 7 else torch.int64
    rows *= (kinds - 1) // 6
    outside = data.draw(st.none() | st.lists(st.integers(0, len(rows) - 1), max_size=5).map(torch.tensor))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ids, "TABLE_KEYS", data.draw(KEYS))
        children, found = node_ids(list(rows.to(dtype).unbind(1)), kinds, None if outside is None else outside.long())
    if outside is not None and len(outside):
        rows[outside.long()] = rows[0].clone()
    expected, numbers = rows.unique(dim=0, return_inverse=True)
    assert torch.equal(children, expected) and torch.equal(found.long(), numbers)


@settings(max_examples=60)
@given(
    chunks=st.lists(tuples(3, 5, min_size=1, max_size=60), min_size=1, max_size=4),
    kernel_size=st.integers(1, 3),
    vocab_size=st.integers(1, 7),
    dtype=DTYPES,
    keys=KEYS,
)
def test_ids_of_windows_near_a_start_continue(chunks, kernel_size, vocab_size, dtype, keys):
    """They keep their ids while the nodes below grow in number; ids of other windows follow them in each chunk."""
    cache, known, kinds = IdCache(), {}, 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ids, "TABLE_KEYS", keys)
        for rows in chunks:
            rows = [row[:kernel_size] for row in rows]
            kinds = max(kinds, 1 + max(map(max, rows)))
            before = cache.windows.count
            taps = [torch.tensor(tap, dtype=dtype) for tap in zip(*rows)]
            children, found = window_ids(taps, kinds, vocab_size, cache)
            known |= dict(enumerate(map(tuple, children.tolist()), start=before))
            assert [known[number] for number in found.tolist()] == rows
    early = {row for row in known.values() if row[-2:][0] < vocab_size and not any(row[:-2])}
    assert cache.windows.count == (0 if kernel_size == 1 or not keys else len(early))


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(0, 9), max_size=6), context=st.integers(1, 8), data=st.data())
def test_nodes_start_inside_a_name(lengths, context, data):
    span = data.draw(st.integers(1, context))
    ends = [sum(lengths[: i + 1]) + context * (i + 1) for i in range(len(lengths))]
    inside = [p for end, size in zip(ends, lengths) for p in range(end - context - size, end - span + 1)]
    found = torch.tensor(lengths, dtype=torch.int64)
    assert node_starts(found, context, span).tolist() == inside
    assert sorted(crossing_starts(found, context, span).tolist()) == sorted(set(range(sum(ends[-1:]))) - set(inside))


@pytest.mark.parametrize("keys", [ids.TABLE_KEYS, 0], ids=["tables", "sorted"])
@pytest.mark.parametrize("kernel_sizes", [(2, 2, 2), (8,), (1, 4, 2), (2, 2, 2, 2), (3, 2, 2)], ids=str)
def test_each_layer_has_one_id_per_distinct_substring(names, monkeypatch, kernel_sizes, keys):
    """Of the characters that a node covers; no node reaches into the next name."""
    monkeypatch.setattr(ids, "TABLE_KEYS", keys)
    some, context = [*names[::100], "", "a" * 40], math.prod(kernel_sizes)
    tokens, lengths, _ = ABC.pack(some, context=context)
    padded, counts = ["." * context + name for name in some], []
    for index in range(len(kernel_sizes)):
        span = math.prod(kernel_sizes[: index + 1])
        counts.append(len({name[i : i + span] for name in padded for i in range(len(name) - span + 1)}))
    for tabulated in {0, min(1, len(kernel_sizes) - 1)}:
        layers, rows, starts = ids_of_names(tokens, lengths, kernel_sizes, len(ABC), tabulated=tabulated)
        assert [len(children) for children in layers] == counts[tabulated:] and len(rows) == len(starts)
        assert torch.equal(starts, node_starts(lengths, context, context))
