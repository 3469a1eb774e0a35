"""Operators of two values that both depend on the tokens: sums of linear maps, SiLU, and the paper's gated block."""

from __future__ import annotations

import torch

from .trace import Tracer
from .values import WINDOWS, Activation, Gate, Linear, Skip, Value


def combined(trace: Tracer, a: Value, b: Value) -> Value:
    """An operator of two values that depend on the tokens."""
    if torch.Tag.pointwise not in trace.func.tags:
        return trace.nothing("multiplies two values that both depend on the tokens (attention?)")
    known = [value.map(lambda part: part.expand(trace.shape)) for value in (a, b) if value.stage is not None]
    if len(known) == 1:  # the complaint about the other one is enough
        return known[0]
    found = None
    if trace.name in ("add", "sub"):
        if trace.name == "sub":
            known[1] = trace.then(known[1], "mul", -torch.ones(trace.shape).double())
        reason = "adds two values that both depend on the tokens (a residual or recurrent connection?)"
        found = both_linear(trace, *known) or skip(trace, *known) or skip(trace, *known[::-1])
    else:
        reason = "multiplies two values that both depend on the tokens (attention?)"
        if trace.name == "mul":
            found = gate(trace, *known) or gate(trace, *known[::-1])
    return found or trace.nothing(f"{reason}; of these the gated block of reference.GatedBlock is known")


def both_linear(trace: Tracer, a: Value, b: Value) -> Value | None:
    """The sum of two linear maps of the same layer, such as of the left and the right children."""
    folds = [trace.fold(value) for value in (a, b)]
    stages = [fold.stage for fold in folds if fold is not None and isinstance(fold.stage, Linear)]
    if len(stages) < 2 or stages[0].below is not stages[1].below or stages[0].channels != stages[1].channels:
        return None
    below, channels, bias = stages[0].below, stages[0].channels, stages[0].bias + stages[1].bias
    if stages[0].positions == stages[1].positions and torch.equal(a.ids, b.ids):
        return Value(trace.linear(below, stages[0].positions, stages[0].taps + stages[1].taps, bias), a.ids)
    above = a.ids.numel() // (WINDOWS * channels)
    size = below.positions // max(above, 1)
    taps, nodes = bias.new_zeros(size, below.channels, channels), []
    for stage, value in zip(stages, (a, b)):
        window, position, channel = value.places()
        first = position * len(stage.taps)
        child = int(first.flatten()[0] % size)
        if size * above != below.positions or (first % size != child).any() or child + len(stage.taps) > size:
            return None
        taps[child : child + len(stage.taps)] += stage.taps
        nodes.append((window * above + first // size) * channels + channel)
    return Value(trace.linear(below, above, taps, bias), nodes[0]) if torch.equal(*nodes) else None


def skip(trace: Tracer, new: Value, old: Value) -> Value | None:
    """A linear map of a gate, plus the rightmost child."""
    top, child = trace.fold(new), trace.fold(old)
    if not top or not child or not isinstance(top.stage, Linear) or not isinstance(top.stage.below, Gate):
        return None
    size = child.stage.positions // top.stage.positions
    window, position, channel = top.places()
    if not torch.equal(child.places(), torch.stack([window, position * size + size - 1, channel])):
        return None
    return Value(trace.stage(Skip, *top.stage.sizes, top.stage, child.stage), top.ids)


def gate(trace: Tracer, x: Value, sigmoid: Value) -> Value | None:
    """`x * sigmoid(x)`, which is SiLU, or `tanh(f) * sigmoid(g)`."""
    if not (isinstance(sigmoid.stage, Activation) and sigmoid.stage.name == "sigmoid" and not sigmoid.steps):
        return None
    fold, below, (window, position, channel) = trace.fold(x), sigmoid.stage.below, sigmoid.places()
    if fold and fold.stage is below and torch.equal(x.ids, sigmoid.ids):
        return Value(trace.stage(Activation, *below.sizes, below, "silu"), x.ids)
    is_tanh = isinstance(x.stage, Activation) and x.stage.name == "tanh" and not x.steps
    if not is_tanh or not torch.equal(x.places()[:2], sigmoid.places()[:2]):
        return None
    pairs, ids = torch.stack([x.places()[2], channel], -1).flatten(0, -2).unique(dim=0, return_inverse=True)
    stage = Gate(below.positions, len(pairs), x.stage.below, below, *pairs.unbind(1))
    return Value(stage, (window * below.positions + position) * len(pairs) + ids.view(window.shape))
