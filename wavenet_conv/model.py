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

    vocab_size: tokens, `.` included. n_embd: width of the embedding. n_hidden: width of every layer, or one width a
    layer. kernel_sizes: how many consecutive nodes each layer fuses, lowest first. batch_norm: after every layer's linear
    map (default: unless gated). bias: on every layer's linear map (default: where there is no batch norm, which has a
    shift of its own). gated: layers are the WaveNet paper's blocks (`GatedLayer`), n_embd wide outside and n_hidden
    inside the gate, with biases everywhere and no batch norm.
    Raises `ConfigError` naming the field that is wrong.
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
            raise ConfigError(f"kernel_sizes is {self.kernel_sizes!r}; a model needs at least one layer, such as (2, 2, 2)")
        widths = self.n_hidden if isinstance(self.n_hidden, Sequence) else (self.n_hidden,) * len(self.kernel_sizes)
        if len(widths) != len(self.kernel_sizes):
            raise ConfigError(f"n_hidden has {len(widths)} widths for {len(self.kernel_sizes)} layers; give one a layer")
        sizes = {"vocab_size": self.vocab_size, "n_embd": self.n_embd}
        sizes |= {f"kernel_sizes[{i}]": kernel_size for i, kernel_size in enumerate(self.kernel_sizes)}
        sizes |= {f"n_hidden[{i}]": width for i, width in enumerate(widths)}
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ConfigError(f"{name} is {size!r}; it must be an integer of at least 1")
        if self.gated and self.batch_norm:
            raise ConfigError("batch_norm is True and gated too; a gated layer has no batch norm, leave batch_norm out")
        if self.gated and self.bias is False:
            raise ConfigError("bias is False and gated is True; a gated layer has biases everywhere, leave bias out")
        object.__setattr__(self, "batch_norm", not self.gated if self.batch_norm is None else self.batch_norm)
        object.__setattr__(self, "kernel_sizes", tuple(self.kernel_sizes))
        object.__setattr__(self, "n_hidden", tuple(widths))
        object.__setattr__(self, "bias", not self.batch_norm if self.bias is None else self.bias)

    @property
    def context(self) -> int:
        """Tokens that one prediction sees."""
        return prod(self.kernel_sizes)

    @property
    def dilations(self) -> tuple[int, ...]:
        """Per layer, the tokens between two taps: the product of the kernel sizes below it."""
        return tuple(prod(self.kernel_sizes[:layer]) for layer in range(len(self.kernel_sizes)))


class BatchNorm(nn.Module):
    """Batch norm over axis 1 as the lecture writes it: unbiased variance, running statistics by momentum.

    In training every value counts as often as the tree's windows use its node (README: Training by sliding, exactly).
    """

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1, **factory: Any):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.over_ranks = False  # whether the batch is spread over the ranks of the default process group
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
        total = self._over_ranks(uses.sum())
        if total <= 1:
            raise ModeError(
                "batch norm in training got one single value a channel, which has no variance; "
                "train on more than one window at a time, or call .eval() first"
            )
        mean = self._over_ranks((uses * x).sum(axes, keepdim=True)) / total
        var = self._over_ranks((uses * (x - mean) ** 2).sum(axes, keepdim=True)) / (total - 1)
        with torch.no_grad():
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(var.flatten(), self.momentum)
        per_channel = [1, -1] + [1] * (x.ndim - 2)
        return (x - mean) / torch.sqrt(var + self.eps) * self.weight.view(per_channel) + self.bias.view(per_channel)

    def _over_ranks(self, part: Tensor) -> Tensor:
        """A sum over the batch, of which each rank of a `torch.distributed` group may have a part; differentiable."""
        if not self.over_ranks:
            return part
        from torch.distributed.nn.functional import all_reduce  # not in every build of PyTorch

        return all_reduce(part)


