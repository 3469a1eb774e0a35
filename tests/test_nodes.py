"""Distinct nodes: numbered right by every way of numbering, and each worth what the slid pass says."""

import hypothesis.strategies as st
import pytest
import torch
from conftest import random_tree
from hypothesis import given, settings

from wavenet_conv import Vocabulary, from_tree, nodes
from wavenet_conv.nodes import SharedNodes, node_positions, number


@settings(max_examples=60)
@given(
    rows=st.lists(st.tuples(*[st.integers(0, 6)] * 3), min_size=1, max_size=60),
    kinds=st.sampled_from([7, 1000, 2**21, 2**30]),
    direct=st.booleans(),
)
def test_numbers_are_identities(rows, kinds, direct):
    """Whether by a table, by sorting, or pair by pair where a key has no room in int64."""
    scale = (kinds - 1) // 6
    taps = [torch.tensor(tap) * scale for tap in zip(*rows)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nodes, "DIRECT", 2**24 if direct else 0)
        children, numbers = number(taps, kinds)
    assert len(children) == len(set(rows)) == int(numbers.max()) + 1
    found = [tuple((child // scale).tolist()) for child in children[numbers]]
    assert found == rows


def test_node_positions_are_those_inside_a_name():
    lengths, context, span = torch.tensor([3, 0, 2]), 4, 2
    blocks = [list(range(7)), list(range(7, 11)), list(range(11, 17))]
    expected = [start for block in blocks for start in block if start + span <= block[-1] + 1]
    assert node_positions(lengths, context, span).tolist() == expected
    assert node_positions(torch.tensor([], dtype=torch.int64), 4, 2).tolist() == []


@pytest.mark.parametrize("fan_ins", [(2, 2, 2), (8,), (3,), (1,), (3, 2, 2), (1, 4, 2), (2, 5, 3), (2, 2, 2, 2, 2)])
@pytest.mark.parametrize("setting", [{}, {"DIRECT": 0}, {"NEARLY_ALL": 0.0}, {"TABULATED": 0}, {"TILE": 16}], ids=str)
def test_logits_are_the_slid_passs(names, vocab, device, monkeypatch, fan_ins, setting):
    for name, value in setting.items():
        monkeypatch.setattr(nodes, name, value)
    conv = from_tree(random_tree(fan_ins, n_embd=6, n_hidden=16, device=device))
    some = [*names[::97], "", "a" * 50]
    packed, lengths, _ = vocab.pack(some, context=conv.context)
    distinct, rows, targets = SharedNodes(conv).logits(packed.to(device), lengths.to(device))
    tokens, lengths = vocab.encode(some, context=conv.context)
    inside = torch.arange(tokens.shape[1] - conv.context + 1) <= lengths[:, None]
    with torch.no_grad():
        expected = conv(tokens.to(device))[inside.to(device)]
    assert (distinct[rows] - expected).abs().max() < 1e-12
    following = torch.cat([tokens[:, conv.context :], tokens.new_zeros(len(tokens), 1)], dim=1)[inside]
    assert torch.equal(targets.cpu().long(), following)


def test_each_distinct_node_is_evaluated_once(names, vocab):
    conv = from_tree(random_tree(n_embd=6, n_hidden=16))
    shared = SharedNodes(conv)
    assert shared.tabulated == 1  # 27 * 27 bigrams
    packed, lengths, _ = vocab.pack(names, context=8)
    levels, rows, _ = shared.number(packed, lengths)
    padded = ["." * 8 + name for name in names]
    for children, span in zip(levels, (4, 8)):
        spans = {name[i : i + span] for name in padded for i in range(len(name) - span + 1)}
        assert len(children) == len(spans)
    assert len(rows) == sum(len(name) + 1 for name in names)


def test_where_nearly_every_node_is_distinct_none_is_looked_for():
    vocab = Vocabulary("abcdefghijklmnopqrstuvwxyz")
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(26, (40, 60), generator=generator)
    names = ["".join(vocab.characters[c] for c in row) for row in letters.tolist()]
    shared = SharedNodes(from_tree(random_tree((4, 2, 2), n_embd=4, n_hidden=4)))
    packed, lengths, _ = vocab.pack(names, context=16)
    levels, rows, _ = shared.number(packed, lengths)
    outputs = sum(len(name) + 1 for name in names)
    assert len(levels[-1]) == outputs and torch.equal(rows, torch.arange(outputs))


def test_the_fast_tanh_is_tanh():
    x = torch.cat([torch.linspace(-20, 20, 40_001), torch.tensor([0.0, -0.0, 1e-8, 1e-30, torch.inf, -torch.inf])])
    assert (nodes.tanh_(x.clone()) - x.double().tanh()).abs().max() < 2e-7  # two roundings near 1
    assert nodes.tanh_(torch.tensor([torch.nan])).isnan().all()
    assert torch.equal(nodes.tanh_(x.double()), x.double().tanh())
