"""The lecture's tree, slid over whole sequences: embedding, dilated causal convolutions, head. Reads top to bottom.

The tree predicts one token at a time. A layer flattens `kernel_size` neighbouring nodes of C channels into one vector
and multiplies it by the lecture's `Linear.weight`, `(kernel_size * C, out)` (`nn.Linear` stores the transpose). A
convolution does this at every position at once: it multiplies neighbour j by rows `j * C` to `(j + 1) * C` and adds up.
So the mapping is

    Conv1d.weight = rearrange(Linear.weight, "(j c) o -> o c j")

In the tree, the second layer reads pairs of pairs. In the convolution a pair starts at every position, so the second
layer reads nodes that are 2 positions apart and the third layer nodes that are 4 apart: the dilation is the product of
the kernel sizes below. Node p starts at token p; its child j (the convolution's tap j) is node `p + j * dilation`.
Windows 2 apart use the same pairs, windows 4 apart the same quads: the tree computes these once per window, the
convolution once. For 2·2·2 and a name of L characters this is `3 L + 13` nodes instead of `7 (L + 1)`.

The convolutions are valid, never zero-padded: the padding before a name is token 0, which has a learned embedding.
`fold_batch_norm(model)` computes the same logits faster, for inference; `ConvWaveNet.forward` is the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import ACTIVATIONS, WaveNetConfig
from .errors import ConfigError, ModeError
from .vocabulary import Vocabulary, checked_sequences


class BatchNorm(nn.Module):
    """Batch norm per channel as the lecture writes it: unbiased variance, running statistics by momentum.

    In training every node is weighted by its multiplicity: how many windows have it in their tree. Then mean and
    variance are those of the tree, which computes the node once for each of these windows.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1, **kw: Any):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(channels, **kw))
        self.bias = nn.Parameter(torch.zeros(channels, **kw))
        self.register_buffer("running_mean", torch.zeros(channels, **kw))
        self.register_buffer("running_var", torch.ones(channels, **kw))

    def forward(self, x: Tensor, multiplicity: Tensor | None = None) -> Tensor:
        """Normalizes x `(n, channels)` or `(n, channels, time)`; multiplicity is `(n, 1)` or `(n, 1, time)`."""
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        m = torch.ones_like(x[:, :1]) if multiplicity is None else multiplicity
        axes = [axis for axis in range(x.ndim) if axis != 1]
        total = m.sum()
        if total <= 1:
            raise ModeError("one value per channel has no variance; train on more windows at a time, or call .eval()")
        mean = (m * x).sum(axes, keepdim=True) / total
        var = (m * (x - mean) ** 2).sum(axes, keepdim=True) / (total - 1)
        with torch.no_grad():
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(var.flatten(), self.momentum)
        per_channel = [1, -1] + [1] * (x.ndim - 2)
        return (x - mean) / torch.sqrt(var + self.eps) * self.weight.view(per_channel) + self.bias.view(per_channel)


class LayerNorm(nn.LayerNorm):
    """Layer norm over the channels of one node. It reads no other node, so windows can share its result.

    Source: Ba et al. 2016, arXiv:1607.06450.
    """

    def forward(self, x: Tensor, multiplicity: Tensor | None = None) -> Tensor:
        """Normalizes x `(n, channels)` or `(n, channels, time)`; how often a node counts changes nothing."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def norm_of(kind: str, channels: int, **kw: Any) -> BatchNorm | LayerNorm | None:
    """A new norm by its name in `WaveNetConfig`."""
    return {"batch": BatchNorm, "layer": LayerNorm}[kind](channels, **kw) if kind != "none" else None


class Layer(nn.Module):
    """The lecture's layer: fuses `kernel_size` nodes, `dilation` apart, by a linear map, a norm and an activation.

    `activation` is a key of `ACTIVATIONS`; the lecture's is tanh, after batch norm.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        *,
        kernel_size: int,
        dilation: int,
        norm: str = "batch",
        activation: str = "tanh",
        bias: bool = False,
        **kw: Any,
    ):
        super().__init__()
        self.kernel_size, self.dilation, self.activation = kernel_size, dilation, activation
        self.conv = nn.Conv1d(c_in, c_out, kernel_size, dilation=dilation, bias=bias, **kw)
        self.norm = norm_of(norm, c_out, **kw)

    def forward(self, x: Tensor, multiplicity: Tensor | None = None) -> Tensor:
        """Maps x `(batch, c_in, time)` to `(batch, c_out, time - (kernel_size - 1) * dilation)`."""
        h = self.conv(x)
        return ACTIVATIONS[self.activation](h if self.norm is None else self.norm(h, multiplicity))