class Layer(nn.Module):
    """One fusion: `kernel_size` nodes, `dilation` apart, through a linear map, batch norm and tanh to one node."""

    def __init__(self, c_in: int, c_out: int, kernel_size: int, dilation: int, batch_norm: bool, bias: bool, **factory: Any):
        super().__init__()
        self.conv = _tree_conv(c_in, c_out, kernel_size, dilation, bias, **factory)
        self.register_module("norm", BatchNorm(c_out, **factory) if batch_norm else None)
        self.kernel_size, self.dilation = kernel_size, dilation

    def forward(self, x: Tensor, uses: Tensor | None = None) -> Tensor:
        """The definition: x `(batch, c_in, time)` to `(batch, c_out, time - (kernel_size - 1) * dilation)`."""
        h = self.conv(x)
        return torch.tanh(h if self.norm is None else self.norm(h, uses))

    def operands(self) -> tuple[tuple[Tensor, ...], Tensor | None, BatchNorm | None, int]:
        """What `slide` needs: a `(c_in, c_out)` matrix for each tap, the bias, the batch norm, the dilation."""
        bias = None if self.conv.bias is None else self.conv.bias.view(-1)
        return self.conv.weight.permute(2, 1, 0).unbind(), bias, self.norm, self.dilation

    def convs(self) -> list[nn.Conv1d]:
        """The layer's convolutions, in the order in which their weights are drawn."""
        return [self.conv]


class GatedLayer(nn.Module):
    """The WaveNet paper's block as a layer: a gated activation unit with a residual and a skip connection.

    A node (l, p) carries two values, both n_embd wide: h, which its parents read, and s, the skip sum so far. With f
    and g the first and the second half of what `conv` makes of its children's h, and r its rightmost child, the one at
    `p + (kernel_size - 1) * dilation`:

        z = tanh(f) * sigmoid(g)    h = residual(z) + h(r)    s = skip(z) + s(r)

    A token's h is its embedding and its s is 0. Adding up the skips along rightmost children, the s of an output counts
    one node of each layer: the right spine of its tree, the nodes that cover the last `span` tokens of its window. All
    of them are nodes of the tree anyway, and both values depend on the tokens that the node covers and on nothing else,
    so they slide, and are shared, as every other value is. The last layer has no `residual`: nobody would read its h.
    Source: van den Oord et al. 2016, arXiv:1609.03499, sections 2.3 and 2.4.
    """

    norm = None

    def __init__(self, channels: int, gate: int, kernel_size: int, dilation: int, last: bool, **factory: Any):
        super().__init__()
        self.conv = _tree_conv(channels, 2 * gate, kernel_size, dilation, True, **factory)
        self.register_module("residual", None if last else nn.Conv1d(gate, channels, 1, **factory))
        self.skip = nn.Conv1d(gate, channels, 1, **factory)
        self.kernel_size, self.dilation = kernel_size, dilation

    def forward(self, h: Tensor, s: Tensor) -> tuple[Tensor | None, Tensor]:
        """The definition: h and s `(batch, channels, time)` to those `time - (kernel_size - 1) * dilation` steps long.

        The h of the last layer is None.
        """
        f, g = self.conv(h).chunk(2, 1)
        z, reach = torch.tanh(f) * torch.sigmoid(g), (self.kernel_size - 1) * self.dilation
        h = None if self.residual is None else self.residual(z) + h[..., reach:]
        return h, self.skip(z) + s[..., reach:]

    def operands(self) -> tuple[tuple[Tensor, ...], Tensor, tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor], int]:
        """What `slide_gated` needs: matrices of the taps, bias, bias and matrix of residual and of skip, dilation."""
        residual = None if self.residual is None else _matrix(self.residual)
        bias = self.conv.bias.view(-1)
        return self.conv.weight.permute(2, 1, 0).unbind(), bias, residual, _matrix(self.skip), self.dilation

    def convs(self) -> list[nn.Conv1d]:
        """The layer's convolutions, in the order in which their weights are drawn."""
        return [self.conv, *([] if self.residual is None else [self.residual]), self.skip]


def _tree_conv(c_in: int, c_out: int, kernel_size: int, dilation: int, bias: bool, **factory: Any) -> nn.Conv1d:
    """A Conv1d that is stored as the tree's `(kernel_size * c_in, c_out)` matrix, so that no fast pass has to copy it."""
    conv = nn.Conv1d(c_in, c_out, kernel_size=kernel_size, dilation=dilation, bias=bias, **factory)
    stored = rearrange(conv.weight.detach(), "o c j -> (j c) o").contiguous()
    conv.weight = nn.Parameter(rearrange(stored, "(j c) o -> o c j", j=kernel_size))
    return conv


def _matrix(conv: nn.Conv1d) -> tuple[Tensor, Tensor]:
    """Bias and `(c_in, c_out)` matrix of a 1x1 convolution: views."""
    return conv.bias.view(-1), conv.weight.squeeze(2).t()


