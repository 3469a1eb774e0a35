"""`torch.export` and `torch.compile` take the models, and give the same numbers."""

from __future__ import annotations

import shutil

import pytest
import torch
from engine.cases import random_conv
from helpers import KINDS
from torch.export import Dim

from wavenet_conv import fold_batch_norm
from wavenet_conv.errors import TokenError

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


def tokens_of(batch, time):
    return torch.randint(27, (batch, time), generator=torch.Generator().manual_seed(time))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_export_with_dynamic_batch_and_time(kind):
    """From two outputs on: PyTorch makes another graph for a length of 1."""
    conv = random_conv(**kind)
    shapes = ({0: Dim("batch"), 1: Dim("time", min=conv.context + 1)},)
    exported = torch.export.export(conv, (tokens_of(3, 20),), dynamic_shapes=shapes).module()
    for batch, time in ((1, conv.context + 1), (2, 30), (7, 90)):
        tokens = tokens_of(batch, time)
        assert torch.allclose(exported(tokens), conv(tokens), rtol=0, atol=1e-12)
    with pytest.raises(TokenError):
        conv(tokens + 27)  # outside of an export, values are checked


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("kind", [{"norm": "batch"}, {"gated": True}], ids=str)
@pytest.mark.parametrize("freeze", [fold_batch_norm, lambda conv: conv], ids=["folded", "conv"])
def test_compiled_models_give_the_same_logits(kind, freeze):
    model = freeze(random_conv(**kind))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for batch, time in ((1, 8), (3, 20), (5, 30)):
            tokens = tokens_of(batch, time)
            assert torch.allclose(compiled(tokens), model(tokens), rtol=0, atol=1e-12)
