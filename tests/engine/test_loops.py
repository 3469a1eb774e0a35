"""Compiled loops: exact where arithmetic is, with a tanh of their own, and nothing computed ahead outlives a reset."""

import numpy as np
import pytest
import torch
from engine.cases import ABC, DEEP, SHAPES, random_conv, streamed
from helpers import random_tree, to_exact

import reference
from wavenet_conv import Stream, from_tree

loops = pytest.importorskip("wavenet_conv.engine.loops", reason="needs Numba: pip install 'wavenet-conv[fast]'")


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_logits_are_the_trees_to_the_bit_where_arithmetic_is_exact(
    names, clamp_for_tanh, monkeypatch, sizes, batch_size
):
    """By the loop over the layers as Python runs it, which calls the tanh that it finds."""
    monkeypatch.setattr(loops, "tanh", lambda x: np.clip(x, -1, 1, out=x))
    monkeypatch.setattr(loops, "read", loops.read.py_func)
    monkeypatch.setattr(loops, "step", loops.step.py_func)
    tree = to_exact(random_tree(**sizes))
    stream = Stream(from_tree(tree), batch_size, compiled=True)
    tokens, _ = ABC.encode(names[:: len(names) // batch_size][:batch_size], context=stream.context)
    with torch.no_grad():
        expected = reference.window_logits(tree, tokens)
    assert torch.equal(streamed(stream, tokens[:, stream.context - 1 :]), expected)


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 3e-6), (np.float64, 1e-14)])
def test_tanh_is_accurate_relative_to_its_size(dtype, tolerance):
    x = np.concatenate([sign * np.logspace(-30, 2, 100_000) for sign in (1, -1)]).astype(dtype)
    x = np.concatenate([x, np.linspace(-25, 25, 100_000, dtype=dtype), [0, np.inf, -np.inf]]).astype(dtype)
    expected, y = np.tanh(x.astype(np.float64)), x.copy()
    loops.tanh(y)
    assert np.abs(y - expected).max() < tolerance
    assert (np.abs(y - expected) <= 2 * tolerance * np.abs(expected)).all()
    y = np.array([np.nan, 1], dtype=dtype)
    loops.tanh(y)
    assert np.isnan(y[0]) and not np.isnan(y[1])


@pytest.mark.parametrize("column, value", [("DILATION", 7), ("CHILDREN", 0), ("MATRIX", 0)])
def test_wrong_numbers_of_a_layer_are_seen(column, value):
    conv = random_conv((2, 2, 2, 2, 2), n_hidden=6)
    tokens = torch.randint(27, (1, 80), generator=torch.Generator().manual_seed(0))
    tokens[:, :32] = 0
    stream = Stream(conv, compiled=True)
    assert (streamed(stream, tokens[:, 31:]) - conv(tokens)).abs().max() < 1e-12
    stream.reset()
    stream.backend.arrays.layers[-1, getattr(loops, column)] = value
    assert (streamed(stream, tokens[:, 31:]) - conv(tokens)).abs().max() > 1e-3


def test_contributions_computed_ahead_are_forgotten_at_a_reset():
    """Without this, a row that is reset would read what another name's nodes contribute."""
    stream = Stream(from_tree(random_tree(**DEEP)), compiled=True)
    tokens = torch.tensor([[1, 2, 3]])
    expected = streamed(stream, tokens)
    for again in (False, True):
        stream.reset()
        streamed(stream, tokens.repeat(1, 12))
        phase = stream.backend.phase
        stream.reset()
        if again:
            stream.backend.phase = phase
        assert phase and torch.equal(streamed(stream, tokens), expected) != again
