"""Two ways to run a tree over whole names: one call per example, or all windows as one batch."""

from __future__ import annotations

from math import prod

from einops import rearrange
from torch import Tensor

from .layers import FlattenConsecutive, GatedBlock, Sequential


def context_of(tree: Sequential) -> int:
    """Tokens that one prediction of `tree` sees: the product of its kernel sizes."""
    return prod(layer.n for layer in tree.layers if isinstance(layer, (FlattenConsecutive, GatedBlock)))


def windows(tokens: Tensor, context: int) -> Tensor:
    """All windows of sequences: `(batch, time)` to a view `(batch, time - context + 1, context)`."""
    return tokens.unfold(1, context, 1)


def loop_logits(tree: Sequential, tokens: Tensor) -> Tensor:
    """Runs a tree once per example, as the lecture does: `(batch, time)` to `(batch, time - context + 1, vocab)`."""
    examples = windows(tokens, context_of(tree))
    weight = tree.parameters()[0]
    logits = weight.new_zeros(*examples.shape[:2], len(weight))
    for b, name in enumerate(examples):
        for t in range(len(name)):
            logits[b, t] = tree(name[[t]])
    return logits


def window_logits(tree: Sequential, tokens: Tensor) -> Tensor:
    """Runs a tree on all windows as one batch: `(batch, time)` to `(batch, time - context + 1, vocab)`."""
    examples = windows(tokens, context_of(tree))
    logits = tree(rearrange(examples, "batch output context -> (batch output) context"))
    return rearrange(logits, "(batch output) vocab -> batch output vocab", batch=len(tokens))
