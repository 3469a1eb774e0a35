"""Nodes and multiply-adds, counted while models run, and what the counts come to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from wavenet_conv import ConvWaveNet, WaveNetConfig

TANH = (torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_)
PRODUCTS = {getattr(torch.ops.aten, name) for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")}


class CountingNodes(TorchFunctionMode):
    """Inside the `with`, counts the nodes that are computed: `nodes`, one number per layer.

    It watches PyTorch itself. Each layer has one tanh, so each tanh that runs, in any model and on any path, gives the
    nodes of the next layer. Hooks on modules would miss models that are not modules: trees and matrix products.
    """

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        self.widths, self.nodes, self.calls = widths, [0] * len(widths), 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in TANH:
            layer = self.calls % len(self.widths)
            self.nodes[layer] += out.numel() // self.widths[layer]
            self.calls += 1
        return out


class CountingProducts(TorchDispatchMode):
    """Inside the `with`, counts the multiply-adds of PyTorch's matrix products, in `multiply_adds`."""

    multiply_adds = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in PRODUCTS:
            left, right = [argument for argument in args if isinstance(argument, Tensor)][-2:]
            self.multiply_adds += left.numel() * right.shape[-1]
        return func(*args, **(kwargs or {}))


def nodes_of(call: Callable[[], Any], config: WaveNetConfig) -> list[int]:
    """Nodes per layer that one call of a model with this config computes."""
    with CountingNodes(config.widths) as counted:
        call()
    return counted.nodes


def outputs(names: Sequence[str]) -> int:
    """Positions of these names: one per character and one for each end."""
    return sum(map(len, names)) + len(names)


def distinct_nodes(names: Sequence[str], kernel_sizes: Sequence[int]) -> list[int]:
    """Different nodes per layer that these names have at all: nodes that cover the same characters are the same."""
    padded = ["." * prod(kernel_sizes) + name for name in names]
    spans = [prod(kernel_sizes[:layer]) for layer in range(1, len(kernel_sizes) + 1)]
    return [len({name[i : i + span] for name in padded for i in range(len(name) - span + 1)}) for span in spans]


def multiply_adds(conv: ConvWaveNet, nodes: Sequence[int], positions: int) -> int:
    """Multiply-adds of the linear maps for that many nodes per layer, and of the head at every position.

    In a gated model a position needs one skip per layer, of the node on its right spine, and the layer `hidden`.
    """
    total, of_outputs = 0, [conv.head, conv.hidden] + [getattr(layer, "skip", None) for layer in conv.layers]
    parts = [(count, (layer.conv, getattr(layer, "residual", None))) for count, layer in zip(nodes, conv.layers)]
    for count, maps in [*parts, (positions, tuple(of_outputs))]:
        total += count * sum(prod(linear.weight.shape) for linear in maps if linear is not None)
    return total


def shared_multiply_adds(config: WaveNetConfig, nodes: Sequence[int]) -> int:
    """Multiply-adds for that many distinct nodes per layer: each with every tap of its parents' layer, or the head."""
    widths, above = config.widths, [*zip(config.kernel_sizes[1:], config.widths[1:]), (1, config.vocab_size)]
    return sum(count * width * size * wide for count, width, (size, wide) in zip(nodes, widths, above))


def shared_bytes(config: WaveNetConfig, nodes: Sequence[int], names: Sequence[str]) -> int:
    """The fewest bytes that go through memory for that many distinct nodes per layer, in float32.

    Read per node: its children's contributions and ids; per output: a node id and a log-probability; per token: a byte
    of text. Written per node: its contributions, or on the last layer a log-probability; per name: a score. What
    finding ids moves is not counted, and every gathered row counts as read from memory though a cache may have it.
    """
    widths, sizes = config.widths, config.kernel_sizes
    above = [*(size * width for size, width in zip(sizes[1:], widths[1:])), 1]
    of_nodes = sum(n * (size * (4 * width + 8) + 4 * up) for n, size, width, up in zip(nodes, sizes, widths, above))
    return of_nodes + 13 * outputs(names) + (config.context - 1 + 4) * len(names)
