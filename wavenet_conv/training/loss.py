"""The model on distinct nodes: loss, gradients and statistics are the tree's on all windows of the same names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ACTIVATIONS
from ..model import BatchNorm, ConvWaveNet, GatedLayer
from .corpus import Batch, Corpus

Normalize = Callable[[BatchNorm, Tensor, Tensor], Tensor]  # of `(nodes, channels)` with these multiplicities


def shared_logits(
    model: ConvWaveNet, batch: Batch, dropout: float = 0.0, normalize: Normalize = BatchNorm.__call__
) -> Tensor:
    """Logits after each distinct window of a batch: `(windows, vocab)`, differentiable, in the model's mode.

    Args:
        model: a model.
        batch: a batch of a corpus that was made for it.
        dropout: in training, the probability that a linear map does not see an input channel, drawn per distinct node.
        normalize: computes batch norm.
    """
    dropout = dropout if model.training else 0.0
    layer: Any
    skips: Any = None
    x: Tensor = model.embedding.weight
    for layer, children, multiplicity in zip(model.layers, batch.children, batch.multiplicities):
        h = _fused(layer.conv, x, children, dropout)
        if isinstance(layer, GatedLayer):
            f, g = h.chunk(2, 1)
            z, rightmost = torch.tanh(f) * torch.sigmoid(g), children[:, -1]
            skip = _mapped(layer.skip, z, 0.0)
            skips = skip if skips is None else skip + skips.index_select(0, rightmost)
            if layer.residual is not None:
                x = _mapped(layer.residual, z, 0.0) + x.index_select(0, rightmost)
        else:
            x = ACTIVATIONS[layer.activation](_normalized(layer.norm, h, multiplicity, normalize))
    if model.hidden is not None:
        x = F.relu(_mapped(model.hidden, F.relu(skips), dropout))
    merging = len(batch.children) > len(model.layers)
    logits = _fused(model.head, x, batch.children[-1], dropout) if merging else _mapped(model.head, x, dropout)
    return _normalized(model.head_norm, logits, batch.multiplicities[-1], normalize)


def _normalized(norm: nn.Module | None, h: Tensor, multiplicity: Tensor, normalize: Normalize) -> Tensor:
    """h `(nodes, channels)` after a layer's norm; layer norm needs no multiplicities."""
    if isinstance(norm, BatchNorm):
        return normalize(norm, h, multiplicity)
    return h if norm is None else norm(h)


def _fused(conv: nn.Conv1d, x: Tensor, children: Tensor, dropout: float) -> Tensor:
    """The linear map of a layer, `(nodes below, c_in)` to `(nodes, c_out)`: once per node and tap, then gathered."""
    taps = conv.weight.permute(2, 1, 0).contiguous()  # (kernel_size, c_in, c_out)
    if dropout:
        gathered = x.index_select(0, children.flatten()).view(len(children), taps.shape[0] * taps.shape[1])
        h = F.dropout(gathered, dropout) @ taps.flatten(0, 1)
    else:
        h = sum((x @ tap).index_select(0, child) for tap, child in zip(taps, children.unbind(1)))
    return h if conv.bias is None else h + conv.bias


def _mapped(conv: nn.Conv1d, x: Tensor, dropout: float) -> Tensor:
    """A 1x1 convolution of `(nodes, c_in)`."""
    return F.linear(F.dropout(x, dropout) if dropout else x, conv.weight[..., 0], conv.bias)


def total_loss(
    model: ConvWaveNet, batch: Batch, dropout: float = 0.0, normalize: Normalize = BatchNorm.__call__
) -> Tensor:
    """The sum of -log p over all positions of a batch, in nats: a differentiable scalar. Arguments: `shared_logits`."""
    return -(shared_logits(model, batch, dropout, normalize).log_softmax(1) * batch.targets).sum()


@torch.no_grad()
def evaluate(model: ConvWaveNet, corpus: Corpus) -> float:
    """The mean of -log p over all positions of a list, in nats, in evaluation mode; restores the model's mode."""
    was_training = model.training
    model.eval()
    total = sum(float(total_loss(model, corpus.batch(rows))) for rows in corpus.chunks())
    model.train(was_training)
    return total / len(corpus.windows)


@torch.no_grad()
def predictions(model: ConvWaveNet, corpus: Corpus) -> Tensor:
    """The probabilities that a model in evaluation mode gives at each position of its corpus: `(positions, vocab)`."""
    parts = []
    for rows in corpus.chunks():
        first, last = int(corpus.first[rows[0]]), int(corpus.first[rows[-1]] + corpus.outputs[rows[-1]])
        _, windows = corpus.windows[first:last].unique(return_inverse=True)  # numbered as by `Corpus.batch`
        parts.append(shared_logits(model, corpus.batch(rows)).softmax(1)[windows])
    return torch.cat(parts)
