"""Nodes: counted while models run, and how many different ones there are at all."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from operator import mul
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from wavenet_conv import ConvWaveNet


class CountingNodes(TorchFunctionMode):
    """Inside the `with`, counts the nodes that are computed, in `nodes`, one number a layer.

    Watches PyTorch itself: every layer has one tanh, so each tanh that runs, in whatever model and by whatever path,
    gives the nodes of the next layer. Hooks on the modules would miss the fast pass, which never calls its layers, and
    trees, whose layers are plain objects. `widths` are the layers' channels, lowest first: a config's `n_hidden`.
    """

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        self.widths, self.nodes, self.calls = widths, [0] * len(widths), 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.tanh, torch.tanh_):
            layer = self.calls % len(self.widths)
            self.nodes[layer] += out.numel() // self.widths[layer]
            self.calls += 1
        return out


def distinct_nodes(sequences: Sequence[Tensor], kernel_sizes: Sequence[int]) -> list[int]:
    """Per layer, how many different nodes there are at all: nodes that cover the same tokens are the same.

    sequences: tokens `(batch, time)`, several of them. A node's identity is the tuple of its children's.
    """
    identities, counts, dilation = list(sequences), [], 1
    for kernel_size in kernel_sizes:
        kinds = 1 + max(int(ids.max()) for ids in identities)
        parents = [ids[:, : ids.shape[1] - (kernel_size - 1) * dilation] for ids in identities]
        for tap in range(1, kernel_size):
            taps = [ids[:, tap * dilation :][:, : p.shape[1]] for ids, p in zip(identities, parents)]
            keys = [p * kinds + ids for p, ids in zip(parents, taps)]
            _, numbers = torch.cat([key.flatten() for key in keys]).unique(return_inverse=True)
            parents = [n.view_as(key) for n, key in zip(numbers.split([key.numel() for key in keys]), keys)]
        identities = parents
        counts.append(torch.cat([ids.flatten() for ids in identities]).unique().numel())
        dilation *= kernel_size
    return counts


def multiply_adds(conv: ConvWaveNet, nodes: Sequence[int], positions: int) -> int:
    """Multiply-adds of the linear maps for that many nodes a layer, and of the head at every position.

    In a gated model a position needs one skip a layer, that of the node on its right spine, and the layer `hidden`.
    """
    of_nodes, of_outputs = [[layer.conv] for layer in conv.layers], [conv.head]
    if conv.config.gated:
        of_nodes = [layer.convs()[:-1] for layer in conv.layers]
        of_outputs += [conv.hidden, *(layer.skip for layer in conv.layers)]
    per_node = [sum(prod(part.weight.shape) for part in parts) for parts in of_nodes]
    return sum(map(mul, nodes, per_node)) + positions * sum(prod(part.weight.shape) for part in of_outputs)
