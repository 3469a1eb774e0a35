"""The promise of the project: the tree and the slid model give the same logits at every position."""

import random

import hypothesis.strategies as st
import pytest
import torch
from conftest import needs_cuda, parts_of, random_tree
from hypothesis import given, settings

import reference
from wavenet_conv import Vocabulary, exact_float32, fold_batch_norm, from_tree, precision, verify

WIDE = dict(kernel_sizes=(2, 2, 2), n_embd=24, n_hidden=128)
GATED = dict(kernel_sizes=(2, 2, 2), n_embd=24, n_hidden=32, gated=True)


@pytest.mark.parametrize(("sizes", "every"), [(WIDE, 1), (GATED, 4)], ids=["wide", "gated"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_position_of_every_name(names, vocab, device, dtype, sizes, every):
    names = names[::every]
    tree = random_tree(**sizes, dtype=dtype, device=device)
    conv = from_tree(tree)
    for slid, compared in ((conv, names), (fold_batch_norm(conv), names[::10])):
        report = verify(tree, slid, compared, vocab)
        # 1e-12 and 1e-5: a sum of 256 products rounds to about 1e-14 and 1e-6 of its size.
        assert report.equal, report
        assert report.max_abs_diff < {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
        assert report.argmax_differences == 0
        assert report.positions == sum(len(name) + 1 for name in compared)


@pytest.mark.parametrize(("sizes", "every"), [(WIDE, 20), (GATED, 100)], ids=["wide", "gated"])
def test_the_loop_on_some_names(names, vocab, device, sizes, every):
    tree = random_tree(**sizes, device=device)
    conv = from_tree(tree)
    with torch.no_grad():
        for name in names[::every]:
            tokens = vocab.encode([name], context=8)[0].to(device)
            looped = reference.loop_logits(tree, tokens)
            assert looped.shape == (1, len(name) + 1, len(vocab))
            assert (looped - conv(tokens)).abs().max() < 1e-12
            assert (looped - reference.window_logits(tree, tokens)).abs().max() < 1e-12


def test_the_lectures_list(lecture_list):
    assert len(lecture_list) == 32_033 and max(map(len, lecture_list)) == 15
    vocab = Vocabulary.from_names(lecture_list)
    assert len(vocab) == 27
    tree = random_tree(**WIDE)
    report = verify(tree, from_tree(tree), lecture_list, vocab)
    assert report.equal, report
    assert report.positions == 228_146


def test_the_lectures_splits(lecture_list):
    shuffled = lecture_list.copy()
    random.seed(42)
    random.shuffle(shuffled)
    n1, n2 = int(0.8 * len(shuffled)), int(0.9 * len(shuffled))
    splits = shuffled[:n1], shuffled[n1:n2], shuffled[n2:]
    assert [sum(len(name) + 1 for name in split) for split in splits] == [182_625, 22_655, 22_866]


def to_exact(tree, seed=0):
    """Small integers for weights, powers of two for scales: every sum is exact in float64, in whatever order."""
    generator = torch.Generator().manual_seed(seed)

    def integers(like, low=-2, high=3):
        return torch.randint(low, high, like.shape, generator=generator).to(like.dtype)

    for layer in parts_of(tree):
        if isinstance(layer, reference.BatchNorm1d):
            layer.eps = 0.0
            layer.gamma = 2.0 ** integers(layer.gamma)
            layer.running_var = 4.0 ** integers(layer.gamma, -1, 2)
            layer.beta, layer.running_mean = integers(layer.beta), integers(layer.running_mean)
        elif hasattr(layer, "weight"):
            layer.weight = integers(layer.weight)
            if getattr(layer, "bias", None) is not None:
                layer.bias = integers(layer.bias)
    return tree


@pytest.fixture
def clamp_for_tanh(monkeypatch):
    """An exact nonlinearity: tanh rounds, a clamp does not. sigmoid(x) is (1 + tanh(x / 2)) / 2 of whichever."""
    monkeypatch.setattr(torch, "sigmoid", lambda x: (1 + torch.tanh(x / 2)) / 2)
    monkeypatch.setattr(torch, "tanh", lambda x: x.clamp(-1, 1))
    monkeypatch.setattr(torch, "tanh_", lambda x: x.clamp_(-1, 1))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kernel_sizes", [(2, 2, 2), (8,), (3,), (3, 2), (1, 4, 1, 2)])
def test_to_the_bit_where_arithmetic_is_exact(names, vocab, device, clamp_for_tanh, kernel_sizes, gated):
    tree = to_exact(random_tree(kernel_sizes, n_embd=6, n_hidden=16, gated=gated)).to(device)
    conv = from_tree(tree)
    folded = fold_batch_norm(conv)
    context = conv.context
    tokens, lengths = (t.to(device) for t in vocab.encode(names[::10], context=context))
    inside = torch.arange(tokens.shape[1] - context + 1, device=device) <= lengths[:, None]
    with torch.no_grad():
        expected = reference.window_logits(tree, tokens)
        assert expected[inside].unique().numel() > 100  # the network says something
        # Few enough bits that no sum rounds: each gated layer squares the finest step, and there are up to four.
        assert torch.equal(expected * 2**30, (expected * 2**30).round()) and expected.abs().max() < 2**15
        for logits in (conv(tokens), conv.forward_conv1d(tokens), folded(tokens)):
            assert torch.equal(logits[inside], expected[inside])
        looped = reference.loop_logits(tree, tokens[:20])
        assert torch.equal(looped, expected[:20])


@pytest.mark.parametrize("gated", [False, True], ids=["tanh", "gated"])
@pytest.mark.parametrize("kernel_sizes", [(2, 2, 2), (8,), (3, 2), (2, 3, 2), (1, 4, 1, 2), (2,) * 7], ids=str)
def test_a_window_alone_is_its_tree(device, clamp_for_tanh, kernel_sizes, gated):
    """Without the nodes between, which a pass over more than a window slides over: to the bit."""
    tree = to_exact(random_tree(kernel_sizes, n_embd=6, n_hidden=16, gated=gated)).to(device)
    conv = from_tree(tree)
    tokens = torch.randint(0, 27, (5, conv.context), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        expected = tree(tokens)
        for model in (conv, fold_batch_norm(conv)):
            assert torch.equal(model(tokens)[:, 0], expected)
        assert torch.equal(conv.forward_conv1d(tokens)[:, 0], expected)


@st.composite
def problems(draw):
    """Any kernel sizes, widths, vocabulary, batch norm or none or gates, and ragged names in any order."""
    kernel_sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    widths = draw(st.lists(st.integers(1, 9), min_size=len(kernel_sizes), max_size=len(kernel_sizes)))
    alphabet = draw(st.sampled_from(["a", "ab", "abcdefghijklmnopqrstuvwxyz", "-é 😀ß"]))
    context = torch.tensor(kernel_sizes).prod().item()
    longest = 3 * context if context <= 60 else context + 9  # several contexts long, up to what is quick
    lengths = st.integers(0, longest) | st.sampled_from([0, 1, longest])
    name = lengths.flatmap(lambda n: st.text(alphabet, min_size=n, max_size=n))
    return (
        dict(
            kernel_sizes=kernel_sizes,
            n_hidden=widths,
            n_embd=draw(st.integers(1, 7)),
            vocab_size=len(set(alphabet)) + 1,
            **draw(st.sampled_from([{"batch_norm": True}, {"batch_norm": False}, {"gated": True}])),
            seed=draw(st.integers(0, 999)),
        ),
        draw(st.lists(name, min_size=1, max_size=6)),
        Vocabulary(alphabet),
    )


@settings(max_examples=150)
@given(problems())
def test_any_tree_any_names(problem):
    sizes, names, vocab = problem
    tree = random_tree(**sizes)
    conv = from_tree(tree)
    for slid in (conv, fold_batch_norm(conv)):
        report = verify(tree, slid, names, vocab)
        assert report.equal, report
        assert report.positions == sum(len(name) + 1 for name in names)
    tokens, lengths = vocab.encode(names, context=conv.context)
    with torch.no_grad():
        together, defined = conv(tokens), conv.forward_conv1d(tokens)
        assert together.shape == (len(names), int(lengths.max()) + 1, len(vocab))
        assert (together - defined).abs().max() < 1e-12
        for row, name in enumerate(names):  # a ragged batch, in the order given, is its names one by one
            alone = conv(vocab.encode([name], context=conv.context)[0])[0]
            assert (together[row, : len(name) + 1] - alone).abs().max() < 1e-12


@pytest.mark.parametrize("name", reference.NETWORKS)
def test_every_network_of_the_lecture(names, vocab, device, name):
    torch.manual_seed(1)
    tree = reference.lecture_network(name).eval().to(device=device, dtype=torch.float64)
    assert verify(tree, from_tree(tree), names[::100], vocab).equal


@pytest.mark.parametrize("gated", [False, True])
def test_a_name_of_100_000_characters(vocab, device, gated):
    tree = random_tree(n_embd=8, n_hidden=16, gated=gated, device=device)
    long_name = "".join(random.Random(0).choices(vocab.characters, k=100_000))
    report = verify(tree, from_tree(tree), [long_name], vocab)
    assert report.equal and report.positions == 100_001


@pytest.fixture
def restored_precision():
    with exact_float32():  # puts back, at its end, whatever the test has switched
        yield


@needs_cuda
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0),
    reason="needs a GPU with TF32: compute capability 8.0 or later",
)
def test_tf32_differs_and_exact_float32_agrees(names, vocab, restored_precision):
    tree = random_tree(**WIDE, dtype=torch.float32, device="cuda")
    conv = from_tree(tree)
    tokens = vocab.encode(names[:2000], context=8)[0].cuda()
    with torch.no_grad():
        with exact_float32():
            expected = reference.window_logits(tree, tokens)
            assert (conv(tokens) - expected).abs().max() < 1e-5
            assert (conv.forward_conv1d(tokens) - expected).abs().max() < 1e-5
        for _, write, exact in precision._switches():
            write({"ieee": "tf32", "highest": "high", False: True}[exact])
        assert (conv.forward_conv1d(tokens) - expected).abs().max() > 1e-5
