"""Maps a tree of linear layers to the equal ConvWaveNet.

A tree is read by the class names and attributes of its modules, so the classes of any notebook will do.

There is one formula: `Linear.weight[j * C + c, o]` is `Conv1d.weight[o, c, j]`, where the lecture's `Linear.weight` is
`(in, out)` and `nn.Linear.weight` is its transpose. Tap j reads the node `j * dilation` to the right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from .config import WaveNetConfig
from .errors import MappingError
from .model import ConvWaveNet

FLATTEN = ("FlattenConsecutive", "Flatten")
GATED_HEAD = ("ReLU", "Linear", "ReLU", "Linear")

_ORDER = "a tree is Embedding, per layer FlattenConsecutive, Linear, BatchNorm1d or none, Tanh, then one last Linear"
_BLOCK = "linear, skip and residual are linear layers; the last block's residual, which nothing reads, is None"
_GATED_ORDER = f"a gated tree is Embedding, one GatedBlock per layer, then {', '.join(GATED_HEAD)}"


@dataclass
class _Parts:
    """The modules of one convolutional layer; `place` is the index of the Linear."""

    place: int
    linear: Any
    kernel_size: int
    norm: Any = None
    tanh: bool = False


def from_tree(tree: Any) -> ConvWaveNet:
    """Maps a tree to the convolutional model that computes the same logits.

    Weights are copied. A `Linear` without a flatten before it has kernel size 1, and a head without a bias gets one of
    zeros. In training mode the model normalises by the unbiased variance, as the lecture does, where `nn.BatchNorm1d`
    takes the biased one.

    Args:
        tree: The lecture's `Sequential`, a list of its modules, or a `torch.nn.Sequential`; any of them may be nested.
            It holds an `Embedding`, then per layer `FlattenConsecutive` or `Flatten`, `Linear`, `BatchNorm1d` (in all
            layers or in none) and `Tanh`, then a `Linear`. A gated tree holds an `Embedding`, one `GatedBlock` per
            layer, then `ReLU`, `Linear`, `ReLU`, `Linear`. A `GatedBlock` has `n`, its kernel size, and the linear
            modules `linear`, `skip` and `residual` (None in the last block); `GatedLayer` says what it computes.

    Returns:
        The model in evaluation mode, on the tree's device and in its dtype.

    Raises:
        MappingError: The tree holds something else, or batch-norm statistics per position; names the module.
    """
    modules = list(_flattened(tree))
    _check_start(modules)
    if any(_kind(module) == "GatedBlock" for module in modules):
        return _from_gated(modules)
    table = modules[0].weight
    layers, head = _parse(modules)
    _check_dtypes(modules)
    config = WaveNetConfig(
        vocab_size=table.shape[0],
        n_embd=table.shape[1],
        n_hidden=tuple(_matrix(parts.linear).shape[1] for parts in layers),
        kernel_sizes=tuple(parts.kernel_size for parts in layers),
        norm="batch" if _all_or_none(layers, lambda parts: parts.norm is not None, "batch norm") else "none",
        bias=_all_or_none(layers, lambda parts: getattr(parts.linear, "bias", None) is not None, "bias"),
    )
    _check_shape(len(modules) - 1, head, (len(_matrix(head)), len(table)), "the head, with one logit per token,")
    conv = blank(config, table)
    with torch.no_grad():
        conv.embedding.weight.copy_(table)
        for layer, parts in zip(conv.layers, layers):
            _copy_linear(layer.conv, parts.linear)
            if parts.norm is not None:
                _copy_batch_norm(layer.norm, parts.norm, parts.place + 1)
        _copy_linear(conv.head, head)
    return conv


def blank(config: WaveNetConfig, like: Tensor) -> ConvWaveNet:
    """A model in evaluation mode, on the device and in the dtype of `like`, whose weights are still to be copied."""
    # Built on the meta device, so that mapping draws no random numbers.
    return ConvWaveNet(config, device="meta", dtype=like.dtype).to_empty(device=like.device).eval()


def _flattened(tree: Any) -> Iterator[Any]:
    """The modules of a tree in order. A class of another name, or with its own `forward`, is one module."""
    if type(tree).__name__ == "Sequential" and not isinstance(tree, nn.Module):
        tree = tree.layers
    if isinstance(tree, (list, tuple, nn.ModuleList)) or getattr(type(tree), "forward", None) is nn.Sequential.forward:
        for module in tree:
            yield from _flattened(module)
    else:
        yield tree


def _check_start(modules: list[Any]) -> None:
    """Any tree has an embedding first, and weights in it and in linear modules."""
    if not modules or _kind(modules[0]) != "Embedding":
        first = type(modules[0]).__name__ if modules else "no layer"
        raise MappingError(f"a tree starts with an Embedding, not with {first}; {_ORDER}")
    for place, module in enumerate(modules):
        if _kind(module) in ("Embedding", "Linear") and not isinstance(getattr(module, "weight", None), Tensor):
            raise _error(place, module, "has no weight tensor")
    if getattr(modules[0], "max_norm", None) is not None:
        raise _error(0, modules[0], "rescales its rows when it reads them (max_norm); build it without")


def _parse(modules: list[Any]) -> tuple[list[_Parts], Any]:
    """The parts of each layer, and the head."""
    layers: list[_Parts] = []
    channels, flatten = modules[0].weight.shape[1], None
    for place, module in enumerate(modules[1:], start=1):
        kind = _kind(module)
        unfinished = layers[-1] if layers and not layers[-1].tanh else None
        if kind in FLATTEN and unfinished is None and flatten is None:
            flatten = module
        elif kind == "Linear" and unfinished is None:
            rows, columns = _matrix(module).shape
            # Flatten() does not say how many nodes it fuses; the Linear after it does.
            kernel_size = 1 if flatten is None else getattr(flatten, "n", rows // channels)
            if rows != kernel_size * channels:
                raise _error(place, module, f"takes {rows} inputs, but {kernel_size} * {channels} channels come in")
            layers.append(_Parts(place, module, kernel_size))
            channels, flatten = columns, None
        elif kind == "BatchNorm1d" and unfinished is not None and unfinished.norm is None:
            unfinished.norm = module
        elif kind == "Tanh" and unfinished is not None:
            unfinished.tanh = True
        else:
            raise _error(place, module, f"does not belong after {type(modules[place - 1]).__name__}; {_ORDER}")
    if len(layers) < 2 or layers[-1].tanh or layers[-1].norm is not None or layers[-1].kernel_size != 1:
        raise MappingError(f"the tree does not end with a head after at least one layer; {_ORDER}")
    return layers[:-1], layers[-1].linear


def _from_gated(modules: list[Any]) -> ConvWaveNet:
    """`from_tree` for the modules of a gated tree."""
    blocks = modules[1 : -len(GATED_HEAD)]
    for place, (module, kind) in enumerate(zip(modules, ("Embedding", *["GatedBlock"] * len(blocks), *GATED_HEAD))):
        if _kind(module) != kind:
            raise _error(place, module, f"stands where a gated tree has its {kind}; {_GATED_ORDER}")
    table, hidden, head = modules[0].weight, modules[-3], modules[-1]
    vocab_size, channels = table.shape
    gates = [_checked_gate(place, block, channels, block is blocks[-1]) for place, block in enumerate(blocks, start=1)]
    _check_shape(len(modules) - 3, hidden, (channels, channels), "the layer before the head")
    _check_shape(len(modules) - 1, head, (channels, vocab_size), "the head, with one logit per token,")
    _check_dtypes(modules)
    kernel_sizes = tuple(block.n for block in blocks)
    conv = blank(WaveNetConfig(vocab_size, channels, tuple(gates), kernel_sizes, gated=True), table)
    with torch.no_grad():
        conv.embedding.weight.copy_(table)
        for layer, block in zip(conv.layers, blocks):
            _copy_linear(layer.conv, block.linear)
            _copy_linear(layer.skip, block.skip)
            if layer.residual is not None:
                _copy_linear(layer.residual, block.residual)
        _copy_linear(conv.hidden, hidden)
        _copy_linear(conv.head, head)
    return conv


def _checked_gate(place: int, block: Any, channels: int, last: bool) -> int:
    """The width of a block's gate, once its linear modules are known to fit each other."""
    if not isinstance(getattr(block, "n", None), int):
        raise _error(place, block, "has no n that is an integer, its kernel size")
    for name in ("linear", "skip", "residual"):
        linear = isinstance(getattr(getattr(block, name, None), "weight", None), Tensor)
        if linear == (last and name == "residual"):
            raise _error(place, block, f"has a {name} that is wrong: {_BLOCK}")
    gate = _matrix(block.linear).shape[1] // 2
    shapes = {"linear": (block.n * channels, 2 * gate), "skip": (gate, channels), "residual": (gate, channels)}
    for name in shapes if not last else ("linear", "skip"):
        _check_shape(place, getattr(block, name), shapes[name], f"the {name} of this GatedBlock")
    return gate


