"""What each operator does with a value: one function per kind of operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .trace import MOVES, PER_POSITION, RULES, STATISTICS, Tracer, rule
from .values import WINDOWS, Activation, Gate, Linear, Norm, Skip, Stage, Table, Tokens, Value, same_stage

OVERLAP = "reads positions that overlap or are no neighbours; a layer merges k neighbours, each of them once"
REDUCTIONS = ("mean", "sum", "var", "std", "var_mean", "std_mean", "amax", "amin", "max", "min", "prod", "logsumexp")
BATCH_NORMS = ("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training")
BATCH_NORMS += ("cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_no_update", "_batch_norm_with_update")


@rule(*MOVES)
def moved(trace: Tracer, *args: Any, **kwargs: Any) -> Value | list[Value]:
    """Applies an operator that only moves elements to the parts of a value."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    values = [leaf for leaf in leaves if isinstance(leaf, Value)]
    alike = same_stage(values)
    if alike is None:
        return trace.nothing("joins values of different layers; a layer merges the values of one layer below")
    if trace.name == "_to_copy":
        return alike[0]
    view = trace.name in ("view", "_unsafe_view", "_reshape_alias")
    function = torch.reshape if view else trace.func

    def part(name: str) -> Any:
        tensors = iter(alike)
        swapped = [
            next(tensors)[name] if isinstance(leaf, Value) else leaf.cpu() if isinstance(leaf, Tensor) else leaf
            for leaf in leaves
        ]
        positional, named = pytree.tree_unflatten(swapped, spec)
        return function(*positional[: 2 if view else None], **named)

    parts = {name: part(name) for name in alike[0].parts}
    if isinstance(parts["ids"], Tensor):
        return replace(alike[0], parts=parts)
    return [replace(alike[0], parts=dict(zip(parts, split))) for split in zip(*parts.values())]


@rule("unknown")
def unknown(trace: Tracer, *args: Any, **kwargs: Any) -> Value:
    """An operator without a rule."""
    value = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Value) and leaf.stage)
    if isinstance(value.stage, Tokens):
        return trace.nothing("computes with the numbers of the tokens; look up rows of an embedding instead")
    if torch.Tag.pointwise in trace.func.tags and value["ids"].shape == trace.shape:
        return trace.complaint(value, "is none of the functions of one number that a layer can have")
    if "softmax" in trace.name:
        return trace.nothing("normalizes over channels or positions; return the logits themselves, without attention")
    if trace.name in REDUCTIONS:
        return trace.nothing(f"is a statistic {_mixed(value, *args[1:], **kwargs)}")
    return trace.nothing("has no equal among the operators of a tree")


def _mixed(value: Value, dim: Any = None, *_: Any, **kwargs: Any) -> str:
    """What a reduction mixes."""
    dim = kwargs.get("dim", dim)
    axes = dim if isinstance(dim, (int, list, tuple)) and not isinstance(dim, bool) and dim != [] else None
    windows, positions, _ = value.places()
    lows, highs = (
        [f(part, dim=axes if axes is not None else ()) for part in (windows, positions)]
        for f in (torch.amin, torch.amax)
    )
    if not torch.equal(lows[0], highs[0]):
        return "of the batch, so that a prediction depends on other examples; put the model into evaluation mode"
    if not torch.equal(lows[1], highs[1]):
        return "over positions; a layer mixes positions by a linear map of k neighbours only"
    return "over channels; of these nn.LayerNorm is known"


# Tables


@rule("embedding")
def embedding(trace: Tracer, weight: Any, tokens: Any, *_: Any, **__: Any) -> Value:
    if isinstance(weight, Value) or not isinstance(tokens.stage, Tokens):
        return trace.nothing("looks up something else than the rows of a table of constants by the tokens")
    if weight.ndim != 2:
        return trace.nothing(f"looks up a table of shape {tuple(weight.shape)}; an embedding is (vocab, channels)")
    channels = weight.shape[1]
    key = (Table, weight.data_ptr(), tuple(weight.shape), weight.stride())
    stage = trace.memo.setdefault(key, Table(tokens.stage.positions, channels, weight.detach()))
    return Value.of(stage, tokens["ids"][..., None] * channels + torch.arange(channels))


