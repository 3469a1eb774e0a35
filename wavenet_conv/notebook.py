"""Runs a notebook's model, whatever it is made of, and leaves it as it was."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, reduce
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import ShapeError

OBJECTS = 100_000  # how many objects inside a model are looked at
_ATOMS = (str, bytes, int, float, complex, type(None), type, ModuleType, torch.dtype, torch.device)


def as_function(model: Any) -> Callable[[Tensor], Any]:
    """The model as one function of tokens; a list is the layers to call in order, and may be nested."""
    if isinstance(model, (list, tuple, nn.ModuleList)) and len(model):
        layers = [as_function(layer) for layer in model]
        return lambda tokens: reduce(lambda x, layer: layer(x), layers, tokens)
    if isinstance(model, nn.DataParallel):
        return model.module
    if callable(model) and not isinstance(model, (type, nn.ModuleList)):
        return model
    found = f"a {model.__name__}, a class" if isinstance(model, type) else f"a {type(model).__name__}"
    raise ShapeError(f"the model is {found}; pass what maps tokens (windows, context) to logits, or a list of layers")


def logits_in(output: Any, windows: int) -> Tensor:
    """The logits `(windows, width)` in what a model returns: a tensor, or the first that fits in a tuple or a dict.

    Axes of length 1 are removed. Raises `ShapeError` if there is no tensor with one row of numbers per window.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    for tensor in tensors:
        axes = [size for size in tensor.shape if size != 1]
        width = tensor.numel() // windows
        if tensor.is_floating_point() and axes == [size for size in (windows, width) if size != 1] and tensor.ndim:
            return tensor.reshape(windows, width)
    found = [tuple(tensor.shape) for tensor in tensors] or type(output).__name__
    raise ShapeError(f"the model returns {found} for {windows} windows, not one row of logits for each")


def parts_of(model: Any) -> list[Any]:
    """The objects that a model is made of: layers, containers, tensors, and what its functions refer to."""
    found: dict[int, Any] = {}
    waiting = [model]
    while waiting and len(found) < OBJECTS:
        part = waiting.pop()
        if isinstance(part, _ATOMS) or id(part) in found:
            continue
        found[id(part)] = part
        waiting += _inside(part)
    return list(found.values())


def _inside(part: Any) -> Iterable[Any]:
    if isinstance(part, Tensor):
        return ()
    if isinstance(part, dict):
        return part.values()
    if isinstance(part, (list, tuple, set)):
        return part
    if isinstance(part, MethodType):
        return (part.__self__, part.__func__)
    if isinstance(part, partial):
        return (part.func, *part.args, *part.keywords.values())
    if isinstance(part, FunctionType):
        try:
            names = inspect.getclosurevars(part)
        except ValueError:  # a cell that is still empty
            return ()
        return (*names.nonlocals.values(), *names.globals.values(), *vars(part).values())
    methods = (getattr(type(part), name, None) for name in ("__call__", "forward"))
    return (vars(part) if hasattr(part, "__dict__") else {}, *(m for m in methods if isinstance(m, FunctionType)))


@contextmanager
def left_as_found(model: Any) -> Iterator[list[Tensor]]:
    """Everything inside a model in evaluation mode, without gradients; yields its tensors.

    Afterwards flags, attributes, lists, tensors and the random state are what they were.
    """
    parts = parts_of(model)
    containers: list[tuple[Any, Any]] = [(part, part.copy()) for part in parts if isinstance(part, (dict, list))]
    tensors = [(part, part.detach().clone()) for part in parts if isinstance(part, Tensor)]
    for part, _ in containers:
        if isinstance(part, dict) and isinstance(part.get("training"), bool):
            part["training"] = False
    devices = {tensor.device for tensor, _ in tensors if tensor.is_cuda}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=list(devices)))
        stack.enter_context(torch.no_grad())
        if "torch._dynamo" in sys.modules:  # compiled parts run as they are written
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            yield [tensor for tensor, _ in tensors]
        finally:
            for part, saved in containers:
                if isinstance(part, list):
                    part[:] = saved
                elif part.keys() != saved.keys() or any(part[key] is not saved[key] for key in saved):
                    part.clear()
                    part.update(saved)
            for tensor, values in tensors:
                if not torch.equal(tensor.nan_to_num(), values.nan_to_num()):
                    tensor.copy_(values)
