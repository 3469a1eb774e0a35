"""Nodes and multiply-adds, counted while models run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wavenet_conv import WaveNetConfig
from wavenet_conv.engine import kernel, shared, tabulated

CompiledNodes: Any = None
with suppress(ImportError):  # Numba is not installed
    from wavenet_conv.engine.compiled import CompiledNodes
evaluate: Any = getattr(CompiledNodes, "evaluate", None)

ATEN = torch.ops.aten
PRODUCTS = {ATEN.mm, ATEN.addmm, ATEN.addmm_, ATEN.bmm, ATEN.baddbmm, ATEN.baddbmm_}


class Counting(TorchDispatchMode):
    """Inside the `with`, counts `nodes`, one number per layer, and `multiply_adds`, in any model and on any path.

    It watches PyTorch itself: hooks on modules would miss trees and matrix products. Each layer has one tanh, so each
    tanh that runs gives the nodes of the next layer.
    """

    def __init__(self, config: WaveNetConfig):
        super().__init__()
        self.widths, self.nodes, self.multiply_adds, self.calls = config.widths, [0] * len(config.widths), 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, operator = func(*args, **(kwargs or {})), func.overloadpacket
        if operator in (ATEN.tanh, ATEN.tanh_):
            layer = self.calls % len(self.widths)
            self.nodes[layer] += out.numel() // self.widths[layer]
            self.calls += 1
        elif operator in PRODUCTS:
            left, right = [argument for argument in args if isinstance(argument, Tensor)][-2:]
            self.multiply_adds += left.numel() * right.shape[-1]
        elif operator is ATEN.convolution:
            self.multiply_adds += out.numel() * args[1][0].numel()
        return out


@contextmanager
def counting(config: WaveNetConfig) -> Iterator[Counting]:
    """As `Counting`; of a `Scorer`, whose tiles are padded, the nodes that get ids, and the multiply-adds of those.

    Compiled loops evaluate a node once for each tap at which it is read. On a GPU no node gets an id, and tables are
    made before.
    """
    counted, evaluated, find_ids = Counting(config), [0] * len(config.widths), shared.ids_of_names
    in_tiles, in_kernel = tabulated.evaluate, kernel.last_layer
    by_tap = list[int]()  # evaluations in compiled loops

    def counting_ids(*args: Any, **options: Any) -> Any:
        layers, *rest = find_ids(*args, **options)
        for layer, children in enumerate(layers, start=options["tabulated"]):
            evaluated[layer] += len(children)
        return (layers, *rest)

    def counting_evaluations(model: Any, layer: int, tap: int, table: Any, children: Any, *rest: Any) -> None:
        by_tap.append(sum(keys.shape[1] for keys in children))
        evaluated[layer] += by_tap[-1]
        evaluate(model, layer, tap, table, children, *rest)

    def counting_tiles(nodes: Any, layer: int, readable: Any, children: Tensor, tile: int) -> Iterator[Tensor]:
        evaluated[layer] += len(children)
        return in_tiles(nodes, layer, readable, children, tile)

    def counting_kernel(contributions: Tensor, children: Tensor, *rest: Tensor) -> Tensor:
        evaluated[-1] += len(children)
        return in_kernel(contributions, children, *rest)

    with (
        counted,
        patch.object(tabulated, "evaluate", counting_tiles),
        patch.object(kernel, "last_layer", counting_kernel),
        patch.object(shared, "ids_of_names", counting_ids),
        patch.object(CompiledNodes, "evaluate", counting_evaluations) if CompiledNodes else nullcontext(),
    ):
        yield counted
    if any(evaluated):
        counted.nodes = evaluated
        counted.multiply_adds = shared_multiply_adds(config, evaluated, taps_apart=bool(by_tap))


def shared_multiply_adds(config: WaveNetConfig, nodes: Sequence[int], taps_apart: bool = False) -> int:
    """Multiply-adds for that many nodes per layer: each with every tap of its parents' layer, or one, or the head."""
    widths, above = config.widths, [*zip(config.kernel_sizes[1:], config.widths[1:]), (1, config.vocab_size)]
    size_of = lambda size: 1 if taps_apart else size
    return sum(count * width * size_of(size) * wide for count, width, (size, wide) in zip(nodes, widths, above))


def nodes_of(call: Callable[[], Any], config: WaveNetConfig) -> list[int]:
    """Nodes per layer that one call of a model with this config computes."""
    with counting(config) as counted:
        call()
    return counted.nodes


def outputs(names: Sequence[str]) -> int:
    """Positions of these names: one per character and one for each end."""
    return sum(map(len, names)) + len(names)
