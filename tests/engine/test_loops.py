"""Compiled loops have a tanh of their own, and nothing that they compute ahead outlives a reset."""

import numpy as np
import pytest
import torch
from engine.cases import DEEP, random_conv, streamed

from wavenet_conv import Stream

loops = pytest.importorskip("wavenet_conv.engine.loops", reason="needs Numba: pip install 'wavenet-conv[fast]'")


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 3e-6), (np.float64, 1e-14)])
def test_tanh_is_accurate_relative_to_its_size(dtype, tolerance):
    x = np.concatenate([sign * np.logspace(-30, 2, 30_000) for sign in (1, -1)] + [[0, np.inf, -np.inf]]).astype(dtype)
    expected, y = np.tanh(x.astype(np.float64)), x.copy()
    loops.tanh(y)
    assert (np.abs(y - expected) <= tolerance * np.abs(expected)).all()
    y = np.array([np.nan, 1], dtype=dtype)
    loops.tanh(y)
    assert np.isnan(y[0]) and not np.isnan(y[1])


def test_contributions_computed_ahead_are_forgotten_at_a_reset():
    """Without this, a row that is reset would read what another name's nodes contribute."""
    stream = Stream(random_conv(**DEEP), compiled=True)
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
