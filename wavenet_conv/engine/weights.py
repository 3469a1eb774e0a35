"""The weights that every engine reads: matrices, with batch norm folded in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from ..errors import MappingError
from ..model import ConvWaveNet, GatedLayer, Layer, WaveNetConfig
from ..numbering import from_engine


class Affine(NamedTuple):
    """The map `x @ weight + bias`: weight `(c_in, c_out)`, bias `(c_out,)`."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class LayerWeights:
    """One layer. In a gated layer c_out holds f and g, side by side."""

    taps: Tensor  # (kernel_size, c_in, c_out), a matrix for each child
    bias: Tensor  # (c_out,)
    dilation: int  # positions between two taps
    residual: Affine | None = None  # (gate, channels), of a gated layer except the last one
    skip: Affine | None = None  # (gate, channels), of a gated layer


@dataclass(frozen=True)
class Weights:
    """A whole model in evaluation mode."""

    config: WaveNetConfig  # of the model before folding
    embedding: Tensor  # (vocab, n_embd)
    layers: tuple[LayerWeights, ...]  # lowest first
    hidden: Affine | None  # the map before the head of a gated model
    head: Affine  # (channels, vocab)

    def map(self, function: Callable[[Tensor], Tensor]) -> Weights:
        """The same model with `function` applied to every tensor."""

        def affine(pair: Affine | None) -> Affine | None:
            return None if pair is None else Affine(function(pair.weight), function(pair.bias))

        def mapped(layer: LayerWeights) -> LayerWeights:
            maps: dict[str, Any] = {"residual": affine(layer.residual), "skip": affine(layer.skip)}
            return replace(layer, taps=function(layer.taps), bias=function(layer.bias), **maps)

        embedding, layers = function(self.embedding), tuple(map(mapped, self.layers))
        head = Affine(function(self.head.weight), function(self.head.bias))
        return replace(self, embedding=embedding, layers=layers, hidden=affine(self.hidden), head=head)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Weights:
        """The same model on another device or in another dtype."""
        return self.map(lambda tensor: tensor.to(device=device, dtype=dtype))

    def end_first(self, end: int) -> Weights:
        """The same model with the end's token at 0 and the others in order, as `numbering.to_engine` numbers them."""
        if end == 0:
            return self
        order = from_engine(torch.arange(self.config.vocab_size, device=self.embedding.device), end)
        head = Affine(self.head.weight.index_select(1, order), self.head.bias[order])
        return replace(self, embedding=self.embedding[order], head=head)


@torch.no_grad()
def fold(conv: ConvWaveNet, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Weights:
    """Copies a model's weights, with batch norm in evaluation mode folded into the layers' linear maps.

    Batch norm is then an affine map per channel: `scale = gamma / sqrt(var + eps)` multiplies the weights, and the bias
    becomes `beta + (bias - mean) * scale`.

    The model may be in any mode, gated or not. `device` and `dtype` are those of the result and of the folding; by
    default the model's. Raises `MappingError` if `conv` is not a `ConvWaveNet`.
    """
    if not isinstance(conv, ConvWaveNet):
        raise MappingError(f"got a {type(conv).__name__}, not a ConvWaveNet; map a tree with from_tree first")
    if device is not None or dtype is not None:
        conv = copy.deepcopy(conv).to(device=device, dtype=dtype)
    return Weights(
        config=conv.config,
        embedding=conv.embedding.weight.detach().clone(),
        layers=tuple(_layer(layer) for layer in conv.layers),
        hidden=None if conv.hidden is None else _affine(conv.hidden),
        head=_affine(conv.head),
    )


def _layer(layer: nn.Module) -> LayerWeights:
    if isinstance(layer, GatedLayer):
        residual = None if layer.residual is None else _affine(layer.residual)
        weight, bias = layer.conv.weight.detach(), _bias(layer.conv)
        return LayerWeights(_taps(weight), bias, layer.dilation, residual, _affine(layer.skip))
    assert isinstance(layer, Layer)
    weight, bias, norm = layer.conv.weight.detach(), _bias(layer.conv), layer.norm
    if norm is not None:
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        weight, bias = weight * scale[:, None, None], norm.bias + (bias - norm.running_mean) * scale
    return LayerWeights(_taps(weight), bias, layer.dilation)


def _taps(weight: Tensor) -> Tensor:
    return rearrange(weight, "o c j -> j c o").clone(memory_format=torch.contiguous_format)


def _bias(conv: nn.Conv1d) -> Tensor:
    return conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach().clone()


def _affine(conv: nn.Conv1d) -> Affine:
    """Weight and bias of a 1x1 convolution."""
    return Affine(conv.weight.detach()[..., 0].t().clone(memory_format=torch.contiguous_format), _bias(conv))
