"""The weights that every engine reads: matrices, with batch norm folded in, and what is applied after them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import ACTIVATIONS, WaveNetConfig
from ..errors import ConfigError, MappingError
from ..model import BatchNorm, ConvWaveNet, GatedLayer, LayerNorm
from ..numbering import from_engine

KEYS = 2**62  # windows that a model may have, so that each is one integer
BYTE = 256  # tokens that it may have, so that each is one byte


class Affine(NamedTuple):
    """The map `x @ weight + bias`: weight `(c_in, c_out)`, bias `(c_out,)`."""

    weight: Tensor
    bias: Tensor


class NormWeights(NamedTuple):
    """Layer norm over the channels of one node: weight and bias `(channels,)`."""

    weight: Tensor
    bias: Tensor
    eps: float


@dataclass(frozen=True)
class LayerWeights:
    """One layer: a linear map, then layer norm or none, then an activation. In a gated layer c_out holds f and g."""

    taps: Tensor  # (kernel_size, c_in, c_out), a matrix for each child
    bias: Tensor  # (c_out,)
    dilation: int  # positions between two taps
    activation: str  # a key of `ACTIVATIONS`; of a gated layer, that of f
    norm: NormWeights | None = None
    residual: Affine | None = None  # (gate, channels), of a gated layer except the last one
    skip: Affine | None = None  # (gate, channels), of a gated layer

    def activate(self, summed: Tensor) -> Tensor:
        """Nodes `(n, c_out)` of a layer without a gate, from the results of its linear map, which are overwritten."""
        if self.norm is not None:
            summed = F.layer_norm(summed, self.norm.weight.shape, *self.norm)
        return torch.tanh_(summed) if self.activation == "tanh" else ACTIVATIONS[self.activation](summed)


@dataclass(frozen=True)
class Weights:
    """A whole model in evaluation mode.

    A head that merges nodes, or has layer norm, is the last of `layers`; `head` is then the identity.
    """

    config: WaveNetConfig  # of the model before folding
    embedding: Tensor  # (vocab, n_embd)
    layers: tuple[LayerWeights, ...]  # lowest first
    hidden: Affine | None  # the map before the head of a gated model
    head: Affine  # (channels, vocab)

    @property
    def kernel_sizes(self) -> tuple[int, ...]:
        """Of each of `layers`."""
        return tuple(len(layer.taps) for layer in self.layers)

    @property
    def only_tanh(self) -> bool:
        """Whether every layer is a linear map and tanh, or gated: what compiled loops know."""
        return all(layer.activation == "tanh" and layer.norm is None for layer in self.layers)

    def map(self, function: Callable[[Tensor], Tensor]) -> Weights:
        """The same model with `function` applied to every tensor."""

        def affine(pair: Affine | None) -> Affine | None:
            return None if pair is None else Affine(function(pair.weight), function(pair.bias))

        def mapped(layer: LayerWeights) -> LayerWeights:
            maps: dict[str, Any] = {"residual": affine(layer.residual), "skip": affine(layer.skip)}
            if layer.norm is not None:
                maps["norm"] = NormWeights(function(layer.norm.weight), function(layer.norm.bias), layer.norm.eps)
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

    The model may be of any kind and in any mode. `device` and `dtype` are those of the result and of the folding; by
    default the model's.

    Raises:
        MappingError: `conv` is not a `ConvWaveNet`.
        ConfigError: `device` is not there.
    """
    if not isinstance(conv, ConvWaveNet):
        raise MappingError(f"got a {type(conv).__name__}, not a ConvWaveNet; map a tree with from_tree first")
    if device is not None:
        device = checked_device(device)
    if device is not None or dtype is not None:
        conv = copy.deepcopy(conv).to(device=device, dtype=dtype)
    layers = [_layer(layer) for layer in conv.layers]
    top = _folded(conv.head, conv.head_norm, "none")
    if len(top.taps) > 1 or top.norm is not None:
        layers.append(top)
        head = Affine(torch.eye(len(top.bias)).to(top.bias), torch.zeros_like(top.bias))
    else:
        head = Affine(top.taps[0], top.bias)
    return Weights(
        config=conv.config,
        embedding=conv.embedding.weight.detach().clone(),
        layers=tuple(layers),
        hidden=None if conv.hidden is None else _affine(conv.hidden),
        head=head,
    )


def checked_device(device: torch.device | str) -> torch.device:
    """The device that an argument names; raises `ConfigError` if there is none."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device is {device!r}, which PyTorch does not know; name 'cpu' or 'cuda'") from error
    count = torch.cuda.device_count() if found.type == "cuda" else 1
    if count == 0:
        lack = f"PyTorch {torch.__version__} finds no CUDA device"
        raise ConfigError(f"device is '{found}': {lack}; leave device out, or install a PyTorch with CUDA")
    if found.type == "cuda" and (found.index or 0) >= count:
        raise ConfigError(f"device is '{found}': the last CUDA device here is 'cuda:{count - 1}'; name one of those")
    return found


def _layer(layer: Any) -> LayerWeights:
    if not isinstance(layer, GatedLayer):
        return _folded(layer.conv, layer.norm, layer.activation)
    residual = None if layer.residual is None else _affine(layer.residual)
    return replace(_folded(layer.conv, None, "tanh"), residual=residual, skip=_affine(layer.skip))


def _folded(conv: nn.Conv1d, norm: BatchNorm | LayerNorm | None, activation: str) -> LayerWeights:
    """A convolution and what follows it."""
    weight, bias, layer_norm = conv.weight.detach(), _bias(conv), None
    if isinstance(norm, BatchNorm):
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        weight, bias = weight * scale[:, None, None], norm.bias + (bias - norm.running_mean) * scale
    elif norm is not None:
        layer_norm = NormWeights(norm.weight.detach().clone(), norm.bias.detach().clone(), norm.eps)
    taps = rearrange(weight, "o c j -> j c o").clone(memory_format=torch.contiguous_format)
    return LayerWeights(taps, bias, conv.dilation[0], activation, layer_norm)


def _bias(conv: nn.Conv1d) -> Tensor:
    return conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach().clone()


def _affine(conv: nn.Conv1d) -> Affine:
    """Weight and bias of a 1x1 convolution."""
    return Affine(conv.weight.detach()[..., 0].t().clone(memory_format=torch.contiguous_format), _bias(conv))


def why_not_compiled(weights: Weights) -> str:
    """Why `compiled` cannot score with these weights; "" if it can."""
    numbers, kinds = weights.embedding, weights.config.vocab_size
    if numbers.device.type != "cpu" or numbers.dtype not in (torch.float32, torch.float64):
        return f"compiled loops run on the CPU in float32 or float64, not on {numbers.device} in {numbers.dtype}"
    if not weights.only_tanh or weights.hidden is not None:
        return "compiled loops know layers that are a linear map and tanh, and no others"
    if kinds > BYTE or kinds**weights.config.context >= KEYS:
        return (
            f"compiled loops know at most {BYTE} tokens and {KEYS:.1e} windows, not {kinds}**{weights.config.context}"
        )
    all_numbers = list[Tensor]()
    weights.map(lambda tensor: all_numbers.append(tensor.flatten()) or tensor)  # type: ignore[func-returns-value]
    if not torch.cat(all_numbers).isfinite().all():
        return "compiled loops need weights that are finite numbers"  # comparisons hide a NaN
    try:
        from . import jit  # noqa: F401
    except ImportError as error:  # Numba is missing, or does not support the NumPy that is installed
        return f"compiled loops need Numba ({error}); pip install 'wavenet-conv[fast]'"
    return ""
