"""The lecture's tree, slid: embedding, dilated causal convolutions, 1x1 head. Knows nothing of names or of trees.

The model is defined by `nn.Conv1d` (`forward_conv1d`) and run as matrix products over shifted views (`forward`); a test
holds the two equal. The convolutions are valid, never zero-padded: `.` is a real token with a learned embedding.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

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
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
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

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1, **factory: Any):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(channels, **factory))
        self.bias = nn.Parameter(torch.zeros(channels, **factory))
        self.register_buffer("running_mean", torch.zeros(channels, **factory))
        self.register_buffer("running_var", torch.ones(channels, **factory))

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

    def __init__(self, c_in: int, c_out: int, fan_in: int, dilation: int, batch_norm: bool, bias: bool, **factory: Any):
        super().__init__()
        self.conv = nn.Conv1d(c_in, c_out, kernel_size=fan_in, dilation=dilation, bias=bias, **factory)
        # Stored as the tree's (fan_in * c_in, c_out) matrix and seen as Conv1d's weight, so `slide` never copies it.
        stored = rearrange(self.conv.weight.detach(), "o c j -> (j c) o").contiguous()
        self.conv.weight = nn.Parameter(rearrange(stored, "(j c) o -> o c j", j=fan_in))
        self.register_module("norm", BatchNorm(c_out, **factory) if batch_norm else None)
        self.fan_in, self.dilation = fan_in, dilation

    def forward(self, x: Tensor, uses: Tensor | None = None) -> Tensor:
        """The definition: x `(batch, c_in, time)` to `(batch, c_out, time - (fan_in - 1) * dilation)`."""
        h = self.conv(x)
        return torch.tanh(h if self.norm is None else self.norm(h, uses))

    def operands(self) -> tuple[tuple[Tensor, ...], Tensor | None, BatchNorm | None, int]:
        """What `slide` needs: a `(c_in, c_out)` matrix for each tap, the bias, the batch norm, the dilation."""
        bias = None if self.conv.bias is None else self.conv.bias.view(-1)
        return self.conv.weight.permute(2, 1, 0).unbind(), bias, self.norm, self.dilation


def slide(
    x: Tensor,
    batch: int,
    taps: tuple[Tensor, ...],
    bias: Tensor | None,
    norm: BatchNorm | None,
    dilation: int,
    uses: Tensor | None = None,
) -> Tensor:
    """A `Level` as matrix products over shifted views; its `forward` defines it.

    x `(time * batch, c_in)`, nodes in time-major order, to `((time - (fan_in - 1) * dilation) * batch, c_out)`.
    Time-major, the nodes that tap j reads are x without its first `j * dilation` steps: one contiguous view, no copy.
    """
    step = dilation * batch
    rows = x.size(0) - (len(taps) - 1) * step
    h = x[:rows] @ taps[0] if bias is None else torch.addmm(bias, x[:rows], taps[0])
    for tap in range(1, len(taps)):
        h.addmm_(x[tap * step : tap * step + rows], taps[tap])
    return torch.tanh_(h if norm is None else norm.forward(h, uses))  # without nn.Module's own work at every call


class ConvWaveNet(nn.Module):
    """A stack of dilated causal convolutions that predicts the next token at every position at once.

    `conv(tokens)` runs it fast; `conv.forward_conv1d(tokens)` is the plain `nn.Conv1d` pass that defines it.
    Weights are drawn as the lecture draws them. Source: van den Oord et al. 2016, arXiv:1609.03499, section 2.1;
    README, "Tree to convolution".
    """

    def __init__(
        self, config: WaveNetConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ):
        super().__init__()
        if not isinstance(config, WaveNetConfig):
            raise ConfigError(f"config is {config!r}; pass a WaveNetConfig, such as WaveNetConfig(fan_ins=(2, 2, 2))")
        factory = {"device": device, "dtype": dtype}
        self.config, self.context, self.dilations = config, config.context, config.dilations
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd, **factory)
        widths = (config.n_embd, *config.n_hidden)
        self.levels = nn.ModuleList(
            Level(c_in, c_out, fan_in, dilation, config.batch_norm, config.bias, **factory)
            for c_in, c_out, fan_in, dilation in zip(widths, widths[1:], config.fan_ins, self.dilations)
        )
        self.head = nn.Conv1d(widths[-1], config.vocab_size, kernel_size=1, **factory)
        self._kept: _Kept | None = None
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
        training mode only: they keep the padding after shorter names out of the batch statistics. Under autocast, and
        where a convolution has hooks or a parametrization (weight norm), this is `forward_conv1d`.
        Raises `ShapeError` for other shapes and dtypes and for a sequence shorter than the context, `TokenError` for a
        token outside the vocabulary (on CUDA the check waits for the device; it is left out of a captured graph).
        """
        batch, time = self._checked_shape(tokens)
        operands = None if torch.is_autocast_enabled("cuda" if tokens.is_cuda else "cpu") else self._operands()
        if operands is None:
            return self.forward_conv1d(tokens, lengths).contiguous()
        table, levels, head_bias, head_weight = operands
        x = self._embed(tokens, table).flatten(0, 1)
        if self.training:
            for level, uses in zip(levels, self._uses(tokens, lengths)):
                x = slide(x, batch, *level, uses.reshape(-1, 1))
        else:
            for level in levels:
                x = slide(x, batch, *level)
        logits = torch.addmm(head_bias, x, head_weight)
        return logits.view(time - self.context + 1, batch, self.config.vocab_size).transpose(0, 1).contiguous()

    def forward_conv1d(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The definition of `forward`, and slower: every level as `nn.Conv1d` on `(batch, channel, time)`."""
        self._checked_shape(tokens)
        x = rearrange(self._embed(tokens, self.embedding.weight), "time batch channel -> batch channel time")
        for level, uses in zip(self.levels, self._uses(tokens, lengths)):
            x = level(x, rearrange(uses, "time batch -> batch 1 time") if self.training else None)
        return rearrange(self.head(x), "batch vocab time -> batch time vocab")

    def _operands(self) -> tuple[Tensor, list[tuple], Tensor, Tensor] | None:
        """The embedding, every level's operands, the head's bias and its `(c_in, vocab)` matrix: views of the weights.

        None where a convolution would compute something else than its weight and bias say. Making the views takes as
        long as the arithmetic on a short name, so without gradients they are kept for as long as they are views of this
        model's tensors: changes in place show through them, replaced tensors are seen.
        """
        keep = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        if keep and self._kept is not None and self._kept.current(self):
            return self._kept.value
        convs = [level.conv for level in self.levels] + [self.head]
        if any(type(conv) is not nn.Conv1d or conv._forward_pre_hooks or conv._forward_hooks for conv in convs):
            return None
        levels = [level.operands() for level in self.levels]
        views = self.embedding.weight.view_as(self.embedding.weight), levels, self.head.bias.view(-1)
        views += (self.head.weight.squeeze(2).t(),)
        if keep:
            try:
                self._kept = _Kept(self, views)
            except RuntimeError:  # tensors without memory of their own, as inside torch.func transforms
                self._kept = None
        return views

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_kept": None}

    def _checked_shape(self, tokens: Tensor) -> tuple[int, int]:
        if not isinstance(tokens, Tensor):
            raise ShapeError(f"tokens are a {type(tokens).__name__}; pass an int64 tensor, as Vocabulary.encode makes")
        if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ShapeError(f"tokens must be int64 (batch, time), not {tokens.dtype} of shape {tuple(tokens.shape)}")
        batch, time = tokens.shape
        if time < self.context:
            raise ShapeError(
                f"a sequence of {time} tokens is shorter than the context of {self.context}; "
                f"put {self.context} zeros before each name, as Vocabulary.encode does"
            )
        return batch, time

    def _embed(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """`(batch, time)` to `(time, batch, n_embd)`."""
        if tokens.device != weight.device:
            raise ShapeError(f"tokens are on {tokens.device} and the model on {weight.device}; move them with .to(...)")
        # The CPU's look-up checks every token itself; a CUDA one would end in a device assert.
        if tokens.is_cuda and not torch.cuda.is_current_stream_capturing():
            check_tokens(tokens, self.config.vocab_size)
        try:
            return F.embedding(tokens.t(), weight)
        except IndexError:
            check_tokens(tokens, self.config.vocab_size)
            raise

    def _uses(self, tokens: Tensor, lengths: Tensor | None) -> list[Tensor] | list[None]:
        """Per level `(time, batch)`: how many windows use each node (README: Training by sliding, exactly)."""
        if not self.training:
            return [None] * len(self.levels)
        batch, time = tokens.shape
        outputs = torch.arange(time - self.context + 1, device=tokens.device)[:, None]
        last = len(outputs) - 1 if lengths is None else torch.as_tensor(lengths, device=tokens.device)
        uses = [(outputs <= last).expand(-1, batch).to(self.embedding.weight.dtype)]
        for level in reversed(self.levels[1:]):
            above = uses[0]
            below = above.new_zeros(len(above) + (level.fan_in - 1) * level.dilation, batch)
            for tap in range(level.fan_in):
                below[tap * level.dilation :][: len(above)] += above
            uses.insert(0, below)
        return uses


class _Kept:
    """A value made of a module's tensors, good while every one of them is the same tensor in the same memory."""

    def __init__(self, module: nn.Module, value: Any):
        self.value = value
        tables = [table for part in module.modules() for table in (part._modules, part._parameters, part._buffers)]
        entries = [(table, name, member) for table in tables for name, member in table.items()]
        self.own = module._modules
        convs = [part for part in module.modules() if isinstance(part, nn.Conv1d)]
        self.hooks = [hooks for conv in convs for hooks in (conv._forward_pre_hooks, conv._forward_hooks)]
        self.tables, self.names, self.members = zip(*entries)
        self.tensors = [member for member in self.members if isinstance(member, Tensor)]
        self.memory, self.strides = list(map(Tensor.data_ptr, self.tensors)), list(map(Tensor.stride, self.tensors))

    def current(self, module: nn.Module) -> bool:
        return (
            self.own is module._modules
            and not any(self.hooks)
            and all(map(operator.is_, map(dict.get, self.tables, self.names), self.members))
            and list(map(Tensor.data_ptr, self.tensors)) == self.memory
            and list(map(Tensor.stride, self.tensors)) == self.strides
        )
