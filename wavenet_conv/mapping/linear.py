"""Linear maps of neighbouring nodes, in all the operators that compute them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .pairs import combined
from .trace import RULES, Tracer, rule
from .values import WINDOWS, Linear, Tokens, Value, affine

OVERLAP = "reads positions that overlap or are no neighbours; a layer merges k neighbours, each of them once"


@rule("mm", "addmm", "bmm", "baddbmm")
def matmul(trace: Tracer, *args: Any, **options: Any) -> Value:
    """A value times a matrix of constants, on either side, with or without a bias."""
    bias, a, b = args if len(args) == 3 else (0.0, *args)
    if any(option != 1 for option in options.values()) or isinstance(bias, Value):
        return RULES["unknown"](trace, *args)
    if isinstance(a, Value) and isinstance(b, Value):
        return combined(trace, a, b)
    flipped = isinstance(b, Value)
    value, matrices = (b.map(lambda part: part.mT), a.mT) if flipped else (a, b)
    if matrices.ndim == 3 and varies(matrices):
        return trace.nothing("uses other weights at each position: a node must not depend on where it stands")
    leading = value.ids.shape[:-1] if value.stage else ()
    rows, matrix = value.map(lambda part: part.flatten(0, -2)), matrices[0] if matrices.ndim == 3 else matrices
    out = linear(trace, rows, matrix).map(lambda part: part.unflatten(0, leading))
    out = out.map(lambda part: part.mT) if flipped else out
    out = out.but(*(trace.noise[part] for part in (a, b) if isinstance(part, Tensor) and part in trace.noise))
    return out if out.stage is None else trace.then(out, "add", trace.number(bias))


@rule("convolution")
def convolution(
    trace: Tracer, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, *rest: Any
) -> Value:
    """`nn.Conv1d` without padding: rows of the positions that each output reads, times a matrix."""
    transposed, _, groups = rest
    if weight.ndim != 3 or transposed or groups != 1 or any(padding):
        return trace.nothing("pads with zeros, or is no plain nn.Conv1d; a layer merges k neighbours")
    starts = torch.arange(trace.shape[2])[:, None] * stride[0]
    reads = starts + torch.arange(weight.shape[2]) * dilation[0]
    rows = x.map(lambda part: part[:, :, reads].transpose(1, 2).flatten(2).flatten(0, 1))
    out = linear(trace, rows, weight.flatten(1).t()).map(lambda part: part.unflatten(0, (len(x.ids), -1)).mT)
    return out if bias is None or out.stage is None else trace.then(out, "add", trace.number(bias[:, None]))


def linear(trace: Tracer, value: Value, weight: Tensor, whole: bool = False) -> Value:
    """`value @ weight` for rows `(rows, inputs)` of nodes and a constant `(inputs, outputs)`: k neighbours per row.

    With `whole` the rows are all nodes of the next layer, even if they leave out some below.
    """
    if isinstance(value.stage, Linear):  # what comes after another step becomes part of this linear map
        value = trace.fold(value) or value
    stage = value.stage
    if isinstance(stage, Tokens):
        return RULES["unknown"](trace, value)
    window, position, channel = value.places()
    size = _kernel_size(position, stage.positions, whole)
    if not size:
        return trace.nothing(OVERLAP)
    above = stage.positions // size
    parent = (window * above + position // size)[:, 0]
    child = position - (parent % above * size)[:, None]
    if not torch.equal(window, (parent // above)[:, None].expand_as(window)):
        return trace.nothing("mixes the windows of different examples")
    if len(parent.unique()) != len(window) or child.min() < 0 or child.max() >= size:
        return trace.nothing(OVERLAP)
    places = child * stage.channels + channel
    if varies(places):
        return trace.nothing("reads other children, or in another order, at each position")
    scale, shift = affine(value.steps, value.ids.shape)
    weight = weight.detach().cpu().double()
    taps = weight.new_zeros(size * stage.channels, weight.shape[1])
    taps.index_add_(0, places[0], scale[0][:, None] * weight)
    found = trace.linear(stage, above, taps.unflatten(0, (size, stage.channels)), shift[0] @ weight)
    out = Value(found, parent[:, None] * weight.shape[1] + torch.arange(weight.shape[1]))
    if varies(scale) or varies(shift):
        return trace.per_position(out, value.steps, varies)
    return out


def _kernel_size(position: Tensor, positions: int, whole: bool) -> int:
    """How many neighbours each row reads: a block of its own, or its share of all positions; 0 if neither fits."""
    low, rows = position.amin(1), len(position) // WINDOWS
    size = int(position[0].amax() - low[0]) + 1
    blocks = not (low % size).any() and torch.equal(position.amax(1), low + size - 1) and not positions % size
    if blocks and not whole:
        return size
    return positions // rows if rows and positions % rows == 0 else 0


def varies(rows: Tensor) -> bool:
    """Whether rows differ from the first one."""
    return not torch.equal(rows, rows[:1].expand_as(rows))
