"""Converts a convolutional model to a tree, and a tree to one without batch norm."""

from __future__ import annotations

import copy
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from .layers import BatchNorm1d, Embedding, FlattenConsecutive, GatedBlock, Layer, LayerNorm, Linear, ReLU, Sequential
from .networks import ACTIVATIONS


def from_conv(conv: Any) -> Sequential:
    """The tree with the weights of a `ConvWaveNet`, copied bit for bit, in the same mode.

    `Conv1d.weight[o, c, j]` is `Linear.weight[j * C + c, o]`.
    """
    with torch.random.fork_rng(devices=[]):  # a new layer draws weights, which are replaced
        layers = [_filled(Embedding(*conv.embedding.weight.shape), weight=conv.embedding.weight)]
        for layer in conv.layers:
            if hasattr(layer, "skip"):
                layers.append(_block(layer))
            else:
                layers += [FlattenConsecutive(layer.kernel_size), _linear(layer.conv), *_norms(layer.norm)]
                layers += [ACTIVATIONS[layer.activation]()] if layer.activation != "none" else []
        layers += [] if conv.hidden is None else [ReLU(), _linear(conv.hidden), ReLU()]
        size = conv.head.kernel_size[0]
        layers += [*([FlattenConsecutive(size)] if size > 1 else []), _linear(conv.head), *_norms(conv.head_norm)]
        return Sequential(layers).requires_grad()


@torch.no_grad()
def fold_batch_norm(tree: Sequential) -> Sequential:
    """A new tree with the same logits in evaluation mode: each batch norm becomes part of the linear layer before."""
    layers: list[Any] = []
    for layer in copy.deepcopy(tree.layers):
        if isinstance(layer, BatchNorm1d):
            linear, mean, var = layers[-1], layer.running_mean.flatten(), layer.running_var.flatten()
            scale = layer.gamma / torch.sqrt(var + layer.eps)
            bias = torch.zeros_like(mean) if linear.bias is None else linear.bias
            _filled(linear, weight=linear.weight * scale, bias=layer.beta + (bias - mean) * scale)
        else:
            layers.append(layer)
    return Sequential(layers).requires_grad()


def _norms(norm: Any) -> list[Layer]:
    """The tree's norm in a list, or an empty list for None."""
    if norm is None:
        return []
    weights = dict(gamma=norm.weight, beta=norm.bias)
    if not hasattr(norm, "running_mean"):
        return [_filled(LayerNorm(len(norm.weight), eps=norm.eps), **weights)]
    copied = BatchNorm1d(len(norm.weight), eps=norm.eps, momentum=norm.momentum)
    copied.training = norm.training
    return [_filled(copied, **weights, running_mean=norm.running_mean, running_var=norm.running_var)]


def _block(layer: Any) -> GatedBlock:
    last = layer.residual is None
    block = GatedBlock(layer.kernel_size, layer.skip.out_channels, layer.skip.in_channels, last)
    block.linear, block.skip = _linear(layer.conv), _linear(layer.skip)
    block.residual = None if last else _linear(layer.residual)
    return block


def _linear(conv: Any) -> Linear:
    weight = rearrange(conv.weight, "o c j -> (j c) o")
    linear: Linear = _filled(Linear(weight.shape[0], weight.shape[1], bias=False), weight=weight)
    return linear if conv.bias is None else _filled(linear, bias=conv.bias)


def _filled(layer: Layer, **tensors: Tensor) -> Any:
    for name, tensor in tensors.items():
        # Contiguous, as in a new layer: products with a transposed matrix round differently.
        setattr(layer, name, tensor.detach().clone(memory_format=torch.contiguous_format))
    return layer
