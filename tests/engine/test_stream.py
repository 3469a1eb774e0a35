"""A stream that reads a name gives the tree's logits at every position, in every row and by both backends."""

import copy
import io
import pickle
import sys

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from engine.cases import ABC, BACKENDS, DEEP, GATED, SHAPES, WIDE, random_conv, rejects, streamed
from helpers import random_tree, to_exact
from hypothesis import given, settings

import reference
from wavenet_conv import Stream, WaveNetConvError, from_tree
from wavenet_conv.engine.stream import FEW_ROWS

backends = pytest.mark.parametrize("batch_size, compiled", BACKENDS)
models = pytest.mark.parametrize("sizes", [WIDE, GATED, DEEP], ids=["wide", "gated", "deep"])


def assert_gives_the_trees_logits(tree, names, tolerance, batch_size, compiled=None):
    stream = Stream(from_tree(tree), batch_size, compiled=compiled)
    for start in range(0, len(names), batch_size):
        start = min(start, len(names) - batch_size)
        tokens, lengths = ABC.encode(names[start : start + batch_size], context=stream.context)
        tokens = tokens.to(stream.device)
        stream.reset()
        logits = streamed(stream, tokens[:, stream.context - 1 :])
        with torch.no_grad():
            expected = reference.window_logits(tree, tokens)
        inside = torch.arange(logits.shape[1]) <= lengths[:, None]
        assert logits.dtype == expected.dtype
        assert (logits - expected)[inside.to(stream.device)].abs().max() < tolerance


