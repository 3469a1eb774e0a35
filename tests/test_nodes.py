"""Distinct nodes: numbered right by every way of numbering, and each worth what the convolutional pass says."""

import random

import hypothesis.strategies as st
import pytest
import torch
from conftest import random_tree
from hypothesis import given, settings

from wavenet_conv import Scorer, Vocabulary, from_tree, nodes
from wavenet_conv.nodes import Carried, Numbers, SharedNodes, crossing, node_positions, number, number_windows


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
        patch.setattr(nodes, "DIRECT", 2**24 if direct else -1)
        children, numbers = number(taps, kinds)
    assert len(children) == len(set(rows)) == int(numbers.max()) + 1
    found = [tuple((child // scale).tolist()) for child in children[numbers]]
    assert found == rows


def test_numbering_goes_on_from_chunk_to_chunk():
    """A carried table gives the tuples of a later chunk the numbers that an earlier one gave them."""
    carried, generator = Numbers(), torch.Generator().manual_seed(0)
    known: dict[tuple[int, ...], int] = {}
    for _ in range(3):
        taps = [torch.randint(12, (100,), generator=generator) for _ in range(2)]
        children, numbers = number(taps, 12, carried=carried)
        found = [tuple(child) for child in children.tolist()]
        assert not set(found) & set(known)
        known |= dict(zip(found, range(len(known), carried.count)))
        assert [known[pair] for pair in zip(*(tap.tolist() for tap in taps))] == numbers.tolist()
    assert len(known) == carried.count > 100


@settings(max_examples=60)
@given(
    chunks=st.lists(st.lists(st.tuples(*[st.integers(0, 5)] * 3), min_size=1, max_size=60), min_size=1, max_size=4),
    kernel_size=st.integers(1, 3),
    few=st.integers(1, 7),
    dtype=st.sampled_from([torch.uint8, torch.int32, torch.int64]),
)
def test_windows_are_numbered_from_chunk_to_chunk(chunks, kernel_size, few, dtype):
    """Early ones keep their numbers while the nodes below grow in number; the others are numbered behind them."""
    carried, known, kinds = Carried(), {}, 1
    for rows in chunks:
        rows = [row[:kernel_size] for row in rows]
        kinds = max(kinds, 1 + max(map(max, rows)))
        before = carried.windows.count
        taps = [torch.tensor(tap, dtype=dtype) for tap in zip(*rows)]
        children, numbers = number_windows(taps, kinds, few, carried)
        known |= dict(enumerate(map(tuple, children.tolist()), start=before))
        assert [known[number] for number in numbers.tolist()] == rows
        early = [row for row in known.values() if kernel_size > 1 and row[-2] < few and not any(row[:-2])]
        assert len(set(early)) == len(early) == carried.windows.count  # each once, (0, ..., 0) always among them


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 9), max_size=6),
    context=st.integers(1, 8),
    data=st.data(),
)
def test_node_positions_are_those_inside_a_name(lengths, context, data):
    span = data.draw(st.integers(1, context))
    blocks, end = [], 0
    for length in lengths:
        blocks.append(range(end, end := end + context + length))
    expected = [start for block in blocks for start in block if start + span <= block[-1] + 1]
    lengths = torch.tensor(lengths, dtype=torch.int64)
    assert node_positions(lengths, context, span).tolist() == expected
    left_out = sorted(set(range(end)) - set(expected))
    assert sorted(crossing(lengths, context, span).tolist()) == left_out


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    "kernel_sizes", [(2, 2, 2), (8,), (3,), (1,), (3, 2, 2), (1, 4, 2), (2, 5, 3), (2, 4, 1), (2, 2, 2, 2, 2)]
)
@pytest.mark.parametrize("setting", [{}, {"DIRECT": 0}, {"NEARLY_ALL": 0.0}, {"TABULATED": 0}, {"TILE": 16}], ids=str)
def test_logits_are_the_slid_passs(names, vocab, device, monkeypatch, kernel_sizes, setting, gated):
    for name, value in setting.items():
        monkeypatch.setattr(nodes, name, value)
    conv = from_tree(random_tree(kernel_sizes, n_embd=6, n_hidden=16, gated=gated, device=device))
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
    layers, rows, _ = shared.number(packed, lengths)
    padded = ["." * 8 + name for name in names]
    for children, span in zip(layers, (4, 8)):
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
    layers, rows, _ = shared.number(packed, lengths)
    outputs = sum(len(name) + 1 for name in names)
    assert len(layers[-1]) == outputs and torch.equal(rows, torch.arange(outputs))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("room", [nodes.CARRIED, 100_000], ids=["kept", "forgotten"])
