"""What each operator does with a value: one function per kind of operator, with the operator's own arguments."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .linear import linear
from .pairs import combined
from .trace import MOVES, RULES, Tracer, rule, values_in
from .values import WINDOWS, Activation, Norm, Table, Tokens, Value, alike

WIDTH = "return one logit for each token of the vocabulary"
SELECTIONS = ["slice", "select", "split", "split_with_sizes", "unsafe_split", "unsafe_chunk", "unbind", "index"]
REDUCTIONS = ["mean", "sum", "var", "std", "var_mean", "std_mean", "amax", "amin", "max", "min", "prod", "logsumexp"]


@rule("unknown")
def unknown(trace: Tracer, *args: Any, **kwargs: Any) -> Value:
    """Any operator without a rule."""
    value = next(value for value in values_in(args, kwargs) if value.stage is not None)
    if isinstance(value.stage, Tokens):
        return trace.nothing("computes with the numbers of the tokens; look up the rows of an embedding instead")
    if torch.Tag.pointwise in trace.func.tags and value.ids.shape == trace.shape:
        return trace.complaint(value, "is not among the activations: tanh, ReLU, GELU (by erf), SiLU, sigmoid")
    if "softmax" in trace.name:
        return trace.nothing("normalizes over several numbers; return the logits themselves, and use no attention")
    if trace.name in REDUCTIONS and trace.shape[:1] != (WINDOWS,):
        return trace.nothing("is a statistic of the batch: predictions depend on other examples; use evaluation mode")
    if trace.name in REDUCTIONS:
        return trace.nothing("is a statistic of positions or channels; of these only nn.LayerNorm is known")
    return trace.nothing("has no equal in a tree, which merges k neighbours by linear maps, norms and activations")


@rule(*MOVES)
def moved(trace: Tracer, *args: Any, **kwargs: Any) -> Any:
    """An operator that only moves elements is applied to the parts of the value."""
    if isinstance(args[0], Tensor):
        return unknown(trace, *args, **kwargs)
    given = values_in(args, kwargs)
    if isinstance(args[0], (list, tuple)) and len(given) < len(args[0]):
        return trace.nothing("joins values with constants; a layer merges nodes of one layer, k of them each time")
    if trace.name in SELECTIONS:  # parts of one value keep one stage
        given = [trace.fold(value) or value for value in given]
    values = alike(given)
    if values is None:
        return trace.nothing("joins values of different layers; a layer merges nodes of one layer, k of them each time")
    if trace.name == "_to_copy":
        return values[0]
    leaves, spec = pytree.tree_flatten((args, kwargs))
    # Views need elements to lie in memory in a certain order, which the parts' elements may not.
    function = torch.reshape if trace.name in ("view", "_unsafe_view", "_reshape_alias") else trace.func

    def apply(parts: Iterable[Tensor]) -> list[Tensor]:
        parts = iter(parts)
        on_cpu = [leaf.cpu() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        swapped = [next(parts) if isinstance(leaf, Value) else leaf for leaf in on_cpu]
        positional, named = pytree.tree_unflatten(swapped, spec)
        return pytree.tree_leaves(function(*positional[: 2 if function is torch.reshape else None], **named))

    constants = [apply(step.constant for step in steps) for steps in zip(*(value.steps for value in values))]
    return [values[0].moved(ids, moved) for ids, *moved in zip(apply(value.ids for value in values), *constants)]


@rule("embedding", "index", "index_select")
def lookup(trace: Tracer, table: Any, *args: Any, **kwargs: Any) -> Any:
    """Rows of a table by the tokens, or a selection of elements."""
    if isinstance(table, Value) and trace.name != "embedding":
        return moved(trace, table, *args, **kwargs)
    tokens = values_in(args, kwargs)[0]
    by_rows = args[0] == 0 if trace.name == "index_select" else trace.name == "embedding" or len(args[0]) == 1
    if isinstance(table, Value) or not isinstance(tokens.stage, Tokens) or not by_rows or table.ndim != 2:
        return trace.nothing("looks up something else than the rows of a table (vocab, channels) by the tokens")
    stage = trace.stage(Table, tokens.stage.positions, table.shape[1], tokens.stage, table)
    return Value(stage, tokens.ids[..., None] * table.shape[1] + torch.arange(table.shape[1]))


@rule("scatter")
def one_hot(trace: Tracer, zeros: Any, dim: int, tokens: Any, source: Any, **_: Any) -> Value:
    """As `torch.nn.functional.one_hot` does it: rows of the identity."""
    if isinstance(zeros, Value) or dim not in (-1, zeros.ndim - 1) or source != 1:
        return unknown(trace, tokens)
    if int(zeros.count_nonzero()) not in (0, tokens.ids.numel()):  # the ones are there already if it was in place
        return unknown(trace, tokens)
    trace.name = "embedding"
    table = torch.eye(zeros.shape[-1], dtype=torch.int64)
    return lookup(trace, table, tokens.map(lambda part: part.squeeze(-1)))


@rule("embedding_renorm")
def max_norm(trace: Tracer, *_: Any) -> Value:
    """An embedding that changes its own rows."""
    trace.written.append(f"{trace.where()} rescales the rows that it reads (max_norm); build it without")
    return Value(None, None)


@rule("add", "sub", "rsub", "mul", "div", "neg")
def arithmetic(trace: Tracer, a: Any, b: Any = -1.0, *options: Any, **named: Any) -> Value:
    """Affine maps by constants, and the steps of a batch norm."""
    if any(option not in (1, None) for option in (*options, *named.values())):  # alpha, rounding_mode
        return unknown(trace, a, b)
    if isinstance(a, Value) and isinstance(b, Value):
        return combined(trace, a, b)
    value, constant = (a, b) if isinstance(a, Value) else (b, a)
    name, reversed_ = trace.name, (value is b) != (trace.name == "rsub")
    if isinstance(value.stage, Tokens) or (name == "div" and reversed_):
        return unknown(trace, value)
    value = value.map(lambda part: part.expand(trace.shape))
    if isinstance(constant, Tensor) and constant in trace.noise:
        return value.but(trace.noise[constant])
    c = trace.number(constant)
    if name in ("sub", "rsub") and reversed_:
        return trace.then(trace.then(value, "mul", -torch.ones_like(c)), "add", c)
    if name in ("add", "sub", "rsub"):
        return trace.then(value, name.removeprefix("r"), c)
    var, eps, power = trace.roots.get(constant, (c, 0.0, 0.0)) if isinstance(constant, Tensor) else (c, 0.0, 0.0)
    if power == (0.5 if name == "div" else -0.5) and var.ndim:  # one number is no variance per channel
        return trace.then(value, "root", trace.number(var), eps)
    return trace.then(value, "mul", 1 / c if name == "div" else c)


def activation(trace: Tracer, value: Value, name: str, **options: Any) -> Value:
    """A function of each number."""
    if isinstance(value.stage, Tokens) or options.get("approximate", "none") != "none":
        return unknown(trace, value)
    value = trace.fold(value) or merged(trace, value)
    stage = trace.stage(Activation, *value.stage.sizes, value.stage, name)
    return Value(stage, value.ids, (), value.complaints)


def merged(trace: Tracer, value: Value) -> Value:
    """A value whose constants differ for the children of a node, such as those of a batch norm after a merge.

    A linear map that merges the last axis and changes no number makes them constants per channel.
    """
    rows = value.map(lambda part: part.flatten(0, -2))
    out = linear(trace, replace(rows, steps=()), torch.eye(value.ids.shape[-1]))
    found = trace.fold(replace(out, steps=rows.steps)) if out.stage is not None else None
    return trace.settle(value) if found is None else found.map(lambda part: part.view(value.ids.shape))


RULES |= {name: partial(activation, name=name) for name in ("tanh", "relu", "gelu", "silu", "sigmoid")}


@rule("clamp", "clamp_min")
def clamp(trace: Tracer, value: Value, least: Any = None, most: Any = None, **named: Any) -> Value:
    """ReLU by another name."""
    is_relu = (named.get("min", least), named.get("max", most)) == (0, None)
    return activation(trace, value, "relu") if is_relu else unknown(trace, value)


@rule(
    *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"),
    *("miopen_batch_norm", "_batch_norm_no_update", "_batch_norm_with_update"),
)
def batch_norm(trace: Tracer, x: Any, gamma: Any, beta: Any, mean: Any, var: Any, *rest: Any) -> Value:
    """Batch norm over axis 1, by running statistics: four steps."""
    training = rest[0] if len(rest) == 3 else trace.name == "_batch_norm_with_update"
    if training or not isinstance(mean, Tensor):
        return trace.complaint(
            x, "uses statistics of the batch: predictions depend on other examples; keep running statistics"
        )

    def numbers(constant: Tensor | None, default: float) -> Tensor:
        constant = torch.full((x.ids.shape[1],), default) if constant is None else constant
        return trace.number(constant.view(-1, *[1] * (x.ids.ndim - 2)))

    *_, momentum, eps = rest
    momentum = momentum or 0.1  # 0 stands for an average of all batches, momentum=None
    value = trace.then(trace.then(x, "sub", numbers(mean, 0.0)), "root", numbers(var, 1.0), eps, momentum)
    return trace.then(trace.then(value, "mul", numbers(gamma, 1.0)), "add", numbers(beta, 0.0))


@rule("native_layer_norm")
def layer_norm(trace: Tracer, x: Any, shape: Any, weight: Any, bias: Any, eps: float) -> Value:
    """Layer norm over the channels of a node, or of neighbours that it merges."""
    inputs = prod(shape)
    rows = x.map(lambda part: part.reshape(-1, inputs))
    below = in_order(trace.fold(rows), inputs) or linear(trace, rows, torch.eye(inputs))
    if below.stage is None:
        return below
    one = torch.ones(inputs)
    defaults = zip((weight, bias), (one, 0 * one))
    gamma, beta = ((default if given is None else given).cpu().double().flatten() for given, default in defaults)
    stage = trace.stage(Norm, *below.stage.sizes, below.stage, gamma, beta, eps)
    return Value(stage, below.ids.view(x.ids.shape), (), below.complaints)


def in_order(value: Value | None, width: int) -> Value | None:
    """The value, if its rows `(rows, width)` are the nodes of its stage one after the other."""
    if value is None or value.stage is None or value.stage.channels != width:
        return None
    return value if torch.equal(value.ids.flatten(), torch.arange(WINDOWS * value.stage.positions * width)) else None


def logits_of(trace: Tracer, value: Value | None, dtype: torch.dtype) -> Value:
    """What a model returns, `(windows, vocab)`, as a stage of one position."""
    if value is None:
        text = "the logits do not depend on the tokens, or the model leaves PyTorch (.numpy(), .tolist(), .item())"
        return Value(None, None, (), (text,))
    if value.stage is None:
        return value
    width, trace.name = value.ids.shape[1], "return"
    found = in_order(trace.settle(value), width)
    if found is None or found.stage is None or found.stage.positions != 1:
        found = linear(trace, trace.settle(value), torch.eye(width), whole=True)
    found = found.but(*value.complaints)
    stage = found.stage
    while stage is not None and not isinstance(stage, Table):
        stage = stage.below
    if stage is not None and width != len(stage.weight):
        text = f"the model returns {width} numbers per window, and its embedding has {len(stage.weight)} rows"
        return found.but(f"{text}; {WIDTH}")
    if stage is not None and stage.weight.is_floating_point() and stage.weight.dtype != dtype:
        return found.but(f"the embedding is {stage.weight.dtype} and the logits {dtype}; compute in one dtype")
    return found
