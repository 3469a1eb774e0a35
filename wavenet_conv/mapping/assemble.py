"""From the steps that a trace has found to a `ConvWaveNet` with their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from einops import rearrange
from torch import Tensor

from ..config import WaveNetConfig
from ..errors import MappingError
from ..model import BatchNorm, ConvWaveNet
from .values import Activation, Gate, Linear, Norm, Skip, Stage, Table

Kind = TypeVar("Kind", bound=Stage)

GATED = (
    "the gates are not those of the WaveNet paper's block; each layer computes z = tanh(f) * sigmoid(g), "
    "h = residual(z) + h of the last child, s = skip(z) + s of the last child, and the head reads the last s through "
    "ReLU, linear, ReLU, linear, as in reference.GatedBlock"
)


@dataclass
class Parts:
    """What one layer of the model is made of; the head has no activation."""

    linear: Linear
    norm: Norm | None = None
    activation: str = "none"

    @property
    def norm_name(self) -> str:
        return "none" if self.norm is None else "layer" if self.norm.mean is None else "batch"


def assemble(last: Stage, like: Tensor) -> ConvWaveNet:
    """The model whose logits are the stage `last`, in evaluation mode, on the device and in the dtype of `like`."""
    return _gated(last, like) if _has_gate(last) else _plain(last, like)


def describe(conv: ConvWaveNet) -> str:
    """The layers of a model in one line."""
    c = conv.config
    layers = [f"embedding {c.vocab_size} x {c.n_embd}"]
    for size, width, norm, activation in zip(c.kernel_sizes, c.widths, c.norms, c.activations):
        parts = ["gate" if c.gated else activation] if c.gated or activation != "none" else []
        layers.append(
            ", ".join([f"linear of {size}, width {width}", *([f"{norm} norm"] if norm != "none" else []), *parts])
        )
    return "; ".join(
        [*layers, f"head of {c.head_kernel_size}" + (f", {c.head_norm} norm" if c.head_norm != "none" else "")]
    )


def _has_gate(stage: Stage) -> bool:
    while not isinstance(stage, (Gate, Table)):
        stage = stage.below
    return isinstance(stage, Gate)


def _plain(last: Stage, like: Tensor) -> ConvWaveNet:
    table, layers = _chain(last)
    head = layers.pop() if layers[-1].activation == "none" else Parts(_identity(last))
    if not layers:  # a model has at least one layer
        layers = [Parts(_identity(table))]
    biased = [parts.norm_name == "batch" and bool(parts.linear.bias.any()) for parts in layers]
    config = WaveNetConfig(
        vocab_size=len(table.weight),
        n_embd=table.channels,
        n_hidden=tuple(parts.linear.channels for parts in layers),
        kernel_sizes=tuple(len(parts.linear.taps) for parts in layers),
        norm=tuple(parts.norm_name for parts in layers),
        activation=tuple(parts.activation for parts in layers),
        bias=True if any(biased) else None,
        head_kernel_size=len(head.linear.taps),
        head_norm=head.norm_name,
    )
    conv = _blank(config, table, like)
    for layer, parts in zip(conv.layers, layers):
        _fill(layer.conv, parts.linear.taps, parts.linear.bias)
        _fill_norm(layer.norm, parts.norm)
    _fill(conv.head, head.linear.taps, head.linear.bias)
    _fill_norm(conv.head_norm, head.norm)
    return conv


def _chain(last: Stage) -> tuple[Table, list[Parts]]:
    """The embedding, and what stands above it, lowest first."""
    layers: list[Parts] = []
    stage = last
    while not isinstance(stage, Table):
        activation, norm, step = "none", None, stage
        if isinstance(step, Activation):
            activation, step = step.name, step.below
        if isinstance(step, Norm):
            norm, step = step, step.below
        linear = step if isinstance(step, Linear) else _identity(step)
        layers.insert(0, Parts(linear, norm, activation))
        stage = linear.below
    return stage, layers or [Parts(_identity(stage))]


def _identity(stage: Stage) -> Linear:
    eye = torch.eye(stage.channels).double()
    return Linear(*stage.sizes, stage, eye[None], torch.zeros(stage.channels).double())


def _gated(last: Stage, like: Tensor) -> ConvWaveNet:
    head = _expect(last, Linear)
    hidden = _expect(_under_relu(head), Linear)
    skips: list[Linear] = []
    s = _under_relu(hidden)
    while isinstance(s, Skip):
        skips.insert(0, _expect(s.below, Linear))
        s = s.old
    skips.insert(0, _expect(s, Linear))
    gates = [_expect(skip.below, Gate) for skip in skips]
    filters = [_expect(gate.below, Linear) for gate in gates]
    residuals, h = [], filters[0].below
    table = _expect(h, Table)
    for gate, f in zip(gates, filters[1:]):
        total = _expect(f.below, Skip)
        residuals.append(_expect(total.below, Linear))
        if residuals[-1].below is not gate or total.old is not h:
            raise MappingError(GATED)
        h = total
    sizes = tuple(len(f.taps) for f in filters)
    widths = tuple(len(gate.f_channels) for gate in gates)
    conv = _blank(WaveNetConfig(len(table.weight), table.channels, widths, sizes, gated=True), table, like)
    for layer, gate, f, skip, residual in zip(conv.layers, gates, filters, skips, [*residuals, None]):
        g = _expect(gate.g, Linear)
        if g.below is not f.below:
            raise MappingError(GATED)
        taps = torch.cat([f.taps[..., gate.f_channels], g.taps[..., gate.g_channels]], 2)
        _fill(layer.conv, taps, torch.cat([f.bias[gate.f_channels], g.bias[gate.g_channels]]))
        _fill(layer.skip, skip.taps, skip.bias)
        if residual is not None:
            _fill(layer.residual, residual.taps, residual.bias)
    _fill(conv.hidden, hidden.taps, hidden.bias)
    _fill(conv.head, head.taps, head.bias)
    return conv


def _expect(stage: Stage, kind: type[Kind]) -> Kind:
    if not isinstance(stage, kind):
        raise MappingError(GATED)
    return stage


def _under_relu(linear: Linear) -> Stage:
    relu = _expect(linear.below, Activation)
    if relu.name != "relu" or len(linear.taps) != 1:
        raise MappingError(GATED)
    return relu.below


def _blank(config: WaveNetConfig, table: Table, like: Tensor) -> ConvWaveNet:
    """A model in evaluation mode with this embedding; its other weights are still to be copied."""
    # Built on the meta device, so that mapping draws no random numbers.
    conv = ConvWaveNet(config, device="meta", dtype=like.dtype).to_empty(device=like.device).eval()
    conv.embedding.weight.data.copy_(table.weight)
    return conv


def _fill(conv: Any, taps: Tensor, bias: Tensor) -> None:
    """Copies a linear map; tap j is `Linear.weight[j * C : (j + 1) * C]`."""
    conv.weight.data.copy_(rearrange(taps, "j c o -> o c j"))
    if conv.bias is not None:
        conv.bias.data.copy_(bias)


def _fill_norm(norm: Any, source: Norm | None) -> None:
    if norm is None or source is None:
        return
    norm.weight.data.copy_(source.weight)
    norm.bias.data.copy_(source.bias)
    norm.eps = source.eps
    if isinstance(norm, BatchNorm) and source.mean is not None and source.var is not None:
        norm.running_mean.copy_(source.mean)
        norm.running_var.copy_(source.var)
        norm.momentum = source.momentum