def test_chunks_of_a_stream_share_their_nodes(names, vocab, monkeypatch, room, gated):
    """With room for all, no 4-gram and no early window is evaluated for a second chunk; without, values are the same.

    A window is early where its first 4-gram has at most one character; the first chunk has names that start with each.
    Once nearly all others are distinct they are not numbered any more.
    """
    monkeypatch.setattr(nodes, "CARRIED", room)
    names = random.Random(0).sample(names, len(names))
    scorer = Scorer(from_tree(random_tree(n_embd=6, n_hidden=16, gated=gated)), vocab)
    evaluated, of = [], SharedNodes.number

    def counting(*args):
        layers, *rest = of(*args)
        evaluated.append([len(children) for children in layers])
        return layers, *rest

    monkeypatch.setattr(SharedNodes, "number", counting)
    scores = torch.cat(list(scorer.stream(names, chunk=4000)))
    in_chunks = torch.tensor(evaluated).sum(0).tolist()
    assert len(evaluated) == -(-len(names) // 4000) > 4
    expected, early, share = 0, set(), 0.0
    for start in range(0, len(names), 4000):
        padded = ["." * 8 + name for name in names[start : start + 4000]]
        windows = [name[i : i + 8] for name in padded for i in range(len(name) - 7)]
        others = [window for window in windows if window[:3] != "..."]
        early |= set(windows) - set(others)
        others = others if share >= nodes.NEARLY_ALL else set(others)
        share = len(others) / sum(window[:3] != "..." for window in windows)
        expected += len(others)
    evaluated.clear()
    assert torch.equal(scorer.score(names), scores) and torch.equal(scorer.score(names[:4000]), scores[:4000])
    kept = room == nodes.CARRIED == 2**26
    assert (in_chunks[0] == evaluated[0][0]) == (in_chunks[1] == expected + len(early)) == kept


def test_windows_may_be_forgotten_alone(names, vocab, monkeypatch):
    scorer, carried, names = Scorer(from_tree(random_tree(n_embd=6, n_hidden=16)), vocab), Carried(), names[:5000]
    packed, lengths, _ = vocab.pack(names, context=8)
    values = scorer.nodes.log_probs(packed, lengths, carried)
    before, after = (carried.nodes.count, carried.windows.count), (carried.nodes.count, 0)
    with monkeypatch.context() as patch:
        patch.setattr(nodes, "CARRIED", carried.contributions[:, : before[0]].numel())
        carried.trim()
        assert (carried.nodes.count, carried.windows.count) == before
        carried.log_probs = carried.log_probs.repeat(1, 10)  # as of a larger vocabulary
        carried.trim()
        assert (carried.nodes.count, carried.windows.count) == after != before
    carried.log_probs = None
    assert torch.equal(scorer.nodes.log_probs(packed, lengths, carried), values)
    scores = scorer.score(names)
    monkeypatch.setattr(Carried, "trim", lambda carried: setattr(carried, "windows", Numbers()))
    assert torch.equal(torch.cat(list(scorer.stream(names, chunk=700))), scores)


def test_other_names_between_two_calls(vocab):
    """Nearly every node of the second is distinct and none is numbered; the third goes on where the first ended."""
    conv, order = from_tree(random_tree((4, 4), n_embd=6, n_hidden=16)), random.Random(0)
    scorer, fresh = Scorer(conv, vocab, remember=True), Scorer(conv, vocab)
    like = ["".join(order.choices("abc", k=order.randint(4, 9))) for _ in range(1500)]
    unlike = ["".join(order.choices(vocab.characters, k=90)) for _ in range(40)]
    for names in (like, unlike, like[::-1], unlike):
        assert torch.equal(scorer.score(names), fresh.score(names))


@pytest.mark.parametrize("kernel_sizes", [(2, 2, 2, 2), (3, 2, 2), (2, 5, 3), (1, 4, 2), (3,), (2, 4, 1)])
def test_chunks_give_the_scores_of_one_call(names, vocab, kernel_sizes):
    scorer = Scorer(from_tree(random_tree(kernel_sizes, n_embd=6, n_hidden=16)), vocab)
    assert torch.equal(torch.cat(list(scorer.stream(names[::2], chunk=3000))), scorer.score(names[::2]))


def test_the_fast_tanh_is_tanh():
    x = torch.cat([torch.linspace(-20, 20, 40_001), torch.tensor([0.0, -0.0, 1e-8, 1e-30, torch.inf, -torch.inf])])
    assert (nodes.tanh_(x.clone()) - x.double().tanh()).abs().max() < 2e-6  # 1.8e-7 on the processors tried
    assert nodes.tanh_(torch.tensor([torch.nan])).isnan().all()
    assert torch.equal(nodes.tanh_(x.double()), x.double().tanh())


@pytest.mark.parametrize("threads", range(1, 9))
def test_the_bits_of_tanh_do_not_depend_on_the_place(threads):
    """Also where PyTorch's threads get parts that are no whole vectors: 3 of 131,072 elements, 4 of 81,920."""
    generator, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for channels in (1, 6, 80, 100, 128):
            for x in torch.randn(40, generator=generator).tolist():
                values = nodes.tanh_(torch.full((nodes.TILE, channels), x))
                assert (values == values[0, 0]).all()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("gated", [False, True], ids=["tanh", "gated"])
@pytest.mark.parametrize("kernel_sizes", [(2, 2, 2), (8,), (3, 2), (1, 4, 1, 2), (1,), (2,) * 7], ids=str)
def test_windows_shared_and_each_alone(device, kernel_sizes, gated):
    tree = random_tree(kernel_sizes, n_embd=6, n_hidden=20, gated=gated, device=device)
    shared = SharedNodes(from_tree(tree))
    windows = torch.randint(0, 27, (40, shared.context), generator=torch.Generator().manual_seed(0)).to(device)
    windows[20:] = windows[:20]
    with torch.no_grad():
        expected = tree(windows)
    for found in (shared.window_logits(windows), shared.tree_logits(windows), shared.tree_logits(windows.int())):
        assert (found - expected).abs().max() < 1e-12
    assert (shared.tree_logits(windows[:1]) - expected[:1]).abs().max() < 1e-12
    assert shared.tree_logits(windows[:0]).shape == (0, 27)