@rule("index")
def index(trace: Tracer, source: Any, indices: Any) -> Any:
    if isinstance(source, Tensor) and len(indices) == 1:
        return embedding(trace, source, indices[0])
    return moved(trace, source, indices) if isinstance(source, Value) else unknown(trace, source, indices)


@rule("index_select")
def index_select(trace: Tracer, source: Any, dim: int, chosen: Any) -> Any:
    if isinstance(source, Tensor) and dim == 0:
        return embedding(trace, source, chosen)
    return moved(trace, source, dim, chosen) if isinstance(source, Value) else unknown(trace, source, chosen)


@rule("scatter")
def one_hot(trace: Tracer, zeros: Any, dim: int, tokens: Any, source: Any, **_: Any) -> Value:
    """As `torch.nn.functional.one_hot` does it."""
    if isinstance(zeros, Value) or source != 1 or zeros.any() or dim not in (-1, zeros.ndim - 1):
        return unknown(trace, zeros, tokens, source)
    return embedding(trace, torch.eye(zeros.shape[-1]), tokens.map(lambda part: part.squeeze(-1)))


@rule("embedding_renorm")
def embedding_renorm(trace: Tracer, *_: Any) -> Value:
    return trace.nothing("rescales the rows of the embedding as it reads them (max_norm); build it without")


# Arithmetic with constants and between values


def widened(trace: Tracer, value: Value) -> Value:
    return value.map(lambda part: part.expand(trace.shape))


def affine(trace: Tracer, value: Value, constant: Any, function: Callable[[Value, Tensor], Value]) -> Value:
    """An operator of a value and a constant."""
    if isinstance(value.stage, Tokens):
        return unknown(trace, value)
    value = widened(trace, value)
    if isinstance(constant, Tensor) and constant in trace.noise:
        return value.but(trace.noise[constant])
    return function(value, trace.number(constant))


def over_root(trace: Tracer, value: Value, constant: Any, power: float) -> Value | None:
    """The value divided by a constant that is known to be a root, `(var + eps) ** power` of it."""
    root = trace.roots.get(constant) if isinstance(constant, Tensor) else None
    if root is None or root[2] != power or constant in trace.noise or isinstance(value.stage, Tokens):
        return None
    return widened(trace, value).over_root(trace.number(root[0]), root[1])


@rule("add")
def add(trace: Tracer, a: Any, b: Any, *, alpha: float = 1) -> Value:
    if isinstance(a, Value) and isinstance(b, Value):
        return sum_of(trace, a, b, alpha)
    if isinstance(a, Value):
        return affine(trace, a, b, lambda value, c: value.plus(alpha * c))
    return affine(trace, b, a, lambda value, c: value.times(alpha).plus(c))


@rule("sub")
def sub(trace: Tracer, a: Any, b: Any, *, alpha: float = 1) -> Value:
    if isinstance(a, Value) and isinstance(b, Value):
        return sum_of(trace, a, b, -alpha)
    if isinstance(a, Value):
        return affine(trace, a, b, lambda value, c: value.minus(alpha * c))
    return affine(trace, b, a, lambda value, c: value.times(-alpha).plus(c))


@rule("rsub")
def rsub(trace: Tracer, a: Any, b: Any, alpha: float = 1) -> Value:
    return sub(trace, b, a, alpha=alpha)


@rule("neg")
def neg(trace: Tracer, value: Value) -> Value:
    return affine(trace, value, -1.0, Value.times)


@rule("mul")
def mul(trace: Tracer, a: Any, b: Any) -> Value:
    if isinstance(a, Value) and isinstance(b, Value):
        return product(trace, a, b)
    value, constant = (a, b) if isinstance(a, Value) else (b, a)
    return over_root(trace, value, constant, -0.5) or affine(trace, value, constant, Value.times)


