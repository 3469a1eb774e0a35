"""Models and small functions that the tests of the engine share."""

from __future__ import annotations

import pytest
import torch
from helpers import ALPHABET, LAYER_NORM, LINEAR, MIXED, needs_numba, random_tree
from torch import Tensor

import reference
from wavenet_conv import ConvWaveNet, Vocabulary, WaveNetConvError, from_tree

ABC = Vocabulary(ALPHABET)
SMALL = dict(n_embd=6, n_hidden=16)
DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-5)]  # and how far logits may be off

WIDE = dict(kernel_sizes=(2, 2, 2), n_embd=24, n_hidden=128)
GATED = dict(kernel_sizes=(2, 2, 2), n_embd=24, n_hidden=32, gated=True)
DEEP = dict(kernel_sizes=(2,) * 6, n_embd=6, n_hidden=(16, 9, 20, 16, 16, 16))  # dilations up to 32
SHAPES: list[dict] = [
    *[dict(kernel_sizes=kernel_sizes, **SMALL) for kernel_sizes in ((8,), (1,), (3, 2), (1, 4, 1, 2))],
    dict(kernel_sizes=(2, 3), n_embd=5, n_hidden=(7, 9)),
    DEEP,
]
SHAPES += [shape | {"gated": True} for shape in SHAPES]
SHAPES += [dict(kernel_sizes=kernel_sizes, n_embd=50, n_hidden=3, gated=True) for kernel_sizes in ((4,), (2, 2, 2))]
# What only PyTorch evaluates.
OTHERS: list[dict] = [
    dict(kernel_sizes=(2, 2, 2), n_embd=24, n_hidden=40, **LAYER_NORM),
    dict(kernel_sizes=(3, 1, 2), **SMALL, **MIXED),
    dict(kernel_sizes=(2, 2), **SMALL, **LINEAR),
]
# Rows, and whether compiled loops read them.
BACKENDS = [pytest.param(1, True, marks=needs_numba), pytest.param(3, True, marks=needs_numba), (3, False), (20, False)]

gated_or_not = pytest.mark.parametrize("gated", [False, True], ids=["tanh", "gated"])


def random_conv(kernel_sizes=(2, 2, 2), **options) -> ConvWaveNet:
    """A model in evaluation mode with random statistics, in float64; options of `random_tree`."""
    return from_tree(random_tree(kernel_sizes, **SMALL | options))


def rejects(message: str, call, *args, **options) -> bool:
    """Whether the call raises this error of the package; another error is passed on."""
    with pytest.raises(WaveNetConvError, match=message):
        call(*args, **options)
    return True


def outputs_of(model, names: list[str], vocab: Vocabulary, device="cpu") -> tuple[Tensor, Tensor]:
    """Logits of a model, of all outputs of the names end to end, and the token that follows each output."""
    context = reference.context_of(model) if isinstance(model, reference.Sequential) else model.context
    tokens, lengths = vocab.encode(names, context=context)
    inside = torch.arange(tokens.shape[1] - context + 1) <= lengths[:, None]
    targets = torch.cat([tokens[:, context:], tokens.new_zeros(len(names), 1)], 1)[inside]
    with torch.no_grad():
        if isinstance(model, reference.Sequential):
            windows = tokens.unfold(1, context, 1)[inside].to(device)
            return torch.cat([model(part) for part in windows.split(20_000)]), targets
        return model(tokens.to(device))[inside.to(device)], targets


def streamed(stream, tokens):
    """Logits after `tokens`, `(batch, time)`, read step by step: `(batch, time, vocab)`."""
    return torch.stack([stream.step(token) for token in tokens.t().contiguous()], 1)


def last_layer_problem(n, kernel_size=2, channels=128, vocab=27, kinds=50, scale=1.0, device="cpu") -> list[Tensor]:
    """Arguments of `kernel.last_layer`: sums of size `scale`, logits of size about 2."""
    generator = torch.Generator().manual_seed(0)
    contributions = torch.randn(kernel_size, kinds, channels, generator=generator) * scale / kernel_size**0.5
    children = torch.randint(kinds, (n, kernel_size), generator=generator)
    targets = torch.randint(vocab, (n,), generator=generator)
    head = torch.randn(channels, vocab, generator=generator) * 2 / channels**0.5
    arguments = [contributions, children, targets, head, torch.randn(vocab, generator=generator)]
    return [tensor.to(device) for tensor in arguments]
