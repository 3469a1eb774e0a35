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
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .errors import ConfigError, ModeError
from .vocabulary import check_sequences


@dataclass(frozen=True)
class WaveNetConfig:
    """The shape of a model. The defaults are the lecture's last network (76,579 parameters).

    Args:
        vocab_size: Number of tokens, including `.`.
        n_embd: Width of the embedding.
        n_hidden: Width of every layer, or one width per layer.
        kernel_sizes: How many consecutive nodes each layer fuses, lowest layer first.
        batch_norm: Batch norm in every layer. Default: yes, unless the model is gated.
        bias: Bias in every layer's linear map. Default: only without batch norm, which has a shift of its own.
        gated: Layers are `GatedLayer`s, `n_embd` wide outside and `n_hidden` inside the gate, without batch norm.

    Raises:
        ConfigError: A field is wrong; the message names it.
    """

    vocab_size: int = 27
    n_embd: int = 24
    n_hidden: int | tuple[int, ...] = 128
    kernel_sizes: tuple[int, ...] = (2, 2, 2)
    batch_norm: bool | None = None
    bias: bool | None = None
    gated: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.kernel_sizes, Sequence) or not self.kernel_sizes:
            raise ConfigError(f"kernel_sizes is {self.kernel_sizes!r}; a model needs at least one, such as (2, 2, 2)")
        widths = self.n_hidden if isinstance(self.n_hidden, Sequence) else (self.n_hidden,) * len(self.kernel_sizes)
        if len(widths) != len(self.kernel_sizes):
            raise ConfigError(f"n_hidden has {len(widths)} widths for {len(self.kernel_sizes)} layers; give one each")
        sizes = [("vocab_size", self.vocab_size), ("n_embd", self.n_embd)]
        sizes += [(f"kernel_sizes[{i}]", size) for i, size in enumerate(self.kernel_sizes)]
        sizes += [(f"n_hidden[{i}]", width) for i, width in enumerate(widths)]
        for name, size in sizes:
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ConfigError(f"{name} is {size!r}; it must be an integer of at least 1")
        if self.gated and (self.batch_norm or self.bias is False):
            raise ConfigError("gated layers have biases and no batch norm; leave batch_norm and bias out")
        object.__setattr__(self, "batch_norm", not self.gated if self.batch_norm is None else self.batch_norm)
        object.__setattr__(self, "kernel_sizes", tuple(self.kernel_sizes))
        object.__setattr__(self, "n_hidden", tuple(widths))
        object.__setattr__(self, "bias", not self.batch_norm if self.bias is None else self.bias)

    @property
    def widths(self) -> tuple[int, ...]:
        """`n_hidden`, one per layer."""
        assert isinstance(self.n_hidden, tuple)  # since __post_init__
        return self.n_hidden

    @property
    def context(self) -> int:
        """Tokens that one prediction sees: the product of the kernel sizes."""
        return prod(self.kernel_sizes)

    @property
    def dilations(self) -> tuple[int, ...]:
        """Per layer, the distance between two taps: the product of the kernel sizes below it."""
        return tuple(prod(self.kernel_sizes[:layer]) for layer in range(len(self.kernel_sizes)))


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


class Layer(nn.Module):
    """The lecture's layer: fuses `kernel_size` nodes, `dilation` apart, by a linear map, batch norm and tanh."""

    def __init__(self, c_in: int, c_out: int, *, kernel_size: int, dilation: int, norm: bool, bias: bool, **kw: Any):
        super().__init__()
        self.kernel_size, self.dilation = kernel_size, dilation
        self.conv = nn.Conv1d(c_in, c_out, kernel_size, dilation=dilation, bias=bias, **kw)
        self.norm = BatchNorm(c_out, **kw) if norm else None

    def forward(self, x: Tensor, multiplicity: Tensor | None = None) -> Tensor:
        """Maps x `(batch, c_in, time)` to `(batch, c_out, time - (kernel_size - 1) * dilation)`."""
        h = self.conv(x)
        return torch.tanh(h if self.norm is None else self.norm(h, multiplicity))


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

    The head of a gated model reads the skip sums through ReLU, `hidden`, ReLU; in other models `hidden` is None.
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
        for kernel_size, dilation, width in zip(config.kernel_sizes, config.dilations, config.widths):
            taps: dict[str, Any] = {"kernel_size": kernel_size, "dilation": dilation, **kw}
            if config.gated:
                is_last = len(self.layers) == len(config.kernel_sizes) - 1
                self.layers.append(GatedLayer(channels, width, is_last=is_last, **taps))
            else:
                self.layers.append(Layer(channels, width, norm=bool(config.batch_norm), bias=bool(config.bias), **taps))
                channels = width
        self.hidden = nn.Conv1d(channels, channels, 1, **kw) if config.gated else None
        self.head = nn.Conv1d(channels, config.vocab_size, 1, **kw)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The lecture's initialization: normal weights over sqrt(inputs), zero biases, a ten times smaller head."""
        self.embedding.weight.normal_()
        for conv in (module for module in self.modules() if isinstance(module, nn.Conv1d)):
            inputs, taps, weight = conv.in_channels * conv.kernel_size[0], conv.kernel_size[0], conv.weight
            if taps > 1:  # drawn in (in, out) order, as the lecture's matrix
                weight = rearrange(weight.new_empty(inputs, conv.out_channels), "(j c) o -> o c j", j=taps)
            conv.weight.copy_(weight.normal_(std=inputs**-0.5))
            if conv.bias is not None:
                conv.bias.zero_()
        self.head.weight.mul_(0.1)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Computes the logits of the token after every window.

        Args:
            tokens: int64 `(batch, time)`, in each row `context` zeros and then a name (`Vocabulary.encode`).
            lengths: int64 `(batch,)`, characters per name: keeps the padding after names out of batch statistics.

        Returns:
            Logits `(batch, time - context + 1, vocab)`; output t reads tokens `[t, t + context)`.

        Raises:
            ShapeError, TokenError: Another shape, dtype or device, a token outside the vocabulary.
        """
        check_sequences(tokens, self.context, self.config.vocab_size, self.embedding.weight.device)
        x = rearrange(self.embedding(tokens), "batch time channel -> batch channel time")
        if self.hidden is not None:
            s = torch.zeros_like(x)
            for layer in self.layers:
                x, s = layer(x, s)
            x = torch.relu(self.hidden(torch.relu(s)))
        else:
            counts = self.multiplicities(tokens, lengths) if self.training else [None] * len(self.layers)
            for layer, multiplicity in zip(self.layers, counts):
                x = layer(x, multiplicity)
        return rearrange(self.head(x), "batch vocab time -> batch time vocab").contiguous()

    def multiplicities(self, tokens: Tensor, lengths: Tensor | None = None) -> Sequence[Tensor | None]:
        """Per layer `(batch, 1, time)`, how many windows have each node in their tree: the sum over its parents."""
        outputs = torch.arange(tokens.shape[1] - self.context + 1, device=tokens.device)
        last = outputs[-1] if lengths is None else torch.as_tensor(lengths, device=tokens.device)[:, None]
        counts = [(outputs <= last).expand(len(tokens), -1)[:, None].to(self.embedding.weight.dtype)]
        for kernel_size, d in zip(self.config.kernel_sizes[:0:-1], self.dilations[:0:-1]):  # top layer first
            pads = [(tap * d, (kernel_size - 1 - tap) * d) for tap in range(kernel_size)]
            counts.insert(0, torch.stack([F.pad(counts[0], pad) for pad in pads]).sum(0))
        return counts