@rule("div", "true_divide")
def div(trace: Tracer, a: Any, b: Any, *, rounding_mode: str | None = None) -> Value:
    if not isinstance(a, Value) or rounding_mode is not None:
        return unknown(trace, a, b)
    if isinstance(b, Value):
        return product(trace, a, b)
    return over_root(trace, a, b, 0.5) or affine(trace, a, b, lambda value, c: value.times(1 / c))


def sum_of(trace: Tracer, a: Value, b: Value, factor: float) -> Value:
    """`a + factor * b`: two linear maps of one layer, or the paper's residual and skip connections."""
    known = [widened(trace, value) for value in (a, b) if value.stage is not None]
    if len(known) == 1:
        return known[0]
    a, b = known[0], known[1].times(torch.tensor(float(factor)))
    folds = [trace.fold(value) for value in (a, b)]
    if folds[0] is not None and folds[1] is not None:
        f, g = folds[0].stage, folds[1].stage
        alike = isinstance(f, Linear) and isinstance(g, Linear) and f.below is g.below and f.taps.shape == g.taps.shape
        if alike and torch.equal(a["ids"], b["ids"]):
            stage = Linear(f.positions, f.channels, f.below, f.taps + g.taps, f.bias + g.bias)
            return Value.of(stage, a["ids"])
        for new, old in (folds, folds[::-1]):
            if is_rightmost_child(new, old) and reads_gate(new.stage):
                return Value.of(trace.step(Skip, new.stage, old.stage), new["ids"])
    return trace.nothing(
        "adds two values that both depend on the tokens (a residual or recurrent connection); of these the gated block "
        "of the WaveNet paper is known, as in reference.GatedBlock"
    )


def is_rightmost_child(new: Value, old: Value) -> bool:
    """Whether the elements of `old` are those of the last child of each node in `new`."""
    size, rest = divmod(old.stage.positions, new.stage.positions)
    (window, position, channel), (old_window, old_position, old_channel) = new.places(), old.places()
    same = torch.equal(window, old_window) and torch.equal(channel, old_channel) and old.is_whole()
    return same and not rest and torch.equal(old_position, position * size + size - 1)


def reads_gate(stage: Stage | None) -> bool:
    return isinstance(stage, Linear) and isinstance(stage.below, Gate)


def product(trace: Tracer, f: Value, g: Value) -> Value:
    """`f * g`: x * sigmoid(x), or tanh(f) * sigmoid(g)."""
    known = [widened(trace, value) for value in (f, g) if value.stage is not None]
    if len(known) == 1:
        return known[0]
    for x, gate in (known, known[::-1]):
        if isinstance(gate.stage, Activation) and gate.stage.name == "sigmoid" and gate.is_whole():
            if isinstance(x.stage, Activation) and x.stage.name == "tanh" and x.is_whole() and trace.name == "mul":
                return gated(trace, x, gate)
            linear = trace.fold(x)
            if linear and linear.stage is gate.stage.below and torch.equal(x["ids"], gate["ids"]):
                return Value.of(trace.step(Activation, gate.stage.below, "silu"), x["ids"])
    return trace.nothing("combines two values that both depend on the tokens (attention?)")


def gated(trace: Tracer, f: Value, g: Value) -> Value:
    (window, position, f_channel), (g_window, g_position, g_channel) = f.places(), g.places()
    pairs, ids = torch.stack([f_channel.flatten(), g_channel.flatten()], 1).unique(dim=0, return_inverse=True)
    assert isinstance(f.stage, Activation) and isinstance(g.stage, Activation)
    if not (torch.equal(window, g_window) and torch.equal(position, g_position)):
        return trace.nothing("multiplies tanh and sigmoid of different positions")
    positions = f.stage.positions
    stage = Gate(positions, len(pairs), f.stage.below, g.stage.below, *pairs.unbind(1))
    return Value.of(stage, (window * positions + position) * len(pairs) + ids.view(window.shape))


# Functions of one number


