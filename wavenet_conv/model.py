"""The lecture's tree, slid: embedding, dilated causal convolutions, 1x1 head. Knows nothing of names or of trees.

A level is defined by `nn.Conv1d` (`forward_conv1d`) and run as matrix products over shifted views (`forward`); a test
holds the two equal. The convolutions are valid, never zero-padded: `.` is a real token with a learned embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .errors import ConfigError, ModeError, ShapeError
from .vocabulary import check_tokens


@dataclass(frozen=True)
class WaveNetConfig:
    """The shape of a model; the defaults are the lecture's last network (76,579 parameters).

    vocab_size: tokens, `.` included. n_embd: width of the embedding. n_hidden: width of every level, or one width a
    level. fan_ins: how many consecutive nodes each level fuses, lowest first. batch_norm: after every level's linear
    map. bias: on every level's linear map (default: where there is no batch norm, which has a shift of its own).
    Raises `ConfigError` naming the field that is wrong.
    """

    vocab_size: int = 27
    n_embd: int = 24
    n_hidden: int | tuple[int, ...] = 128
    fan_ins: tuple[int, ...] = (2, 2, 2)
    batch_norm: bool = True
    bias: bool | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.fan_ins, Sequence) or not self.fan_ins:
            raise ConfigError(f"fan_ins is {self.fan_ins!r}; a model needs at least one level, such as (2, 2, 2)")
        widths = self.n_hidden if isinstance(self.n_hidden, Sequence) else (self.n_hidden,) * len(self.fan_ins)
        if len(widths) != len(self.fan_ins):
            raise ConfigError(f"n_hidden has {len(widths)} widths for {len(self.fan_ins)} levels; give one a level")
        sizes = {"vocab_size": self.vocab_size, "n_embd": self.n_embd}
        sizes |= {f"fan_ins[{i}]": fan_in for i, fan_in in enumerate(self.fan_ins)}
        sizes |= {f"n_hidden[{i}]": width for i, width in enumerate(widths)}
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ConfigError(f"{name} is {size!r}; it must be an integer of at least 1")
        object.__setattr__(self, "fan_ins", tuple(self.fan_ins))
        object.__setattr__(self, "n_hidden", tuple(widths))
        object.__setattr__(self, "bias", not self.batch_norm if self.bias is None else self.bias)

    @property
    def context(self) -> int:
        """Tokens that one prediction sees."""
        return prod(self.fan_ins)

    @property
    def dilations(self) -> tuple[int, ...]:
        """Per level, the tokens between two taps: the product of the fan-ins below it."""
        return tuple(prod(self.fan_ins[:level]) for level in range(len(self.fan_ins)))


class BatchNorm(nn.Module):
    """Batch norm over axis 1 as the lecture writes it: unbiased variance, running statistics by momentum.

    In training every value counts as often as the tree's windows use its node (README: Training by sliding, exactly).
    """

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor, uses: Tensor | None = None) -> Tensor:
        """x `(n, channels)` or `(n, channels, time)`; uses, needed in training only, `(n, 1)` or `(n, 1, time)`."""
        if not self.training:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        axes = [axis for axis in range(x.ndim) if axis != 1]
        total = uses.sum()
        if total <= 1:
            raise ModeError(
                "batch norm in training got one single value a channel, which has no variance; "
                "train on more than one window at a time, or call .eval() first"
            )
        mean = (uses * x).sum(axes, keepdim=True) / total
        var = (uses * (x - mean) ** 2).sum(axes, keepdim=True) / (total - 1)
        with torch.no_grad():
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(var.flatten(), self.momentum)
        per_channel = [1, -1] + [1] * (x.ndim - 2)
        return (x - mean) / torch.sqrt(var + self.eps) * self.weight.view(per_channel) + self.bias.view(per_channel)


class Level(nn.Module):
    """One fusion: `fan_in` nodes, `dilation` apart, through a linear map, batch norm and tanh to one node."""

    def __init__(self, c_in: int, c_out: int, fan_in: int, dilation: int, batch_norm: bool = True, bias: bool = False):
        super().__init__()
        self.conv = nn.Conv1d(c_in, c_out, kernel_size=fan_in, dilation=dilation, bias=bias)
        # Stored as the tree's (fan_in * c_in, c_out) matrix and seen as Conv1d's weight, so `forward` never copies it.
        stored = rearrange(self.conv.weight.detach(), "o c j -> (j c) o").contiguous()
        self.conv.weight = nn.Parameter(rearrange(stored, "(j c) o -> o c j", j=fan_in))
        self.norm = BatchNorm(c_out) if batch_norm else None
        self.fan_in, self.dilation = fan_in, dilation

    def forward(self, x: Tensor, batch: int, uses: Tensor | None = None) -> Tensor:
        """The nodes above x, whose rows are nodes in time-major order: `(time * batch, c_in)`.

        Returns `((time - (fan_in - 1) * dilation) * batch, c_out)`. Time-major, the nodes that tap j reads are
        x without its first `j * dilation` time steps: a contiguous view, so nothing is copied.
        """
        weights = self.conv.weight.permute(2, 1, 0).unbind()  # one (c_in, c_out) matrix a tap
        step = self.dilation * batch
        rows = len(x) - (self.fan_in - 1) * step
        bias, first = self.conv.bias, x[:rows]
        h = first @ weights[0] if bias is None else torch.addmm(bias, first, weights[0])
        for tap in range(1, self.fan_in):
            h.addmm_(x[tap * step : tap * step + rows], weights[tap])
        return torch.tanh(h if self.norm is None else self.norm(h, uses))

    def forward_conv1d(self, x: Tensor, uses: Tensor | None = None) -> Tensor:
        """The same as the definition: x `(batch, c_in, time)` to `(batch, c_out, time - (fan_in - 1) * dilation)`."""
        h = self.conv(x)
        return torch.tanh(h if self.norm is None else self.norm(h, uses))


class ConvWaveNet(nn.Module):
    """A stack of dilated causal convolutions that predicts the next token at every position at once.

    `conv(tokens)` runs it fast; `conv.forward_conv1d(tokens)` is the plain `nn.Conv1d` pass that defines it.
    Weights are drawn as the lecture draws them. Source: van den Oord et al. 2016, arXiv:1609.03499, section 2.1;
    README, "Tree to convolution".
    """

    def __init__(self, config: WaveNetConfig):
        super().__init__()
        self.config, self.context, self.dilations = config, config.context, config.dilations
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        widths = (config.n_embd, *config.n_hidden)
        self.levels = nn.ModuleList(
            Level(c_in, c_out, fan_in, dilation, config.batch_norm, config.bias)
            for c_in, c_out, fan_in, dilation in zip(widths, widths[1:], config.fan_ins, self.dilations)
        )
        self.head = nn.Conv1d(widths[-1], config.vocab_size, kernel_size=1)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The lecture's initialisation: normal weights over sqrt(fan-in), zero biases, a head ten times smaller."""
        self.embedding.weight.normal_()
        for conv in [level.conv for level in self.levels] + [self.head]:
            conv.weight.normal_(std=(conv.in_channels * conv.kernel_size[0]) ** -0.5)
            if conv.bias is not None:
                conv.bias.zero_()
        self.head.weight.mul_(0.1)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits of the token after every window: `(batch, time)` int64 to `(batch, time - context + 1, vocab)`.

        Output t reads tokens `[t, t + context)`. `lengths` `(batch,)`, as `Vocabulary.encode` returns them, matter in
        training mode only: they keep the padding after shorter names out of the batch statistics.
        Raises `ShapeError` for other shapes and dtypes and for a sequence shorter than the context, `TokenError` for a
        token outside the vocabulary (on CUDA the check waits for the device; it is left out of a captured graph).
        """
        batch, time = self._checked_shape(tokens)
        uses = self._uses(tokens, lengths)
        x = self._embed(tokens.t()).flatten(0, 1)
        for level, n in zip(self.levels, uses):
            x = level(x, batch, None if n is None else n.reshape(-1, 1))
        logits = torch.addmm(self.head.bias, x, self.head.weight.squeeze(2).t())
        return logits.view(-1, batch, self.config.vocab_size).transpose(0, 1).contiguous()

    def forward_conv1d(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The definition of `forward`, and slower: every level as `nn.Conv1d` on `(batch, channel, time)`."""
        self._checked_shape(tokens)
        uses = self._uses(tokens, lengths)
        x = rearrange(self._embed(tokens), "batch time channel -> batch channel time")
        for level, n in zip(self.levels, uses):
            x = level.forward_conv1d(x, None if n is None else rearrange(n, "time batch -> batch 1 time"))
        return rearrange(self.head(x), "batch vocab time -> batch time vocab")

    def _checked_shape(self, tokens: Tensor) -> tuple[int, int]:
        if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ShapeError(f"tokens must be int64 (batch, time), not {tokens.dtype} of shape {tuple(tokens.shape)}")
        batch, time = tokens.shape
        if time < self.context:
            raise ShapeError(
                f"a sequence of {time} tokens is shorter than the context of {self.context}; "
                f"put {self.context} zeros before each name, as Vocabulary.encode does"
            )
        return batch, time

    def _embed(self, tokens: Tensor) -> Tensor:
        # The CPU's look-up checks every token itself; a CUDA one would end in a device assert.
        if tokens.is_cuda and not torch.cuda.is_current_stream_capturing():
            check_tokens(tokens, self.config.vocab_size)
        try:
            return F.embedding(tokens, self.embedding.weight)
        except IndexError:
            check_tokens(tokens, self.config.vocab_size)
            raise

    def _uses(self, tokens: Tensor, lengths: Tensor | None) -> list[Tensor] | list[None]:
        """Per level `(time, batch)`: how many windows use each node (README: Training by sliding, exactly)."""
        if not self.training or not self.config.batch_norm:
            return [None] * len(self.levels)
        batch, time = tokens.shape
        outputs = torch.arange(time - self.context + 1, device=tokens.device)[:, None]
        last = len(outputs) - 1 if lengths is None else lengths.to(tokens.device)
        uses = [(outputs <= last).expand(-1, batch).to(self.embedding.weight.dtype)]
        for level in reversed(self.levels[1:]):
            above = uses[0]
            below = above.new_zeros(len(above) + (level.fan_in - 1) * level.dilation, batch)
            for tap in range(level.fan_in):
                below[tap * level.dilation :][: len(above)] += above
            uses.insert(0, below)
        return uses
