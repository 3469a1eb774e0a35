"""A stream that is fed a name gives the tree's logits at every position of it."""

import copy
import io
import pickle
import random

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import loops, needs_numba, random_tree
from hypothesis import given, settings
from helpers import to_exact

import reference
from wavenet_conv import ConvWaveNet, Stream, Vocabulary, WaveNetConfig, WaveNetConvError, from_tree, streaming
from wavenet_conv.streaming import FEW_ROWS

WIDE = dict(kernel_sizes=(2, 2, 2), n_embd=24, n_hidden=128)
GATED = dict(kernel_sizes=(2, 2, 2), n_embd=24, n_hidden=32, gated=True)
SHAPES = [
    *[
        dict(kernel_sizes=kernel_sizes, n_embd=6, n_hidden=16)
        for kernel_sizes in ((8,), (3, 2), (1, 4, 1, 2), (2, 2, 2, 2, 2))
    ],
    dict(kernel_sizes=(2, 3), n_embd=5, n_hidden=(7, 9)),
    dict(kernel_sizes=(1,), n_embd=4, n_hidden=3),
]
SHAPES += [shape | {"gated": True} for shape in SHAPES]
SHAPES += [dict(kernel_sizes=kernel_sizes, n_embd=50, n_hidden=3, gated=True) for kernel_sizes in ((4,), (2, 2, 2))]
DEEP = dict(kernel_sizes=(2,) * 6, n_embd=6, n_hidden=(16, 9, 20, 16, 16, 16))
ABC = Vocabulary("abcdefghijklmnopqrstuvwxyz")
# Rows, and whether compiled loops read them.
WAYS = [pytest.param(1, True, marks=needs_numba), pytest.param(3, True, marks=needs_numba), (3, False), (20, False)]


def streamed(stream, tokens):
    """Logits after `tokens`, `(batch, time)`, read step by step: `(batch, time, vocab)`."""
    return torch.stack([stream.step(token) for token in tokens.t().contiguous()], 1)


def check(tree, names, vocab, tolerance, batch, compiled=None):
    stream = Stream(from_tree(tree), batch, compiled=compiled)
    for start in range(0, len(names), batch):
        start = min(start, len(names) - batch)
        tokens, lengths = vocab.encode(names[start : start + batch], context=stream.context)
        tokens = tokens.to(stream.device)
        stream.reset()
        got = streamed(stream, tokens[:, stream.context - 1 :])
        with torch.no_grad():
            expected = reference.window_logits(tree, tokens)
        inside = torch.arange(got.shape[1]) <= lengths[:, None]
        assert got.dtype == expected.dtype
        assert (got - expected)[inside.to(got.device)].abs().max() < tolerance


