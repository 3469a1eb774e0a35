"""Whole sequences as matrix products over shifted views. `ConvWaveNet.forward` defines what this computes.

`nn.Conv1d` has a large fixed cost on the CPU. Here nodes lie in time-major order, `(time * batch, channels)`: the nodes
that tap j reads are all nodes but the first `j * dilation * batch`, one contiguous view without a copy. So a layer is
one matrix product per tap, then its norm and its activation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import ConvWaveNet
from ..vocabulary import check_tokens, checked_sequences
from .weights import Weights, fold


class FoldedWaveNet:
    """A frozen model for inference: batch norm folded into matrices that are made once (`weights`).

    Call it on tokens, as a `ConvWaveNet`:

        fast = fold_batch_norm(conv)
        logits = fast(tokens)  # as conv.eval()(tokens), to rounding
    """

    def __init__(self, weights: Weights):
        self.weights, self.config, self.context = weights, weights.config, weights.config.context
        self.device, self.dtype = weights.embedding.device, weights.embedding.dtype
        self.taps = [layer.taps.unbind() for layer in weights.layers]  # views cost as much as a short name's arithmetic

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> FoldedWaveNet:
        """The same model on another device or in another dtype; this one is left as it is."""
        return FoldedWaveNet(self.weights.to(device, dtype))

    def __call__(self, tokens: Tensor) -> Tensor:
        """Computes the logits of the token after every window, without gradients.

        Tokens int64 `(batch, time)` to logits `(batch, time - context + 1, vocab)`, with the errors of
        `ConvWaveNet.forward`. As there, nothing waits for a CUDA device, which takes tokens of the host too.
        """
        weights, vocab_size = self.weights, self.config.vocab_size
        tokens = checked_sequences(tokens, self.context, vocab_size, self.device, values=self.device.type != "cpu")
        batch, outputs = len(tokens), tokens.shape[1] - self.context + 1
        try:
            x = F.embedding(tokens.t(), weights.embedding).flatten(0, 1)
        except IndexError:  # on the CPU the lookup checks every token
            check_tokens(tokens, vocab_size)
            raise
        if weights.hidden is not None:
            skips = self._skip_sums(x, batch, outputs)
            x = torch.relu_(torch.addmm(weights.hidden.bias, torch.relu_(skips), weights.hidden.weight))
        else:
            for taps, layer in zip(self.taps, weights.layers):
                x = layer.activate(convolve(x, taps, layer.bias, layer.dilation * batch))
        logits = torch.addmm(weights.head.bias, x, weights.head.weight)
        return logits.view(outputs, batch, vocab_size).transpose(0, 1).contiguous()

    def _skip_sums(self, x: Tensor, batch: int, outputs: int) -> Tensor:
        """The skip sums of a gated model, for outputs only: they are the last nodes of every layer."""
        sums: list[Tensor] = []
        for taps, layer in zip(self.taps, self.weights.layers):
            f, g = convolve(x, taps, layer.bias, layer.dilation * batch).chunk(2, 1)
            z = torch.tanh(f) * torch.sigmoid(g)
            if layer.skip is not None:
                sums.append(torch.addmm(layer.skip.bias, z[len(z) - outputs * batch :], layer.skip.weight))
            if layer.residual is not None:
                x = torch.addmm(x[len(x) - len(z) :], z, layer.residual.weight).add_(layer.residual.bias)
        return sum(sums[1:], start=sums[0])


def fold_batch_norm(conv: ConvWaveNet) -> FoldedWaveNet:
    """Copies a model for inference, with batch norm folded into its matrices; `conv` is left as it is.

    Args:
        conv: A `ConvWaveNet` of any kind, in any mode. Layer norm, which depends on the node, stays.

    Raises:
        MappingError: `conv` is something else.
    """
    return FoldedWaveNet(fold(conv))


def convolve(x: Tensor, taps: Sequence[Tensor], bias: Tensor, step: int) -> Tensor:
    """A layer's linear map: x `(n, c_in)`, taps `step` rows apart, to `(n - (kernel_size - 1) * step, c_out)`."""
    rows = len(x) - (len(taps) - 1) * step
    h = torch.addmm(bias, x[:rows], taps[0])
    for tap in range(1, len(taps)):
        h.addmm_(x[tap * step : tap * step + rows], taps[tap])
    return h