class GatedLayer(nn.Module):
    """The WaveNet paper's block: a gated activation with a residual and a skip connection, on the same tree.

    A node has two values, both `channels` wide: h, which its parents read, and s, the skip sum. The convolution of the
    children's h gives f and g, side by side; each value then adds the rightmost child's:

        z = tanh(f) * sigmoid(g)    h = residual(z) + h(rightmost)    s = skip(z) + s(rightmost)

    A token's h is its embedding and its s is 0. Nobody reads the last layer's h, so that layer has no `residual`.
    Source: van den Oord et al. 2016, arXiv:1609.03499, sections 2.3 and 2.4.
    """

    def __init__(self, channels: int, gate_width: int, *, kernel_size: int, dilation: int, is_last: bool, **kw: Any):
        super().__init__()
        self.kernel_size, self.dilation = kernel_size, dilation
        self.conv = nn.Conv1d(channels, 2 * gate_width, kernel_size, dilation=dilation, **kw)
        self.residual = None if is_last else nn.Conv1d(gate_width, channels, 1, **kw)
        self.skip = nn.Conv1d(gate_width, channels, 1, **kw)

    def forward(self, h: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Maps h and s `(batch, channels, time)`; both get shorter by `(kernel_size - 1) * dilation`."""
        f, g = self.conv(h).chunk(2, dim=1)
        z = torch.tanh(f) * torch.sigmoid(g)
        rightmost = slice((self.kernel_size - 1) * self.dilation, None)
        s = self.skip(z) + s[..., rightmost]
        return (z if self.residual is None else self.residual(z) + h[..., rightmost]), s


class ConvWaveNet(nn.Module):
    """Predicts the next token at every position of a sequence in one convolutional pass.

    The head is one more linear map, which may fuse nodes as a layer does, and `head_norm` its norm or None. In a gated
    model it reads the skip sums through ReLU, `hidden`, ReLU; in other models `hidden` is None.
    Source: van den Oord et al. 2016, arXiv:1609.03499, section 2.1 (gated: 2.3, 2.4).
    """

    def __init__(self, config: WaveNetConfig, *, device: Any = None, dtype: torch.dtype | None = None):
        super().__init__()
        if not isinstance(config, WaveNetConfig):
            raise ConfigError(f"config is {config!r}; pass a WaveNetConfig, such as WaveNetConfig()")
        kw: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config, self.context, self.dilations = config, config.context, config.dilations
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd, **kw)
        self.layers, channels = nn.ModuleList(), config.n_embd
        last = len(config.kernel_sizes) - 1
        for index, (kernel_size, dilation) in enumerate(zip(config.kernel_sizes, config.dilations)):
            taps: dict[str, Any] = {"kernel_size": kernel_size, "dilation": dilation, **kw}
            width, norm, activation = config.widths[index], config.norms[index], config.activations[index]
            if config.gated:
                self.layers.append(GatedLayer(channels, width, is_last=index == last, **taps))
            else:
                bias = config.biases[index]
                self.layers.append(Layer(channels, width, norm=norm, activation=activation, bias=bias, **taps))
                channels = width
        self.hidden = nn.Conv1d(channels, channels, 1, **kw) if config.gated else None
        span, size = prod(config.kernel_sizes), config.head_kernel_size
        self.head = nn.Conv1d(channels, config.vocab_size, size, dilation=span, **kw)
        self.head_norm = norm_of(config.head_norm, config.vocab_size, **kw)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The lecture's initialization: normal weights over sqrt(inputs), zero biases, ten times smaller logits."""
        self.embedding.weight.normal_()
        for conv in (module for module in self.modules() if isinstance(module, nn.Conv1d)):
            inputs, taps, weight = conv.in_channels * conv.kernel_size[0], conv.kernel_size[0], conv.weight
            if taps > 1:  # drawn in (in, out) order, as the lecture's matrix
                weight = rearrange(weight.new_empty(inputs, conv.out_channels), "(j c) o -> o c j", j=taps)
            conv.weight.copy_(weight.normal_(std=inputs**-0.5))
            if conv.bias is not None:
                conv.bias.zero_()
        if self.head_norm is None:
            self.head.weight.mul_(0.1)
        else:
            self.head_norm.weight.fill_(0.1)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Computes the logits of the token after every window.

        On CUDA this does not wait for the device: tokens on the host are checked and copied, and for a token on the
        device that is outside the vocabulary the embedding's kernel fails (a device-side assert).

        Args:
            tokens: int64 `(batch, time)`, in each row `context` zeros and then a name (`Vocabulary.encode`).
            lengths: int64 `(batch,)`, characters per name: keeps the padding after names out of batch statistics.

        Returns:
            Logits `(batch, time - context + 1, vocab)`; output t reads tokens `[t, t + context)`.

        Raises:
            ShapeError, TokenError: Another shape, dtype or device, a token outside the vocabulary.
        """
        tokens = checked_sequences(tokens, self.context, self.config.vocab_size, self.embedding.weight.device)
        x = rearrange(self.embedding(tokens), "batch time channel -> batch channel time")
        if self.hidden is not None:
            s = torch.zeros_like(x)
            for layer in self.layers:
                x, s = layer(x, s)
            x = self.head(torch.relu(self.hidden(torch.relu(s))))
        else:
            counts = self.multiplicities(tokens, lengths) if self.training else [None] * (len(self.layers) + 1)
            for layer, multiplicity in zip(self.layers, counts):
                x = layer(x, multiplicity)
            x = self.head(x) if self.head_norm is None else self.head_norm(self.head(x), counts[-1])
        return rearrange(x, "batch vocab time -> batch time vocab").contiguous()

    def multiplicities(self, tokens: Tensor, lengths: Tensor | None = None) -> Sequence[Tensor | None]:
        """Per layer, and then for the head, `(batch, 1, time)`: how many windows have each node in their tree.

        That is 1 for each output of the head, and below it the sum over a node's parents.
        """
        outputs = torch.arange(tokens.shape[1] - self.context + 1, device=tokens.device)
        last = outputs[-1] if lengths is None else torch.as_tensor(lengths, device=tokens.device)[:, None]
        counts = [(outputs <= last).expand(len(tokens), -1)[:, None].to(self.embedding.weight.dtype)]
        sizes = (*self.config.kernel_sizes, self.config.head_kernel_size)
        for size, d in zip(sizes[:0:-1], (*self.dilations, prod(self.config.kernel_sizes))[:0:-1]):  # top first
            pads = [(tap * d, (size - 1 - tap) * d) for tap in range(size)]
            counts.insert(0, torch.stack([F.pad(counts[0], pad) for pad in pads]).sum(0))
        return counts


def check_pair(model: Any, vocab: Any) -> None:
    """Raises `ConfigError` unless these are a `ConvWaveNet` and a vocabulary of as many tokens."""
    if not isinstance(model, ConvWaveNet):
        raise ConfigError(f"the model is a {type(model).__name__}, not a ConvWaveNet; map it with from_tree first")
    if not isinstance(vocab, Vocabulary):
        raise ConfigError(f"the vocabulary is a {type(vocab).__name__}; take Vocabulary.from_mapping(stoi)")
    vocab.check_size(model.config.vocab_size)