def slide(
    x: Tensor,
    batch: int,
    taps: tuple[Tensor, ...],
    bias: Tensor | None,
    norm: BatchNorm | None,
    dilation: int,
    uses: Tensor | None = None,
) -> Tensor:
    """A `Layer` as matrix products over shifted views; its `forward` defines it.

    x `(time * batch, c_in)`, nodes in time-major order, to `((time - (kernel_size - 1) * dilation) * batch, c_out)`.
    Time-major, the nodes that tap j reads are x without its first `j * dilation` steps: one contiguous view, no copy.
    """
    h = _convolve(x, dilation * batch, taps, bias)
    return torch.tanh_(h if norm is None else norm.forward(h, uses))  # without nn.Module's own work at every call


def slide_gated(
    x: Tensor,
    skips: Tensor | None,
    batch: int,
    outputs: int,
    taps: tuple[Tensor, ...],
    bias: Tensor,
    residual: tuple[Tensor, Tensor] | None,
    skip: tuple[Tensor, Tensor],
    dilation: int,
) -> tuple[Tensor | None, Tensor]:
    """A `GatedLayer` as matrix products over shifted views; its `forward` defines it.

    x: h as `slide` takes it. skips: the outputs' skip sums so far, `(outputs * batch, n_embd)`, or None; changed in
    place. The nodes on the outputs' right spines are a layer's last ones, so no other node's skip is computed.
    """
    f, g = _convolve(x, dilation * batch, taps, bias).chunk(2, 1)
    z = torch.tanh(f) * torch.sigmoid(g)
    own = torch.addmm(skip[0], z[z.size(0) - outputs * batch :], skip[1])
    skips = own if skips is None else skips.add_(own)
    if residual is None:
        return None, skips
    return torch.addmm(x[x.size(0) - z.size(0) :], z, residual[1]).add_(residual[0]), skips


