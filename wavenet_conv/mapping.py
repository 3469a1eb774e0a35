"""Tree -> ConvWaveNet, and batch norm folded into the convolutions.

A tree is read by its layers' class names and attributes, so the classes of anybody's notebook will do. Knows nothing of
`reference`, and nothing of names.

The one formula (README: Tree to convolution): `Linear.weight[j * C + c, o]` is `Conv1d.weight[o, c, j]`, and tap j
reads the node `j * dilation` to the right.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from .errors import MappingError
from .model import ConvWaveNet, WaveNetConfig

FLATTEN = ("FlattenConsecutive", "Flatten")
KNOWN = ("Embedding", *FLATTEN, "Linear", "BatchNorm1d", "Tanh")
GATED_HEAD = ("ReLU", "Linear", "ReLU", "Linear")


@dataclass
class _LevelSource:
    """The layers that become one level: `place` is the index of its Linear in the tree."""

    place: int
    linear: Any
    kernel_size: int
    norm: Any = None
    tanh: bool = False


def layers_of(tree: Any) -> Iterator[Any]:
    """The layers of a tree in order: of the lecture's `Sequential`, of `torch.nn.Sequential` or of a list, nested too.

    Anything else is one layer: a class of another name, or with a `forward` of its own, may do more than run them.
    """
    if isinstance(tree, nn.Module):
        runs_in_order = isinstance(tree, nn.ModuleList) or type(tree).forward is nn.Sequential.forward
        layers = tree if runs_in_order else None
    elif isinstance(tree, (list, tuple)):
        layers = tree
    else:
        layers = tree.layers if type(tree).__name__ == "Sequential" else None
    if layers is None:
        yield tree
    else:
        for layer in layers:
            yield from layers_of(layer)


def from_tree(tree: Any) -> ConvWaveNet:
    """The slid model with the weights of `tree`, in evaluation mode, on the tree's device and in its dtype.

    `tree` is the lecture's `Sequential` (or a list of its layers) or a `torch.nn.Sequential`: an `Embedding`, then per
    level `FlattenConsecutive` or `Flatten`, `Linear`, `BatchNorm1d` (or none in any level), `Tanh`, then a `Linear`.
    A level without a flatten has kernel size 1, a head without a bias gets one of zeros. A gated tree is an `Embedding`,
    `GatedBlock`s (attributes `n`, the kernel size, and the linear layers `linear`, `skip` and `residual`, None in the last),
    then `ReLU`, `Linear`, `ReLU`, `Linear`; `GatedLayer` says what it computes. Weights are copied: training one model
    never changes the other. In training mode the slid model normalises as the lecture does, by the unbiased variance,
    where torch's own batch norm takes the biased one.
    Raises `MappingError` naming the layer for anything else, and for batch-norm statistics kept per position, which
    sharing nodes rules out. Source: README, "Tree to convolution".
    """
    layers = list(layers_of(tree))
    _check_start(layers)
    if any(_kind(layer) == "GatedBlock" for layer in layers):
        return _from_gated(layers)
    embedding, levels, head = _parse(layers)
    table = embedding.weight
    _check_dtypes(enumerate(layers), table.dtype)
    widths = [_matrix(level.linear).shape[1] for level in levels]
    config = WaveNetConfig(
        vocab_size=table.shape[0],
        n_embd=table.shape[1],
        n_hidden=tuple(widths),
        kernel_sizes=tuple(level.kernel_size for level in levels),
        batch_norm=_all_or_none(levels, lambda level: level.norm is not None, "batch norm"),
        bias=_all_or_none(levels, lambda level: _bias(level.linear) is not None, "a bias"),
    )
    _check_logits(len(layers) - 1, head, config.vocab_size)
    conv = blank(config, table)
    with torch.no_grad():
        conv.embedding.weight.copy_(table)
        for level, source in zip(conv.layers, levels):
            _copy_linear(level.conv, source.linear)
            if config.batch_norm:
                _copy_batch_norm(level.norm, source.norm, source.place + 1)
        _copy_linear(conv.head, head)
    return conv


def _from_gated(layers: list[Any]) -> ConvWaveNet:
    """`from_tree` for the layers of a gated tree."""
    blocks = layers[1 : -len(GATED_HEAD)]
    for place, (layer, kind) in enumerate(zip(layers, ("Embedding", *["GatedBlock"] * len(blocks), *GATED_HEAD))):
        if _kind(layer) != kind:
            raise _refusal(place, layer, f"stands where a gated tree has its {kind}; {_GATED_ORDER}")
    table, hidden, head = layers[0].weight, layers[-3], layers[-1]
    channels = table.shape[1]
    gates = [_checked_gate(place, block, channels, block is blocks[-1]) for place, block in enumerate(blocks, start=1)]
    for place, linear in ((len(layers) - 3, hidden), (len(layers) - 1, head)):
        if _matrix(linear).shape[0] != channels:
            raise _refusal(place, linear, f"takes {_matrix(linear).shape[0]} inputs, but {channels} channels come in")
    if _matrix(hidden).shape[1] != channels:
        raise _refusal(len(layers) - 3, hidden, f"gives {_matrix(hidden).shape[1]} channels; it keeps {channels}")
    _check_logits(len(layers) - 1, head, len(table))
    parts = [
        (place, part)
        for place, layer in enumerate(layers)
        for part in ([layer.linear, layer.residual, layer.skip] if _kind(layer) == "GatedBlock" else [layer])
        if part is not None
    ]
    _check_dtypes(parts, table.dtype)
    config = WaveNetConfig(
        vocab_size=len(table),
        n_embd=channels,
        n_hidden=tuple(gates),
        kernel_sizes=tuple(block.n for block in blocks),
        gated=True,
    )
    conv = blank(config, table)
    with torch.no_grad():
        conv.embedding.weight.copy_(table)
        for level, block in zip(conv.layers, blocks):
            _copy_linear(level.conv, block.linear)
            _copy_linear(level.skip, block.skip)
            if level.residual is not None:
                _copy_linear(level.residual, block.residual)
        _copy_linear(conv.hidden, hidden)
        _copy_linear(conv.head, head)
    return conv


def blank(config: WaveNetConfig, like: Tensor) -> ConvWaveNet:
    """A model in evaluation mode, on the device and in the dtype of `like`, whose weights are all still to be copied.

    Built on the meta device, so that mapping a model draws no random numbers.
    """
    return ConvWaveNet(config, device="meta", dtype=like.dtype).to_empty(device=like.device).eval()


def _check_start(layers: list[Any]) -> None:
    """What holds for any tree: layers are instances, linear ones have weights, and an embedding comes first."""
    for place, layer in enumerate(layers):
        if isinstance(layer, type):
            raise MappingError(
                f"layer {place} is the class {layer.__name__}, not an instance; write {layer.__name__}(...)"
            )
        if _kind(layer) in ("Embedding", "Linear") and not isinstance(getattr(layer, "weight", None), Tensor):
            raise _refusal(place, layer, "has no weight tensor")
    if not layers or _kind(layers[0]) != "Embedding":
        first = f"it starts with {type(layers[0]).__name__}" if layers else "it has no layers"
        raise MappingError(f"a tree starts with an Embedding; {first}")
    if getattr(layers[0], "max_norm", None) is not None:
        raise _refusal(0, layers[0], "rescales its rows as it reads them (max_norm); build it without")


def _parse(layers: list[Any]) -> tuple[Any, list[_LevelSource], Any]:
    """The embedding, the levels and the head of a tree; raises `MappingError` where it is anything else."""
    levels: list[_LevelSource] = []
    channels, flatten = layers[0].weight.shape[1], None
    for place, layer in enumerate(layers[1:], start=1):
        kind = _kind(layer)
        open_level = levels[-1] if levels and not levels[-1].tanh else None
        if kind in FLATTEN and open_level is None and flatten is None:
            flatten = layer
            if kind == "Flatten" and (getattr(layer, "start_dim", 1), getattr(layer, "end_dim", -1)) != (1, -1):
                raise _refusal(place, layer, "flattens other axes than 1 to -1; use Flatten()")
        elif kind == "Linear" and open_level is None:
            rows = _matrix(layer).shape[0]
            # Flatten() does not say how many nodes it fuses; the Linear after it does.
            kernel_size = 1 if flatten is None else getattr(flatten, "n", rows // channels)
            if rows != kernel_size * channels:
                raise _refusal(place, layer, f"takes {rows} inputs, but {kernel_size} nodes of {channels} channels come in")
            levels.append(_LevelSource(place, layer, kernel_size))
            channels, flatten = _matrix(layer).shape[1], None
        elif kind == "BatchNorm1d" and open_level is not None and open_level.norm is None:
            open_level.norm = layer
        elif kind == "Tanh" and open_level is not None:
            open_level.tanh = True
        elif kind in KNOWN:
            raise _refusal(place, layer, f"does not belong after {type(layers[place - 1]).__name__}; {_ORDER}")
        else:
            raise _refusal(place, layer, f"is not a layer that the mapping knows ({', '.join(KNOWN)})")
    if len(levels) < 2 or levels[-1].tanh or levels[-1].norm is not None or levels[-1].kernel_size != 1:
        raise MappingError(f"the tree's end is not a head after at least one level; {_ORDER}")
    for level, above in zip(levels[:-1], levels[1:]):
        of_torch = isinstance(level.norm, nn.Module) and type(level.norm).forward is nn.BatchNorm1d.forward
        if of_torch and prod(other.kernel_size for other in levels[levels.index(above) :]) > 1:
            complaint = "normalises axis 1, which here is the position; use a batch norm over the last axis"
            raise _refusal(level.place + 1, level.norm, complaint)
    return layers[0], levels[:-1], levels[-1].linear


_ORDER = (
    "a tree is Embedding, then per level FlattenConsecutive, Linear, BatchNorm1d or none, Tanh, then one last Linear"
)
_GATED_ORDER = f"a gated tree is Embedding, GatedBlock a level, then {', '.join(GATED_HEAD)}"


def _checked_gate(place: int, block: Any, channels: int, last: bool) -> int:
    """The width of the block's gate; raises `MappingError` where its parts do not fit each other."""
    for name in ("n", "linear", "residual", "skip"):
        part = getattr(block, name, None)
        there = isinstance(part, int) if name == "n" else isinstance(getattr(part, "weight", None), Tensor)
        if name == "residual" and part is None and last:
            continue
        if not there:
            asked = "a whole number, its kernel size" if name == "n" else "a linear layer with a weight tensor"
            raise _refusal(place, block, f"has no {name} that is {asked}; only the last block's residual is None")
    if last and block.residual is not None:
        raise _refusal(place, block, "is the last block and has a residual, which nobody reads; set it to None")
    rows, columns = _matrix(block.linear).shape
    if rows != block.n * channels or columns % 2:
        complaint = f"has a linear of {rows} inputs and {columns} outputs; {block.n} nodes of {channels} channels come "
        raise _refusal(place, block, complaint + "in, and as many filters as gates go out")
    for name in ("residual", "skip"):
        shape = (columns // 2, channels) if getattr(block, name) is None else tuple(_matrix(getattr(block, name)).shape)
        if shape != (columns // 2, channels):
            complaint = f"has a {name} of {shape[0]} inputs and {shape[1]} outputs, where the gate has {columns // 2} "
            raise _refusal(place, block, complaint + f"and a node {channels} channels")
    return columns // 2


def _kind(layer: Any) -> str:
    """The class name that decides how a layer is read; a subclass of torch's BatchNorm1d is one too."""
    return "BatchNorm1d" if isinstance(layer, nn.BatchNorm1d) else type(layer).__name__


def _refusal(place: int, layer: Any, complaint: str) -> MappingError:
    return MappingError(f"layer {place} ({type(layer).__name__}) {complaint}")


def _matrix(linear: Any) -> Tensor:
    """A Linear's weight as (kernel_size, fan_out), which is the lecture's way round and not torch's."""
    return linear.weight.detach().t() if isinstance(linear, nn.Linear) else linear.weight.detach()


def _bias(linear: Any) -> Tensor | None:
    return getattr(linear, "bias", None)


def _copy_linear(target: nn.Conv1d, source: Any) -> None:
    """The one formula of this module; a source without a bias has one of zeros."""
    target.weight.copy_(rearrange(_matrix(source), "(j c) o -> o c j", j=target.kernel_size[0]))
    if target.bias is not None:
        target.bias.copy_(torch.zeros_like(target.bias) if _bias(source) is None else _bias(source))


def _check_logits(place: int, head: Any, vocab_size: int) -> None:
    if _matrix(head).shape[1] != vocab_size:
        raise MappingError(
            f"layer {place} (Linear) gives {_matrix(head).shape[1]} logits but the embedding has {vocab_size} tokens; "
            f"the head predicts one logit a token"
        )


def _check_dtypes(layers: Iterable[tuple[int, Any]], dtype: torch.dtype) -> None:
    for place, layer in layers:
        members = vars(layer) | (dict(layer.named_parameters()) if isinstance(layer, nn.Module) else {})
        for name in ("weight", "bias", "gamma", "beta", "running_mean", "running_var"):
            tensor = members.get(name)
            if isinstance(tensor, Tensor) and (tensor.dtype != dtype or not dtype.is_floating_point):
                raise _refusal(
                    place,
                    layer,
                    f"has a {name} of {tensor.dtype} and the embedding one of {dtype}; "
                    "bring the whole tree to one floating-point dtype",
                )


def _all_or_none(levels: list[_LevelSource], has: Any, what: str) -> bool:
    having = [has(level) for level in levels]
    if any(having) != all(having):
        place = levels[having.index(False)].place
        raise MappingError(
            f"layer {place} (Linear) has no {what.removeprefix('a ')} but other levels do; "
            f"give {what} to every level or to none"
        )
    return all(having)


def _copy_batch_norm(norm: nn.Module, source: Any, place: int) -> None:
    """Copies the lecture's (gamma, beta) or torch's (weight, bias) batch norm."""
    channels = len(norm.weight)
    for name in ("running_mean", "running_var", "eps"):
        if getattr(source, name, None) is None:
            raise _refusal(place, source, f"has no {name}; without running statistics its output depends on the batch")
    for name in ("running_mean", "running_var"):
        statistic = getattr(source, name)
        shape = tuple(statistic.shape)
        if shape[-1:] != (channels,):
            raise _refusal(place, source, f"has a {name} of shape {shape} for {channels} channels")
        if prod(shape) != channels:
            raise _refusal(
                place,
                source,
                f"has a {name} of shape {shape}: one statistic a position, so a node's value depends on where it "
                f"stands and two parents cannot share it; reduce over all axes but the last, (0, 1) for three axes, "
                f"so that the shape is (1, 1, {channels}), and train again or estimate the statistics anew",
            )
        getattr(norm, name).copy_(statistic.reshape(channels))
    for target, names in ((norm.weight, ("gamma", "weight")), (norm.bias, ("beta", "bias"))):
        name = next((name for name in names if hasattr(source, name)), None)
        if name is None:
            raise _refusal(place, source, f"has neither {names[0]} nor {names[1]}")
        value = getattr(source, name)  # None where torch's affine=False leaves scale and shift out
        if value is not None and value.numel() != channels:
            raise _refusal(place, source, f"has a {name} of shape {tuple(value.shape)} for {channels} channels")
        target.copy_(
            (torch.ones if target is norm.weight else torch.zeros)(channels) if value is None else value.view(-1)
        )
    norm.eps = source.eps
    if getattr(source, "momentum", None) is not None:
        norm.momentum = source.momentum
