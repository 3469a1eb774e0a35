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
    """Inside the `with`, counts the nodes that are computed, in `nodes`, one number a level.

    Watches PyTorch itself: every level has one tanh, so each tanh that runs, in whatever model and by whatever path,
    gives the nodes of the next level. Hooks on the modules would miss the fast pass, which never calls its levels, and
    trees, whose layers are plain objects. `widths` are the levels' channels, lowest first: a config's `n_hidden`.
    """

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        self.widths, self.nodes, self.calls = widths, [0] * len(widths), 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.tanh, torch.tanh_):
            level = self.calls % len(self.widths)
            self.nodes[level] += out.numel() // self.widths[level]
            self.calls += 1
        return out


def distinct_nodes(sequences: Sequence[Tensor], fan_ins: Sequence[int]) -> list[int]:
    """Per level, how many different nodes there are at all: nodes that cover the same tokens are the same.

    sequences: tokens `(batch, time)`, several of them. A node's identity is the tuple of its children's.
    """
    identities, counts, dilation = list(sequences), [], 1
    for fan_in in fan_ins:
        kinds = 1 + max(int(ids.max()) for ids in identities)
        parents = [ids[:, : ids.shape[1] - (fan_in - 1) * dilation] for ids in identities]
        for tap in range(1, fan_in):
            taps = [ids[:, tap * dilation :][:, : p.shape[1]] for ids, p in zip(identities, parents)]
            keys = [p * kinds + ids for p, ids in zip(parents, taps)]
            _, numbers = torch.cat([key.flatten() for key in keys]).unique(return_inverse=True)
            parents = [n.view_as(key) for n, key in zip(numbers.split([key.numel() for key in keys]), keys)]
        identities = parents
        counts.append(torch.cat([ids.flatten() for ids in identities]).unique().numel())
        dilation *= fan_in
    return counts


def multiply_adds(conv: ConvWaveNet, nodes: Sequence[int], positions: int) -> int:
    """Multiply-adds of the linear maps for that many nodes a level, and of the head at every position.

    In a gated model a position needs one skip a level, that of the node on its right spine, and the layer `hidden`.
    """
    of_nodes, of_outputs = [[level.conv] for level in conv.levels], [conv.head]
    if conv.config.gated:
        of_nodes = [level.convs()[:-1] for level in conv.levels]
        of_outputs += [conv.hidden, *(level.skip for level in conv.levels)]
    per_node = [sum(prod(part.weight.shape) for part in parts) for parts in of_nodes]
    return sum(map(mul, nodes, per_node)) + positions * sum(prod(part.weight.shape) for part in of_outputs)
