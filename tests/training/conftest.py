"""What the tests of training share."""

from __future__ import annotations

import pytest
import torch

from wavenet_conv import ConvWaveNet, WaveNetConfig
from wavenet_conv.training import new_model


@pytest.fixture
def small():
    """Makes small models whose weights are drawn from a seed."""

    def model(seed: int = 0, dtype: torch.dtype = torch.float32, **sizes) -> ConvWaveNet:
        return new_model(WaveNetConfig(**({"n_embd": 6, "n_hidden": 16} | sizes)), seed, dtype=dtype)

    return model
