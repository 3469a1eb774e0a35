"""Models and small functions that the tests of the engine share."""

from __future__ import annotations

from dataclasses import replace

import torch
from helpers import ALPHABET, random_tree
from torch import Tensor

import reference
from wavenet_conv import ConvWaveNet, Vocabulary, from_tree
from wavenet_conv.engine.weights import LayerWeights, Weights

ABC = Vocabulary(ALPHABET)
SMALL = dict(n_embd=6, n_hidden=16)
DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-5)]  # and how far logits may be off

# Changes of the second layer that every test of equality must see.
BREAKS = {
    "taps are swapped": lambda layer: replace(layer, taps=layer.taps.flip(0)),
    "the bias is lost": lambda layer: replace(layer, bias=layer.bias * 0),
    "a tap is lost": lambda layer: replace(layer, taps=layer.taps * torch.tensor([0.0, 1.0]).view(2, 1, 1)),
    "channels are rolled": lambda layer: replace(layer, taps=layer.taps.roll(1, 1)),
}


def random_conv(kernel_sizes=(2, 2, 2), **options) -> ConvWaveNet:
    """A model in evaluation mode with random statistics, in float64; options of `random_tree`."""
    return from_tree(random_tree(kernel_sizes, **SMALL | options))


def broken(weights: Weights, kind: str) -> Weights:
    """Weights with one of `BREAKS` in the second layer."""
    layers: list[LayerWeights] = list(weights.layers)
    layers[1] = BREAKS[kind](layers[1])
    return replace(weights, layers=tuple(layers))


def outputs_of(model, names: list[str], vocab: Vocabulary, device="cpu") -> tuple[Tensor, Tensor]:
    """Logits of a model, of all outputs of the names end to end, and the token that follows each output."""
    context = reference.context_of(model) if isinstance(model, reference.Sequential) else model.context
    tokens, lengths = vocab.encode(names, context=context)
    inside = torch.arange(tokens.shape[1] - context + 1) <= lengths[:, None]
    targets = torch.cat([tokens[:, context:], tokens.new_zeros(len(names), 1)], 1)[inside]
    with torch.no_grad():
        if isinstance(model, reference.Sequential):
            logits = reference.window_logits(model, tokens.to(device))
        else:
            logits = model(tokens.to(device))
    return logits[inside.to(device)], targets


def tree_log_probs(tree, names: list[str], vocab: Vocabulary) -> tuple[Tensor, Tensor]:
    """Log-probabilities of every position by the tree, name after name, and the sum of each name."""
    logits, targets = outputs_of(tree, names, vocab)
    values = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    sums = torch.stack([part.sum() for part in values.split([len(name) + 1 for name in names])])
    return values, sums