def _kind(module: Any) -> str:
    """The class name that decides how a module is read; a subclass of `nn.BatchNorm1d` is one too."""
    return "BatchNorm1d" if isinstance(module, nn.BatchNorm1d) else type(module).__name__


def _error(place: int, module: Any, complaint: str) -> MappingError:
    return MappingError(f"layer {place} ({type(module).__name__}) {complaint}")


def _matrix(linear: Any) -> Tensor:
    """The weight of a linear module as the lecture's `(in, out)`; `nn.Linear` has the transpose."""
    return linear.weight.detach().t() if isinstance(linear, nn.Linear) else linear.weight.detach()


def _copy_linear(target: Any, source: Any) -> None:
    """The formula of this file; a source without a bias has one of zeros."""
    target.weight.copy_(rearrange(_matrix(source), "(j c) o -> o c j", j=target.kernel_size[0]))
    if target.bias is not None:
        bias = getattr(source, "bias", None)
        target.bias.copy_(torch.zeros_like(target.bias) if bias is None else bias)


def _check_shape(place: int, linear: Any, shape: tuple[int, int], role: str) -> None:
    if (found := tuple(_matrix(linear).shape)) != shape:
        raise _error(place, linear, f"has (inputs, outputs) of {found}; {role} needs {shape}")