def activation(trace: Tracer, value: Value, name: str) -> Value:
    if isinstance(value.stage, Tokens):
        return unknown(trace, value)
    value = trace.settle(value)
    assert value.stage is not None
    return Value.of(trace.step(Activation, value.stage, name), value["ids"], value.complaints)


for _name in ("tanh", "relu", "silu", "sigmoid"):
    RULES[_name] = partial(activation, name=_name)


@rule("gelu")
def gelu(trace: Tracer, value: Value, *, approximate: str = "none") -> Value:
    return activation(trace, value, "gelu") if approximate == "none" else unknown(trace, value)


@rule("clamp_min")
def clamp_min(trace: Tracer, value: Value, least: Any) -> Value:
    return activation(trace, value, "relu") if least == 0 else unknown(trace, value)


@rule("clamp")
def clamp(trace: Tracer, value: Value, min: Any = None, max: Any = None) -> Value:
    return clamp_min(trace, value, min) if max is None else unknown(trace, value)


# Linear maps


def contracted(trace: Tracer, value: Value, weight: Tensor) -> Value:
    """`value @ weight` for rows `(rows, inputs)` of a value, and a constant `(inputs, outputs)`."""
    value = trace.fold(value) or value
    if value.stage is None or isinstance(value.stage, Tokens):
        return unknown(trace, value)
    uses_statistics, value, stage = "var" in value.parts, value.collapsed(), value.stage
    window, position, channel = value.places()
    positions, left = divmod(len(window), WINDOWS)
    size, rest = divmod(stage.positions, max(positions, 1))
    parent = position // max(size, 1)
    if not torch.equal(window, window[:, :1].expand_as(window)):
        return trace.nothing("mixes the windows of different examples")
    rows = (window * positions + parent)[:, 0]
    one_parent = torch.equal(parent, parent[:, :1].expand_as(parent))
    if left or rest or not one_parent or len(rows.unique()) != len(rows) or not positions:
        return trace.nothing(OVERLAP)
    places = (position % size) * stage.channels + channel
    if not torch.equal(places, places[:1].expand_as(places)):
        return trace.nothing("reads the children in another order at each position")
    same = all(torch.equal(value[name], value[name][:1].expand_as(places)) for name in ("scale", "shift"))
    weight = weight.detach().cpu().double()
    taps = weight.new_zeros(size * stage.channels, weight.shape[1])
    taps.index_add_(0, places[0], value["scale"][0][:, None] * weight)
    bias = value["shift"][0] @ weight
    out = Linear(positions, weight.shape[1], stage, taps.unflatten(0, (size, stage.channels)), bias)
    found = Value.of(out, rows[:, None] * weight.shape[1] + torch.arange(weight.shape[1]))
    return found if same else trace.complaint(found, STATISTICS if uses_statistics else PER_POSITION)


@rule("mm")
def mm(trace: Tracer, a: Any, b: Any) -> Value:
    if isinstance(a, Value) and isinstance(b, Value):
        return product(trace, a, b)
    if isinstance(a, Value):
        return contracted(trace, a, b)
    return contracted(trace, b.map(torch.t), a.t()).map(torch.t)