@pytest.mark.parametrize("sizes", [WIDE, GATED], ids=["wide", "gated"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_every_position_of_every_name(names, vocab, device, sizes, dtype, tolerance):
    names = sorted(names[:: 1 if dtype == torch.float64 and sizes is WIDE else 8], key=len)
    check(random_tree(**sizes, dtype=dtype, device=device), names, vocab, tolerance, batch=128)


def test_the_lectures_list(lecture_list):
    vocab = Vocabulary.from_names(lecture_list)
    check(random_tree(**WIDE), sorted(lecture_list, key=len), vocab, 1e-12, batch=128)


@pytest.mark.parametrize("sizes", [WIDE, GATED, DEEP, DEEP | {"gated": True}, *SHAPES], ids=str)
@pytest.mark.parametrize(("batch", "compiled"), WAYS)
def test_any_shape_of_model_and_batch(names, vocab, sizes, batch, compiled):
    check(random_tree(**sizes), names[:: 600 if batch > 1 else 1500], vocab, 1e-12, batch, compiled)


@needs_numba
@pytest.mark.parametrize("sizes", [WIDE, GATED, DEEP], ids=["wide", "gated", "deep"])
def test_compiled_loops_in_float32(names, vocab, sizes):
    check(random_tree(**sizes, dtype=torch.float32), names[::100], vocab, 1e-5, 1, True)


@pytest.mark.parametrize("sizes", [DEEP, *SHAPES], ids=str)
@pytest.mark.parametrize(("batch", "compiled"), WAYS[1:])
def test_to_the_bit_where_arithmetic_is_exact(names, vocab, clamp_for_tanh, monkeypatch, sizes, batch, compiled):  # noqa: F811
    if compiled:  # the loop over the layers as Python runs it, which takes the tanh that it finds
        monkeypatch.setattr(loops, "tanh", lambda x: np.clip(x, -1, 1, out=x))
        monkeypatch.setattr(loops, "read", loops.read.py_func)
        monkeypatch.setattr(loops, "step", loops.step.py_func)
    tree = to_exact(random_tree(**sizes))
    stream = Stream(from_tree(tree), batch, compiled=compiled)
    tokens, lengths = vocab.encode(names[:: len(names) // batch][:batch], context=stream.context)
    with torch.no_grad():
        expected = reference.window_logits(tree, tokens)
    assert torch.equal(streamed(stream, tokens[:, stream.context - 1 :]), expected)


@needs_numba
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 3e-6), (np.float64, 1e-14)])
def test_the_loops_own_tanh(dtype, tolerance):
    x = np.concatenate([sign * np.logspace(-30, 2, 100_000) for sign in (1, -1)]).astype(dtype)
    x = np.concatenate([x, np.linspace(-25, 25, 100_000, dtype=dtype), [0, np.inf, -np.inf]]).astype(dtype)
    expected, y = np.tanh(x.astype(np.float64)), x.copy()
    loops.tanh(y)
    assert np.abs(y - expected).max() < tolerance
    assert (np.abs(y - expected) <= 2 * tolerance * np.abs(expected)).all()
    y = np.array([np.nan, 1], dtype=dtype)
    loops.tanh(y)
    assert np.isnan(y[0]) and not np.isnan(y[1])


@settings(max_examples=40)
@given(st.data())
def test_rows_that_are_started_anew(data):
    """Any rows, at any step, again and again: the others do not notice."""
    sizes = data.draw(st.sampled_from([GATED, DEEP, *SHAPES]))
    batch = data.draw(st.sampled_from([1, 2, FEW_ROWS + 1]))
    tree = random_tree(**sizes, vocab_size=5)
    stream = Stream(from_tree(tree), batch)
    read = [[0] * stream.context for _ in range(batch)]
    for _ in range(20):
        tokens = data.draw(st.lists(st.integers(0, 4), min_size=batch, max_size=batch))
        logits = stream.step(torch.tensor(tokens))
        for row, token in zip(read, tokens):
            row.append(token)
        with torch.no_grad():
            expected = tree(torch.tensor([row[-stream.context :] for row in read]))
        assert (logits - expected).abs().max() < 1e-12
        rows = data.draw(st.lists(st.integers(0, batch - 1), max_size=batch))
        mask = torch.tensor([row in rows for row in range(batch)])
        stream.reset(data.draw(st.sampled_from([rows, torch.tensor(rows, dtype=torch.int64), mask])))
        for row in rows:
            read[row] = [0] * stream.context


@pytest.mark.parametrize("sizes", [WIDE, GATED, *SHAPES], ids=str)
def test_prefixes_of_any_lengths(sizes, device):
    prefixes = ["an", "", "maximiliano-the-second".replace("-", ""), "z", "emma"]
    tree = random_tree(**sizes, device=device)
    stream = Stream(from_tree(tree), len(prefixes))
    stream.step(torch.arange(5, device=device))  # is forgotten
    got = stream.push(*ABC.encode(prefixes, context=stream.context))
    assert (got - stream.push(*ABC.encode(prefixes, context=1))).abs().max() < 1e-12
    with torch.no_grad():
        for prefix, logits in zip(prefixes, got):
            tokens = ABC.encode([prefix], context=stream.context)[0].to(device)
            assert (logits - reference.window_logits(tree, tokens)[0, -1]).abs().max() < 1e-12
        following = torch.tensor([1, 2, 3, 4, 5], device=device)
        got = stream.step(following)
        for prefix, token, logits in zip(prefixes, following.tolist(), got):
            tokens = ABC.encode([prefix + ABC.characters[token - 1]], context=stream.context)[0].to(device)
            assert (logits - reference.window_logits(tree, tokens)[0, -1]).abs().max() < 1e-12


@pytest.mark.parametrize(("batch", "compiled"), WAYS[1:])
@pytest.mark.parametrize("sizes", [WIDE, GATED, DEEP], ids=["wide", "gated", "deep"])
def test_a_state_is_saved_and_taken_up(batch, compiled, sizes, device):
    conv = from_tree(random_tree(**sizes, dtype=torch.float32))
    stream = Stream(conv, batch, compiled=compiled)
    tokens = torch.randint(0, 27, (batch, 30), generator=torch.Generator().manual_seed(0))
    streamed(stream, tokens[:, :11])
    stream.reset([1])
    streamed(stream, tokens[:, :5])
    file = io.BytesIO()
    torch.save(stream.state(), file)
    expected = streamed(stream, tokens[:, 5:])
    file.seek(0)
    state = torch.load(file, weights_only=True)
    for again in (stream, Stream(conv, batch, compiled=compiled), Stream(conv, batch, compiled=False)):
        again.load_state(state)
        assert (streamed(again, tokens[:, 5:]) - expected).abs().max() < 1e-5
    moved = Stream(conv, batch, device=device)
    moved.load_state(state)
    assert (streamed(moved, tokens[:, 5:].to(device)).cpu() - expected).abs().max() < 1e-5
    moved.load_state(state)
    moved.reset([0])  # as old as it was
    stream.load_state(state)
    stream.reset([0])
    assert (streamed(moved, tokens[:, 5:].to(device)).cpu() - streamed(stream, tokens[:, 5:])).abs().max() < 1e-5


def test_states_that_do_not_fit():
    conv = from_tree(random_tree(n_embd=6, n_hidden=16, dtype=torch.float32))
    stream = Stream(conv, 3)
    stream.step(torch.tensor([1, 2, 3]))
    state = stream.state()
    other = from_tree(random_tree(n_embd=6, n_hidden=16, dtype=torch.float32, seed=1))
    for stranger, message in (
        (Stream(other, 3).state(), "of another model or dtype"),
        (Stream(conv, 3, dtype=torch.float64).state(), "of another model or dtype"),
        (Stream(conv, 4).state(), "of 4 rows"),
        ({}, "of another model"),
        ({key: state[key] for key in state if key != "keys"}, "of another model"),
        (state | {"keys": state["keys"] + 10**6}, "are out of range; the state is damaged"),
        (state | {"layer 0": state["layer 0"] - 1}, "are out of range"),
        (state | {"clocks": state["clocks"] - 2}, "are out of range"),
        (state | {"clocks": torch.tensor(3)}, "'clocks' of this state is .* the state is damaged"),
        (state | {"keys": state["keys"][:2]}, "'keys' of this state is .* the state is damaged"),
        (state | {"layer 1": state["layer 1"].double()}, "'layer 1' of this state is torch.float64"),
        ([state], "a state is a dict of tensors"),
    ):
        with pytest.raises(WaveNetConvError, match=message):
            stream.load_state(stranger)
    assert all(torch.equal(part, state[key]) for key, part in stream.state().items())


def test_the_model_is_copied_and_its_mode_does_not_matter():
    conv = from_tree(random_tree(n_embd=6, n_hidden=16)).train()
    tokens = torch.tensor([[0, 5, 13, 13, 1]])
    stream = Stream(conv)
    expected = streamed(Stream(conv), tokens)
    conv.head.bias.data += 1
    assert conv.training and torch.equal(streamed(stream, tokens), expected) and not expected.requires_grad
    first = stream.step(torch.tensor([3]))
    kept = first.clone()
    stream.step(torch.tensor([4]))
    assert torch.equal(first, kept)  # what was returned is not overwritten
    assert "_kept" in vars(conv) and not [name for name, _ in conv.named_buffers() if "running" not in name]


@pytest.mark.parametrize("spoil", ["swap the taps", "one step off", "no bias", "the older one is forgotten"])
@pytest.mark.parametrize(("batch", "compiled"), WAYS)
def test_a_stream_that_is_wrong_is_seen(names, vocab, monkeypatch, spoil, batch, compiled):
    class Wrong(streaming._Layer):
        def __init__(self, taps, bias, dilation, batch):
            if dilation == 4:
                taps = taps.flip(0) if spoil == "swap the taps" else taps
                bias = bias * 0 if spoil == "no bias" else bias
                dilation = {"one step off": 3, "the older one is forgotten": 0}.get(spoil, dilation)
            super().__init__(taps, bias, dilation, batch)

    names = sorted(names, key=len)[-batch:]
    check(random_tree(**WIDE), names, vocab, 1e-3, batch, compiled)
    monkeypatch.setattr(streaming, "_Layer", Wrong)
    with pytest.raises(AssertionError):
        check(random_tree(**WIDE), names, vocab, 1e-3, batch, compiled)


@needs_numba
def test_what_older_children_contribute_ahead_of_time_is_forgotten_with_them(monkeypatch):
    """The teeth of the tests above: without this, a row begun anew would read what another name's nodes contribute."""
    stream = Stream(from_tree(random_tree(**DEEP)), compiled=True)
    tokens = torch.tensor([[1, 2, 3]])
    expected = streamed(stream, tokens)
    stream.reset()
    assert torch.equal(streamed(stream, tokens), expected)
    streamed(stream, tokens.repeat(1, 12))
    stream.reset()
    assert torch.equal(streamed(stream, tokens), expected)
    streamed(stream, tokens.repeat(1, 12))
    phase = stream.arrays.phases.copy()
    stream.reset()
    stream.arrays.phases[:] = phase
    assert phase and not torch.equal(streamed(stream, tokens), expected)


def test_compiled_steps_that_cannot_be():
    conv = from_tree(random_tree(n_embd=6, n_hidden=16))
    with pytest.raises(WaveNetConvError, match="for up to 8 rows on the CPU.* pip install 'wavenet-conv.fast.'"):
        Stream(conv, FEW_ROWS + 1, compiled=True)
    with pytest.raises(WaveNetConvError, match="in float32 or float64"):
        Stream(conv.to(torch.bfloat16), compiled=True)
    with pytest.raises(WaveNetConvError, match="compiled is 'x'; it must be"):
        Stream(conv, compiled="x")


def test_what_cannot_be_read():
    conv = from_tree(random_tree(n_embd=6, n_hidden=16))
    for batch in (1, FEW_ROWS + 1):
        stream = Stream(conv, batch)
        before = stream.state()
        good = torch.zeros(batch, dtype=torch.int64)
        for tokens, message in (
            (good[:-1], "step takes tokens int64"),
            (good[None], "step takes tokens int64"),
            (good.float(), "step takes tokens int64 .* not torch.float32"),
            ([0] * batch, "step takes tokens int64"),
        ):
            with pytest.raises(WaveNetConvError, match=message):
                stream.step(tokens)
        for token in (27, -1, 10**6):
            with pytest.raises(IndexError, match=rf"token {token} at \[{batch - 1}\] is outside the vocabulary of 27"):
                stream.step(good.index_fill(0, torch.tensor([batch - 1]), token))
        with pytest.raises(WaveNetConvError, match=f"row {batch} is not among the {batch} rows"):
            stream.reset([batch])
        tokens, lengths = ABC.encode(["emma"] * batch, context=8)
        with pytest.raises(WaveNetConvError, match="are not those of"):
            stream.push(tokens[1:], lengths)
        for wrong in (tokens[:, 8:], torch.cat([tokens, tokens.clamp(max=0)], 1)):
            with pytest.raises(WaveNetConvError, match="do not hold"):
                stream.push(wrong, lengths)
        with pytest.raises(WaveNetConvError, match="are not those of"):
            stream.push(["emma"], lengths)
        for rows in (torch.zeros(batch), 0, torch.zeros(batch + 1, dtype=torch.bool), [[0]], "ab", 2**70):
            with pytest.raises(WaveNetConvError, match="rows is .* give a list of rows"):
                stream.reset(rows)
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(WaveNetConvError, match="not copied or pickled; make another"):
                copied(stream)
        with pytest.raises(IndexError, match="token 30"):
            stream.push(torch.where(tokens > 0, 30, 0), lengths)
        assert all(torch.equal(part, before[key]) for key, part in stream.state().items())
    for batch in (0, -1, 1.5, None):
        with pytest.raises(WaveNetConvError, match="batch is"):
            Stream(conv, batch)


@pytest.mark.parametrize(("batch", "compiled"), WAYS[1:])
def test_made_in_inference_mode_or_under_another_default_device(batch, compiled):
    conv, tokens = from_tree(random_tree(n_embd=6, n_hidden=16)), torch.ones(batch, 2, dtype=torch.int64)
    expected = streamed(Stream(conv, batch, compiled=compiled), tokens)
    with torch.inference_mode():
        stream = Stream(conv, batch, compiled=compiled)
        assert torch.equal(streamed(stream, tokens), expected)
    stream.reset()
    assert torch.equal(streamed(stream, tokens), expected)
    with torch.device("meta"):
        stream = Stream(conv, batch, compiled=compiled)
    assert torch.equal(streamed(stream, tokens), expected)


def test_other_precisions(names, vocab):
    """Half precision runs too, as exact as it is."""
    for dtype, tolerance in ((torch.bfloat16, 0.5), (torch.float16, 0.05)):
        check(random_tree(n_embd=6, n_hidden=16, dtype=dtype), names[:2], vocab, tolerance, 1)


def test_a_model_without_any_bias_and_a_large_vocabulary():
    for config in (
        WaveNetConfig(n_embd=6, n_hidden=20, batch_norm=False, bias=False),
        WaveNetConfig(vocab_size=301, n_embd=6, n_hidden=20),
    ):
        conv = ConvWaveNet(config, dtype=torch.float64).eval()
        random.seed(0)
        tokens = torch.tensor([[0] * 8 + random.choices(range(config.vocab_size), k=20)])
        with torch.no_grad():
            assert (streamed(Stream(conv), tokens[:, 7:]) - conv(tokens)).abs().max() < 1e-12