def _convolve(x: Tensor, step: int, taps: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
    """A layer's linear map: x `(time * batch, c_in)`, taps `step` rows apart."""
    rows = x.size(0) - (len(taps) - 1) * step
    h = x[:rows] @ taps[0] if bias is None else torch.addmm(bias, x[:rows], taps[0])
    for tap in range(1, len(taps)):
        h.addmm_(x[tap * step : tap * step + rows], taps[tap])
    return h


class ConvWaveNet(nn.Module):
    """A stack of dilated causal convolutions that predicts the next token at every position at once.

    `conv(tokens)` runs it fast; `conv.forward_conv1d(tokens)` is the plain `nn.Conv1d` pass that defines it.
    Weights are drawn as the lecture draws them. The head of a gated model reads the skip sums and has a layer of its
    own, `hidden`: ReLU, `hidden`, ReLU, `head`; in other models `hidden` is None. Source: van den Oord et al. 2016,
    arXiv:1609.03499, section 2.1 and for gated models 2.3 and 2.4; README, "Tree to convolution".
    """

    def __init__(
        self, config: WaveNetConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ):
        super().__init__()
        if not isinstance(config, WaveNetConfig):
            raise ConfigError(f"config is {config!r}; pass a WaveNetConfig, such as WaveNetConfig(kernel_sizes=(2, 2, 2))")
        factory = {"device": device, "dtype": dtype}
        self.config, self.context, self.dilations = config, config.context, config.dilations
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd, **factory)
        widths = (config.n_embd, *config.n_hidden)
        shapes = list(zip(widths, widths[1:], config.kernel_sizes, self.dilations))
        if config.gated:
            last = [False] * (len(shapes) - 1) + [True]
            layers = [GatedLayer(config.n_embd, *shape[1:], top, **factory) for shape, top in zip(shapes, last)]
        else:
            layers = [Layer(*shape, config.batch_norm, config.bias, **factory) for shape in shapes]
        self.layers = nn.ModuleList(layers)
        width = config.n_embd if config.gated else widths[-1]
        self.register_module("hidden", nn.Conv1d(width, width, 1, **factory) if config.gated else None)
        self.head = nn.Conv1d(width, config.vocab_size, kernel_size=1, **factory)
        self._kept: _Kept | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The lecture's initialisation: normal weights over sqrt(fan-in), zero biases, a head ten times smaller."""
        self.embedding.weight.normal_()
        for conv in self._convs():
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
        table, layers, hidden, head_bias, head_weight = operands
        x, outputs = self._embed(tokens, table), time - self.context + 1
        if outputs == 1 and not self.training:
            x, spans = self._as_trees(x), (*self.dilations[1:], self.context)
            layers = [(*layer[:-1], self.context // span) for layer, span in zip(layers, spans)]
        else:
            x = x.flatten(0, 1)
        if self.config.gated:
            skips = None
            for layer in layers:
                x, skips = slide_gated(x, skips, batch, outputs, *layer)
            x = torch.relu_(torch.addmm(hidden[0], torch.relu_(skips), hidden[1]))
        elif self.training:
            for layer, uses in zip(layers, self._uses(tokens, lengths)):
                x = slide(x, batch, *layer, uses.reshape(-1, 1))
        else:
            for layer in layers:
                x = slide(x, batch, *layer)
        logits = torch.addmm(head_bias, x, head_weight)
        return logits.view(outputs, batch, self.config.vocab_size).transpose(0, 1).contiguous()

    def _as_trees(self, x: Tensor) -> Tensor:
        """One window a name in an order that spares all nodes which are not of its tree.

        x `(context, batch, n_embd)` to `(context * batch, n_embd)`. A layer's taps then read as many equal parts of its
        children, the first child of every parent, the second, and so on: the convolutional pass does that with the number of a
        layer's nodes for its dilation. To that end a position's digits, in the radix of the kernel sizes, are reversed.
        """
        kernel_sizes = self.config.kernel_sizes
        digits = range(len(kernel_sizes))
        return x.view(*reversed(kernel_sizes), *x.shape[1:]).permute(*reversed(digits), -2, -1).reshape(-1, x.size(2))

    def forward_conv1d(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The definition of `forward`, and slower: every layer as `nn.Conv1d` on `(batch, channel, time)`."""
        self._checked_shape(tokens)
        x = rearrange(self._embed(tokens, self.embedding.weight), "time batch channel -> batch channel time")
        if self.config.gated:
            skips = torch.zeros_like(x)
            for layer in self.layers:
                x, skips = layer(x, skips)
            x = torch.relu(self.hidden(torch.relu(skips)))
        else:
            for layer, uses in zip(self.layers, self._uses(tokens, lengths)):
                x = layer(x, rearrange(uses, "time batch -> batch 1 time") if self.training else None)
        return rearrange(self.head(x), "batch vocab time -> batch time vocab")

    def _convs(self) -> list[nn.Conv1d]:
        """Every convolution, in the order in which their weights are drawn."""
        inner = [conv for layer in self.layers for conv in layer.convs()]
        return [*inner, *([] if self.hidden is None else [self.hidden]), self.head]

    def _operands(self) -> tuple[Tensor, list[tuple], tuple[Tensor, Tensor] | None, Tensor, Tensor] | None:
        """The embedding, every layer's operands, bias and matrix of `hidden` and of the head: views of the weights.

        None where a convolution would compute something else than its weight and bias say. Making the views takes as
        long as the arithmetic on a short name, so without gradients they are kept for as long as they are views of this
        model's tensors: changes in place show through them, replaced tensors are seen.
        """
        keep = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        if keep and self._kept is not None and self._kept.current(self):
            return self._kept.value
        convs = self._convs()
        if any(type(conv) is not nn.Conv1d or conv._forward_pre_hooks or conv._forward_hooks for conv in convs):
            return None
        layers = [layer.operands() for layer in self.layers]
        hidden = None if self.hidden is None else _matrix(self.hidden)
        views = self.embedding.weight.view_as(self.embedding.weight), layers, hidden, *_matrix(self.head)
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
        """Per layer `(time, batch)`: how many windows use each node (README: Training by sliding, exactly)."""
        if not self.training:
            return [None] * len(self.layers)
        batch, time = tokens.shape
        outputs = torch.arange(time - self.context + 1, device=tokens.device)[:, None]
        last = len(outputs) - 1 if lengths is None else torch.as_tensor(lengths, device=tokens.device)
        uses = [(outputs <= last).expand(-1, batch).to(self.embedding.weight.dtype)]
        for layer in reversed(self.layers[1:]):
            above = uses[0]
            below = above.new_zeros(len(above) + (layer.kernel_size - 1) * layer.dilation, batch)
            for tap in range(layer.kernel_size):
                below[tap * layer.dilation :][: len(above)] += above
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