@rule("addmm", "baddbmm")
def addmm(trace: Tracer, bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Value:
    out = (mm if trace.name == "addmm" else bmm)(trace, a, b)
    if out.stage is None or isinstance(bias, Value):
        return out if out.stage is None else sum_of(trace, out.times(torch.tensor(float(alpha))), bias, beta)
    return out.times(torch.tensor(float(alpha))).plus(trace.number(bias) * beta)


@rule("bmm")
def bmm(trace: Tracer, a: Any, b: Any) -> Value:
    if isinstance(a, Value) and isinstance(b, Value):
        return product(trace, a, b)
    if isinstance(b, Value):
        return bmm(trace, b.map(lambda part: part.mT), a.mT).map(lambda part: part.mT)
    if not torch.equal(b, b[:1].expand_as(b)):
        return trace.nothing("uses weights that differ per position: a node must not depend on where it stands")
    out = contracted(trace, a.map(lambda part: part.flatten(0, 1)), b[0])
    return out.map(lambda part: part.unflatten(0, (len(b), -1)))


@rule("convolution")
def convolution(
    trace: Tracer,
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Value:
    if weight.ndim != 3 or transposed or groups != 1 or any(padding):
        return trace.nothing("pads with zeros, or is no plain convolution of one axis; a layer merges k neighbours")
    starts = torch.arange(trace.shape[2]) * stride[0]
    reads = starts[:, None] + torch.arange(weight.shape[2]) * dilation[0]
    rows = x.map(lambda part: part[:, :, reads].permute(0, 2, 1, 3).flatten(2).flatten(0, 1))
    out = contracted(trace, rows, weight.flatten(1).t())
    out = out.map(lambda part: part.unflatten(0, (len(x["ids"]), -1)).mT)
    return out if bias is None or out.stage is None else out.plus(trace.number(bias[:, None]))


# Norms


@rule(*BATCH_NORMS)
def batch_norm(trace: Tracer, x: Any, *args: Any, **kwargs: Any) -> Value:
    names = [argument.name for argument in trace.func._schema.arguments[1:]]
    given = dict(zip(names, args)) | kwargs
    if given.get("training", given.get("train", False)) or given.get("running_mean") is None:
        return trace.complaint(
            x, "normalizes by statistics of the batch, so that a prediction depends on other examples"
        )

    def numbers(name: str, default: float) -> Tensor:
        constant = given.get(name)
        constant = torch.full((x["ids"].shape[1],), default) if constant is None else constant
        return trace.number(constant.view(-1, *[1] * (x["ids"].ndim - 2)))

    statistics = {"mean": numbers("running_mean", 0), "var": numbers("running_var", 1)}
    value = x.collapsed().with_parts(**statistics, gamma=numbers("weight", 1), beta=numbers("bias", 0))
    eps = given.get("eps", given.get("epsilon", 1e-5))
    return replace(value, eps=eps, momentum=given.get("momentum", given.get("exponential_average_factor", 0.1)))


@rule("native_layer_norm")
def layer_norm(trace: Tracer, x: Any, shape: Any, weight: Any, bias: Any, eps: float) -> Value:
    inputs = prod(shape)
    rows = x.map(lambda part: part.reshape(-1, inputs))
    below = trace.fold(rows) or rows
    in_order = torch.equal(below["ids"].flatten(), torch.arange(below["ids"].numel()))
    if not (below.is_whole() and below.stage.channels == inputs and in_order):
        below = contracted(trace, rows, torch.eye(inputs))
    if below.stage is None:
        return below
    ones = torch.ones(inputs).double()
    weight, bias = (
        default if given is None else given.detach().cpu().double().flatten()
        for given, default in ((weight, ones), (bias, torch.zeros_like(ones)))
    )
    stage = Norm(below.stage.positions, inputs, below.stage, weight, bias, eps)
    return Value.of(stage, below["ids"].view(x["ids"].shape), below.complaints)


def logits_of(trace: Tracer, value: Value | None) -> Value:
    """The value that a model returns, as a stage of one position with one channel per token."""
    if value is None:
        return Value(None, {}, complaints=("the logits do not depend on the tokens",))
    trace.name = "return"
    if value.stage is None or isinstance(value.stage, Tokens):
        return value if value.stage is None else trace.nothing("gives the tokens themselves")
    settled, count = trace.settle(value), value["ids"].numel()
    if settled["ids"].shape[1] * WINDOWS != count or not torch.equal(settled["ids"].flatten(), torch.arange(count)):
        settled = contracted(trace, settled, torch.eye(value["ids"].shape[1]))
    stage = settled.stage
    while stage is not None and not isinstance(stage, Table):
        stage = stage.new if isinstance(stage, Skip) else stage.f if isinstance(stage, Gate) else stage.below
    width = value["ids"].shape[1]
    if stage is not None and width != len(stage.weight):
        text = f"the model returns {width} numbers per window, and its embedding has {len(stage.weight)} rows"
        return settled.but(f"{text}; return one logit for each token of the vocabulary")
    return settled
