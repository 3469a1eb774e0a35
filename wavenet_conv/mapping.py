"""Tree -> ConvWaveNet, and batch norm folded into the convolutions.

A tree is read by its layers' class names and attributes, so the classes of anybody's notebook will do. Knows nothing of
`reference`, and nothing of names.

The one formula (README: Tree to convolution): `Linear.weight[j * C + c, o]` is `Conv1d.weight[o, c, j]`, and tap j
reads the node `j * dilation` to the right.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from .errors import MappingError
from .model import ConvWaveNet, WaveNetConfig

FLATTEN = ("FlattenConsecutive", "Flatten")
KNOWN = ("Embedding", *FLATTEN, "Linear", "BatchNorm1d", "Tanh")


@dataclass
class _LevelSource:
    """The layers that become one level: `place` is the index of its Linear in the tree."""

    place: int
    linear: Any
    fan_in: int
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
    A level without a flatten has fan-in 1, a head without a bias gets one of zeros. Weights are copied: training one
    model never changes the other. In training mode the slid model normalises as the lecture does, by the unbiased
    variance, where torch's own batch norm takes the biased one.
    Raises `MappingError` naming the layer for anything else, and for batch-norm statistics kept per position, which
    sharing nodes rules out. Source: README, "Tree to convolution".
    """
    layers = list(layers_of(tree))
    embedding, levels, head = _parse(layers)
    table = embedding.weight
    _check_dtypes(layers, table.dtype)
    widths = [_matrix(level.linear).shape[1] for level in levels]
    config = WaveNetConfig(
        vocab_size=table.shape[0],
        n_embd=table.shape[1],
        n_hidden=tuple(widths),
        fan_ins=tuple(level.fan_in for level in levels),
        batch_norm=_all_or_none(levels, lambda level: level.norm is not None, "batch norm"),
        bias=_all_or_none(levels, lambda level: _bias(level.linear) is not None, "a bias"),
    )
    if _matrix(head).shape[1] != config.vocab_size:
        raise MappingError(
            f"layer {len(layers) - 1} (Linear) gives {_matrix(head).shape[1]} logits but the embedding has "
            f"{config.vocab_size} tokens; the head predicts one logit a token"
        )
    conv = _blank(config, table)
    with torch.no_grad():
        conv.embedding.weight.copy_(table)
        for level, source in zip(conv.levels, levels):
            level.conv.weight.copy_(rearrange(_matrix(source.linear), "(j c) o -> o c j", j=source.fan_in))
            if config.bias:
                level.conv.bias.copy_(_bias(source.linear))
            if config.batch_norm:
                _copy_batch_norm(level.norm, source.norm, source.place + 1)
        conv.head.weight.copy_(rearrange(_matrix(head), "c o -> o c 1"))
        conv.head.bias.copy_(torch.zeros_like(conv.head.bias) if _bias(head) is None else _bias(head))
    return conv


def fold_batch_norm(conv: ConvWaveNet) -> ConvWaveNet:
    """The same model with batch norm inside the convolutions, in evaluation mode; `conv` is left as it is.

    With `scale = gamma / sqrt(var + eps)` the weights become `weight * scale` and the bias
    `beta + (bias - mean) * scale`. Logits agree to rounding, with one operator less a level.
    """
    if not isinstance(conv, ConvWaveNet):
        raise MappingError(
            f"fold_batch_norm takes a ConvWaveNet, not a {type(conv).__name__}; map a tree with from_tree"
        )
    config = replace(conv.config, batch_norm=False, bias=True) if conv.config.batch_norm else conv.config
    folded = _blank(config, conv.embedding.weight)
    with torch.no_grad():
        folded.embedding.load_state_dict(conv.embedding.state_dict())
        folded.head.load_state_dict(conv.head.state_dict())
        for target, source in zip(folded.levels, conv.levels):
            if source.norm is None:
                target.load_state_dict(source.state_dict())
                continue
            norm = source.norm
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            before = 0 if source.conv.bias is None else source.conv.bias
            target.conv.weight.copy_(source.conv.weight * scale[:, None, None])
            target.conv.bias.copy_(norm.bias + (before - norm.running_mean) * scale)
    return folded


def _blank(config: WaveNetConfig, like: Tensor) -> ConvWaveNet:
    """A model in evaluation mode, on the device and in the dtype of `like`, whose weights are all still to be copied.

    Built on the meta device, so that mapping a model draws no random numbers.
    """
    return ConvWaveNet(config, device="meta", dtype=like.dtype).to_empty(device=like.device).eval()


def _parse(layers: list[Any]) -> tuple[Any, list[_LevelSource], Any]:
    """The embedding, the levels and the head of a tree; raises `MappingError` where it is anything else."""
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
            fan_in = 1 if flatten is None else getattr(flatten, "n", rows // channels)
            if rows != fan_in * channels:
                raise _refusal(place, layer, f"takes {rows} inputs, but {fan_in} nodes of {channels} channels come in")
            levels.append(_LevelSource(place, layer, fan_in))
            channels, flatten = _matrix(layer).shape[1], None
        elif kind == "BatchNorm1d" and open_level is not None and open_level.norm is None:
            open_level.norm = layer
        elif kind == "Tanh" and open_level is not None:
            open_level.tanh = True
        elif kind in KNOWN:
            raise _refusal(place, layer, f"does not belong after {type(layers[place - 1]).__name__}; {_ORDER}")
        else:
            raise _refusal(place, layer, f"is not a layer that the mapping knows ({', '.join(KNOWN)})")
    if len(levels) < 2 or levels[-1].tanh or levels[-1].norm is not None or levels[-1].fan_in != 1:
        raise MappingError(f"the tree's end is not a head after at least one level; {_ORDER}")
    for level, above in zip(levels[:-1], levels[1:]):
        of_torch = isinstance(level.norm, nn.Module) and type(level.norm).forward is nn.BatchNorm1d.forward
        if of_torch and prod(other.fan_in for other in levels[levels.index(above) :]) > 1:
            complaint = "normalises axis 1, which here is the position; use a batch norm over the last axis"
            raise _refusal(level.place + 1, level.norm, complaint)
    return layers[0], levels[:-1], levels[-1].linear


_ORDER = (
    "a tree is Embedding, then per level FlattenConsecutive, Linear, BatchNorm1d or none, Tanh, then one last Linear"
)


def _kind(layer: Any) -> str:
    """The class name that decides how a layer is read; a subclass of torch's BatchNorm1d is one too."""
    return "BatchNorm1d" if isinstance(layer, nn.BatchNorm1d) else type(layer).__name__


def _refusal(place: int, layer: Any, complaint: str) -> MappingError:
    return MappingError(f"layer {place} ({type(layer).__name__}) {complaint}")


def _matrix(linear: Any) -> Tensor:
    """A Linear's weight as (fan_in, fan_out), which is the lecture's way round and not torch's."""
    return linear.weight.detach().t() if isinstance(linear, nn.Linear) else linear.weight.detach()


def _bias(linear: Any) -> Tensor | None:
    return getattr(linear, "bias", None)


def _check_dtypes(layers: list[Any], dtype: torch.dtype) -> None:
    for place, layer in enumerate(layers):
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
