"""Slid model -> tree, read by attribute: knows nothing of `wavenet_conv`."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from .layers import BatchNorm1d, Embedding, FlattenConsecutive, GatedBlock, Layer, Linear, ReLU, Sequential, Tanh


def from_conv(conv: Any) -> Sequential:
    """The tree with the weights of a `ConvWaveNet`, copied bit for bit, in the mode that `conv` is in.

    The mapping read backwards: `Conv1d.weight[o, c, j]` is `Linear.weight[j * C + c, o]` (README: Tree to convolution).
    Raises `ValueError` for anything that is not one.
    """
    if not hasattr(conv, "layers"):
        raise ValueError(f"from_conv takes a ConvWaveNet, not a {type(conv).__name__}; from_tree goes the other way")
    with torch.random.fork_rng(devices=[]):  # a new layer draws weights, which are replaced at once
        return _tree(conv)


def _tree(conv: Any) -> Sequential:
    layers: list[Layer] = [_filled(Embedding(*conv.embedding.weight.shape), weight=conv.embedding.weight)]
    for level in conv.layers:
        if hasattr(level, "skip"):
            layers.append(_block(level))
            continue
        layers += [FlattenConsecutive(level.kernel_size), _linear(level.conv)]
        if level.norm is not None:
            norm = BatchNorm1d(len(level.norm.weight), eps=level.norm.eps, momentum=level.norm.momentum)
            norm.training = conv.training
            layers.append(
                _filled(
                    norm,
                    gamma=level.norm.weight,
                    beta=level.norm.bias,
                    running_mean=level.norm.running_mean,
                    running_var=level.norm.running_var,
                )
            )
        layers.append(Tanh())
    layers += [] if conv.hidden is None else [ReLU(), _linear(conv.hidden), ReLU()]
    tree = Sequential([*layers, _linear(conv.head)])
    for parameter in tree.parameters():
        parameter.requires_grad = True
    return tree


def _block(level: Any) -> GatedBlock:
    gate, channels, last = level.skip.in_channels, level.skip.out_channels, level.residual is None
    block = GatedBlock(level.kernel_size, channels, gate, last)
    block.linear, block.skip = _linear(level.conv), _linear(level.skip)
    block.residual = None if last else _linear(level.residual)
    return block


def _linear(conv: Any) -> Linear:
    weight = rearrange(conv.weight, "o c j -> (j c) o")
    linear = Linear(*weight.shape, bias=conv.bias is not None)
    return _filled(linear, weight=weight) if conv.bias is None else _filled(linear, weight=weight, bias=conv.bias)


def _filled(layer: Layer, **tensors: Tensor) -> Any:
    for name, tensor in tensors.items():
        # Laid out as in a new layer: products with a transposed matrix have other last bits.
        setattr(layer, name, tensor.detach().clone(memory_format=torch.contiguous_format))
    return layer