@pytest.mark.parametrize("sizes", [WIDE, GATED], ids=["wide", "gated"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_logits_of_many_names_are_the_trees(names, device, sizes, dtype, tolerance):
    names = sorted(names[::50], key=len)
    assert_gives_the_trees_logits(random_tree(**sizes, dtype=dtype, device=device), names, tolerance, batch_size=128)


@backends
@pytest.mark.parametrize("sizes", [WIDE, GATED, *SHAPES], ids=str)
def test_logits_of_any_shape_of_model_and_batch_are_the_trees(names, sizes, batch_size, compiled):
    some = names[:: 1200 if batch_size > 1 else 6000]
    assert_gives_the_trees_logits(random_tree(**sizes), some, 1e-12, batch_size, compiled)
    assert_gives_the_trees_logits(random_tree(**sizes, dtype=torch.float32), some[-20:], 1e-5, batch_size, compiled)


@backends
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_logits_are_the_trees_to_the_bit_where_arithmetic_is_exact(
    names, clamp_for_tanh, monkeypatch, sizes, batch_size, compiled
):
    if compiled:  # the loop over the layers as Python runs it, which calls the tanh that it finds
        from wavenet_conv.engine import loops

        monkeypatch.setattr(loops, "tanh", lambda x: np.clip(x, -1, 1, out=x))
        monkeypatch.setattr(loops, "read", loops.read.py_func)
        monkeypatch.setattr(loops, "step", loops.step.py_func)
    tree = to_exact(random_tree(**sizes))
    stream = Stream(from_tree(tree), batch_size, compiled=compiled)
    tokens, _ = ABC.encode(names[:: len(names) // batch_size][:batch_size], context=stream.context)
    with torch.no_grad():
        expected = reference.window_logits(tree, tokens)
    assert torch.equal(streamed(stream, tokens[:, stream.context - 1 :]), expected)


@backends
@pytest.mark.parametrize("kernel_sizes", [(3, 2), (4,) * 5], ids=str)
def test_logits_far_behind_the_context_are_those_of_the_convolutional_pass(kernel_sizes, batch_size, compiled):
    """Rings are written many times over; a context of 1,024 has dilations up to 256."""
    conv = random_conv(kernel_sizes, n_hidden=6)
    tokens = torch.randint(27, (batch_size, 2 * conv.context + 30), generator=torch.Generator().manual_seed(0))
    tokens[:, : conv.context] = 0
    stream = Stream(conv, batch_size, compiled=compiled)
    logits = streamed(stream, tokens[:, conv.context - 1 :])
    assert (logits - conv(tokens)).abs().max() < 1e-12


@settings(max_examples=25)
@given(st.data())
def test_reset_rows_do_not_change_the_others(data):
    """Any rows, at any step, again and again, by either backend."""
    sizes = data.draw(st.sampled_from([GATED, DEEP, *SHAPES]))
    batch_size = data.draw(st.sampled_from([1, 2, FEW_ROWS + 1]))
    tree = random_tree(**sizes, vocab_size=5)
    stream = Stream(from_tree(tree), batch_size)
    read = [[0] * stream.context for _ in range(batch_size)]
    for _ in range(20):
        tokens = data.draw(st.lists(st.integers(0, 4), min_size=batch_size, max_size=batch_size))
        logits = stream.step(torch.tensor(tokens))
        for row, token in zip(read, tokens):
            row.append(token)
        with torch.no_grad():
            expected = tree(torch.tensor([row[-stream.context :] for row in read]))
        assert (logits - expected).abs().max() < 1e-12
        rows = data.draw(st.lists(st.integers(0, batch_size - 1), max_size=batch_size))
        mask = torch.tensor([row in rows for row in range(batch_size)])
        stream.reset(data.draw(st.sampled_from([rows, torch.tensor(rows, dtype=torch.int64), mask])))
        for row in rows:
            read[row] = [0] * stream.context


@pytest.mark.parametrize("sizes", [WIDE, GATED, *SHAPES], ids=str)
def test_push_gives_the_logits_after_each_prefix(sizes, device):
    prefixes = ["an", "", "maximilianothesecond", "z", "emma"]
    tree = random_tree(**sizes, device=device)
    stream = Stream(from_tree(tree), len(prefixes))
    stream.step(torch.arange(5, device=device))  # push forgets this
    following = torch.tensor([1, 2, 3, 4, 5], device=device)
    for context in (1, stream.context):
        pushed = stream.push(*ABC.encode(prefixes, context=context))
        stepped = stream.step(following)
        for row, prefix in enumerate(prefixes):
            longer = prefix + ABC.characters[row]
            for name, logits in ((prefix, pushed[row]), (longer, stepped[row])):
                tokens, _ = ABC.encode([name], context=stream.context)
                with torch.no_grad():
                    expected = reference.window_logits(tree, tokens.to(device))[0, -1]
                assert (logits - expected).abs().max() < 1e-12


@pytest.mark.parametrize("batch_size, compiled", BACKENDS[1:])
@models
def test_a_state_continues_in_another_stream(batch_size, compiled, sizes, device):
    conv = from_tree(random_tree(**sizes, dtype=torch.float32))
    stream = Stream(conv, batch_size, compiled=compiled)
    tokens = torch.randint(0, 27, (batch_size, 30), generator=torch.Generator().manual_seed(0))
    streamed(stream, tokens[:, :11])
    stream.reset([1])
    streamed(stream, tokens[:, :5])
    file = io.BytesIO()
    torch.save(stream.state(), file)
    expected = streamed(stream, tokens[:, 5:])
    file.seek(0)
    state = torch.load(file, weights_only=True)
    moved = Stream(conv, batch_size, device=device)
    for other in (stream, Stream(conv, batch_size, compiled=compiled), Stream(conv, batch_size, compiled=False), moved):
        other.load_state(state)
        assert (streamed(other, tokens[:, 5:].to(other.device)).cpu() - expected).abs().max() < 1e-5
    for other in (stream, moved):  # a row that is reset after loading is as old as it was
        other.load_state(state)
        other.reset([0])
    logits = streamed(moved, tokens[:, 5:].to(device)).cpu()
    assert (logits - streamed(stream, tokens[:, 5:])).abs().max() < 1e-5


def test_states_that_do_not_fit_are_rejected():
    conv, other = (random_conv(dtype=torch.float32, seed=seed) for seed in (0, 1))
    stream = Stream(conv, 3)
    stream.step(torch.tensor([1, 2, 3]))
    state = stream.state()
    for stranger, message in (
        (Stream(other, 3).state(), "of another model or dtype"),
        (Stream(conv, 3, dtype=torch.float64).state(), "of another model or dtype"),
        (Stream(conv, 4).state(), "of 4 rows"),
        ({}, "of another model"),
        ({key: state[key] for key in state if key != "keys"}, "'keys' of this state is missing"),
        (state | {"keys": state["keys"] + 10**6}, "out of range; it is damaged"),
        (state | {"layer 0": state["layer 0"] - 1}, "out of range"),
        (state | {"clock": state["clock"] - 2}, "out of range"),
        (state | {"ages": state["ages"] - 2}, "out of range"),
        (state | {"clock": torch.tensor(3)}, "'clock' of this state .* is damaged"),
        (state | {"keys": state["keys"][:2]}, "'keys' of this state .* is damaged"),
        (state | {"layer 1": state["layer 1"].double()}, "'layer 1' of this state .* is damaged"),
        ([state], "a state is a dict of tensors"),
    ):
        assert rejects(message, stream.load_state, stranger)
    assert all(torch.equal(part, state[key]) for key, part in stream.state().items())


def test_the_next_step_does_not_overwrite_what_was_returned():
    for batch_size in (1, 20):
        stream, token = Stream(random_conv(), batch_size), torch.zeros(batch_size, dtype=torch.int64)
        first = stream.step(token)
        copied = first.clone()
        stream.step(token + 1)
        assert torch.equal(first, copied) and not first.requires_grad


@pytest.mark.parametrize(
    "change",
    [
        lambda ring: setattr(ring, "backs", ring.backs[::-1]),
        lambda ring: setattr(ring, "backs", [min(back, 3) for back in ring.backs]),
        lambda ring: setattr(ring, "padding", ring.padding * 0),
    ],
    ids=["taps are swapped", "a step too short", "padding is zero"],
)
def test_a_wrong_ring_is_seen(names, change):
    tree = random_tree(**WIDE)
    stream, (tokens, _) = Stream(from_tree(tree), 3, compiled=False), ABC.encode(["emma"] * 3, context=8)
    with torch.no_grad():
        expected = reference.window_logits(tree, tokens)
    assert (streamed(stream, tokens[:, 7:]) - expected).abs().max() < 1e-12
    stream.reset()
    change(stream.backend.rings[-1])
    assert (streamed(stream, tokens[:, 7:]) - expected).abs().max() > 1e-3


def test_compiled_steps_that_cannot_run_are_rejected(monkeypatch):
    conv = random_conv()
    with pytest.raises(WaveNetConvError, match=r"for up to 8 rows on the CPU.* pip install 'wavenet-conv.fast.'"):
        Stream(conv, FEW_ROWS + 1, compiled=True)
    assert rejects("in float32 or float64", Stream, random_conv(dtype=torch.bfloat16), compiled=True)
    assert rejects("compiled is 'x'; it must be", Stream, conv, compiled="x")
    monkeypatch.delattr("wavenet_conv.engine.loops", raising=False)
    monkeypatch.setitem(sys.modules, "wavenet_conv.engine.loops", None)  # as if Numba were missing
    assert not Stream(conv).compiled
    assert rejects("need Numba: pip install 'wavenet-conv.fast.'", Stream, conv, compiled=True)


@pytest.mark.parametrize("batch_size", [1, FEW_ROWS + 1])
def test_what_cannot_be_read_is_rejected_and_changes_nothing(batch_size):
    stream, good = Stream(random_conv(), batch_size), torch.zeros(batch_size, dtype=torch.int64)
    before = stream.state()
    for tokens in (good[:-1], good[None], good.float(), [0] * batch_size):
        assert rejects("step takes tokens int64", stream.step, tokens)
    assert rejects("tokens are on meta and the stream on cpu", stream.step, good.to("meta"))
    for token in (27, -1, 10**6):
        wrong = good.index_fill(0, torch.tensor([batch_size - 1]), token)
        with pytest.raises(IndexError, match=rf"token {token} at \[{batch_size - 1}\] is outside the vocabulary of 27"):
            stream.step(wrong)
    assert rejects(f"row {batch_size} is not among the {batch_size} rows", stream.reset, [batch_size])
    for rows in (torch.zeros(batch_size), 0, torch.zeros(batch_size + 1, dtype=torch.bool), [[0]], "ab", 2**70):
        assert rejects("rows is .* give a list of rows", stream.reset, rows)
    tokens, lengths = ABC.encode(["emma"] * batch_size, context=8)
    for wrong in (tokens[1:], ["emma"]):
        assert rejects("are not those of", stream.push, wrong, lengths)
    for wrong in (tokens[:, 8:], torch.cat([tokens, tokens.clamp(max=0)], 1)):
        assert rejects("do not hold", stream.push, wrong, lengths)
    with pytest.raises(IndexError, match="token 30"):
        stream.push(torch.where(tokens > 0, 30, 0), lengths)
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        assert rejects("not copied or pickled; make another", copied, stream)
    assert all(torch.equal(part, before[key]) for key, part in stream.state().items())
    for rows in (0, -1, 1.5, None):
        assert rejects("batch_size is", Stream, random_conv(), rows)


@pytest.mark.parametrize("batch_size, compiled", BACKENDS[1:])
def test_inference_mode_and_another_default_device_change_nothing(batch_size, compiled):
    conv, tokens = random_conv(), torch.ones(batch_size, 2, dtype=torch.int64)
    expected = streamed(Stream(conv, batch_size, compiled=compiled), tokens)
    with torch.inference_mode():
        stream = Stream(conv, batch_size, compiled=compiled)
        assert torch.equal(streamed(stream, tokens), expected)
    stream.reset()
    assert torch.equal(streamed(stream, tokens), expected)
    with torch.device("meta"):
        stream = Stream(conv, batch_size, compiled=compiled)
    assert torch.equal(streamed(stream, tokens), expected)


def test_half_precision_runs(names):
    for dtype, tolerance in ((torch.bfloat16, 0.5), (torch.float16, 0.05)):
        assert_gives_the_trees_logits(random_tree(n_embd=6, n_hidden=16, dtype=dtype), names[:2], tolerance, 1)
