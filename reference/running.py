"""Two ways to run a tree over whole names: one call an example, or all windows as one batch."""

from __future__ import annotations

from math import prod

from einops import rearrange
from torch import Tensor

from .layers import FlattenConsecutive, GatedBlock, Sequential


def context_of(tree: Sequential) -> int:
    """Tokens that one prediction of `tree` sees: the product of its kernel sizes."""
    return prod(layer.n for layer in tree.layers if isinstance(layer, (FlattenConsecutive, GatedBlock)))


def windows(tokens: Tensor, context: int) -> Tensor:
    """All windows of sequences: `(batch, time)` to a view `(batch, time - context + 1, context)`.

    Raises `ValueError` for a sequence shorter than the context.
    """
    if tokens.shape[1] < context:
        raise ValueError(
            f"a sequence of {tokens.shape[1]} tokens has no window of {context}; put {context} zeros before it"
        )
    return tokens.unfold(1, context, 1)


def loop_logits(tree: Sequential, tokens: Tensor) -> Tensor:
    """One call an example, each a batch of one, written into its row of the logits as the lecture shows it.

    tokens `(batch, time)` to logits `(batch, time - context + 1, vocab)`.
    """
    examples = windows(tokens, context_of(tree))
    logits = tree.layers[-1].weight.new_zeros(*examples.shape[:2], tree.layers[-1].weight.shape[1])
    for b, name in enumerate(examples):
        for t in range(len(name)):
            logits[b, t] = tree(name[[t]])
    return logits


def window_logits(tree: Sequential, tokens: Tensor) -> Tensor:
    """All windows of all names as one batch: the strongest simple thing to do with a tree.

    tokens `(batch, time)` to logits `(batch, time - context + 1, vocab)`.
    """
    examples = windows(tokens, context_of(tree))
    logits = tree(rearrange(examples, "batch output context -> (batch output) context"))
    return rearrange(logits, "(batch output) vocab -> batch output vocab", batch=len(tokens))