def _check_dtypes(modules: list[Any]) -> None:
    dtype = modules[0].weight.dtype
    for place, module in enumerate(modules):
        for part in (module, *(getattr(module, name, None) for name in ("linear", "skip", "residual"))):
            for name in ("weight", "bias", "gamma", "beta", "running_mean", "running_var"):
                tensor = getattr(part, name, None)
                if isinstance(tensor, Tensor) and (tensor.dtype != dtype or not dtype.is_floating_point):
                    complaint = f"has a {name} of {tensor.dtype}; convert the whole tree to one floating-point dtype"
                    raise _error(place, part, complaint)


def _all_or_none(layers: list[_Parts], has: Callable[[_Parts], bool], what: str) -> bool:
    missing = [parts for parts in layers if not has(parts)]
    if missing and len(missing) < len(layers):
        raise _error(missing[0].place, missing[0].linear, f"has no {what}; give it to every layer or to none")
    return not missing


def _copy_batch_norm(norm: Any, source: Any, place: int) -> None:
    """Copies a batch norm of the lecture (gamma, beta) or of torch (weight, bias; None for affine=False)."""
    gamma, beta = ("gamma", "beta") if hasattr(source, "gamma") else ("weight", "bias")
    ours = {"running_mean": norm.running_mean, "running_var": norm.running_var, gamma: norm.weight, beta: norm.bias}
    for name in ("eps", *ours):
        affine = name in (gamma, beta) and hasattr(source, name)  # None then stands for 1 and 0
        if getattr(source, name, None) is None and not affine:
            raise _error(place, source, f"has no {name}; a batch norm has running statistics, eps, gamma and beta")
    for name, target in ours.items():
        value, channels = getattr(source, name), len(target)
        if value is None:
            value = torch.full_like(target, float(name == gamma))
        complaint = f"has a {name} of shape {tuple(value.shape)} for {channels} channels"
        if value.shape[-1:] != target.shape:
            raise _error(place, source, complaint)
        if value.numel() != channels:
            complaint += (
                ": one statistic per position, so two parents cannot share a node; reduce over all axes but the last, "
                f"(0, 1) for three axes, so that the shape is (1, 1, {channels}), and train again"
            )
            raise _error(place, source, complaint)
        target.copy_(value.reshape(channels))
    norm.eps = source.eps
    if getattr(source, "momentum", None) is not None:
        norm.momentum = source.momentum
