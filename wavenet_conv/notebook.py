"""Runs a notebook's model, made of any classes or functions, and leaves it as it was."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import is_dataclass
from functools import partial, reduce
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
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
    if isinstance(model, type):
        raise ShapeError(f"the model is the class {model.__name__}; pass an instance of it")
    found = f"a {type(model).__name__}"
    raise ShapeError(f"the model is {found}; pass what maps tokens (windows, context) to logits, or a list of layers")


def logits_in(output: Any, windows: int) -> Tensor:
    """The logits `(windows, width)` in what a model returns: a tensor, or the one that fits in a tuple or a dict.

    Axes of length 1 are removed. Raises `ShapeError` unless one tensor has one row of numbers per window.
    """
    output = vars(output) if is_dataclass(output) else output
    output = output.get("logits", output) if isinstance(output, dict) else output
    tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    fitting = []
    for tensor in tensors:
        axes = [size for size in tensor.shape if size != 1]
        width = tensor.numel() // windows
        if tensor.is_floating_point() and axes == [size for size in (windows, width) if size != 1] and tensor.ndim:
            fitting.append(tensor.reshape(windows, width))
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        several = " and ".join(str(tuple(tensor.shape)) for tensor in fitting)
        raise ShapeError(
            f"the model returns several rows per window, {several}; return the logits alone, or as 'logits'"
        )
    found = [tuple(tensor.shape) for tensor in tensors] or type(output).__name__
    raise ShapeError(f"the model returns {found} for {windows} windows, not one row of logits for each")


def parts_of(model: Any) -> list[Any]:
    """The objects that a model is made of: layers, containers, tensors, and what its functions refer to."""
    found: dict[int, Any] = {}
    waiting = deque([model])
    while waiting and len(found) < OBJECTS:
        part = waiting.popleft()
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
    if isinstance(part, (staticmethod, classmethod)):
        return (part.__func__,)
    if isinstance(part, FunctionType):
        if _in_library(part):
            return ()
        try:
            names = inspect.getclosurevars(part)
        except ValueError:  # a cell that is still empty
            return ()
        defaults = (part.__defaults__, part.__kwdefaults__)
        return (*names.nonlocals.values(), *names.globals.values(), *defaults, vars(part))
    classes = [kind for kind in type(part).__mro__ if not _in_library(kind)]
    return (*_attributes(part).values(), *(member for kind in classes for member in vars(kind).values()))


def _in_library(part: Any) -> bool:
    """Whether a function or a class is of Python itself or of an installed package, which keep no state of a model."""
    module = str(part.__module__).partition(".")[0]
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return module == "torch" or module in sys.stdlib_module_names or "-packages" in file


def _attributes(part: Any) -> dict[str, Any]:
    """What an object holds, in its `__dict__` and in slots."""
    slots = [vars(kind).get("__slots__", ()) for kind in type(part).__mro__]
    names = [name for given in slots for name in ([given] if isinstance(given, str) else given)]
    found = {name: getattr(part, name) for name in names if hasattr(part, name)}
    return found | getattr(part, "__dict__", {})


def _snapshot(parts: list[Any]) -> Callable[[], None]:
    """A function that gives these objects the contents that they have now."""
    containers: list[tuple[Any, Any]] = [(part, dict(part)) for part in parts if isinstance(part, dict)]
    containers += [(part, list(part)) for part in parts if isinstance(part, list)]
    objects = [(part, _attributes(part)) for part in parts if not isinstance(part, (dict, list, tuple, Tensor))]
    tensors = [part for part in parts if isinstance(part, Tensor) and part.layout == torch.strided]
    values = [(tensor, tensor.detach().clone()) for tensor in tensors if not is_lazy(tensor)]
    generators = [(part, part.get_state()) for part in parts if isinstance(part, torch.Generator)]

    def restore() -> None:
        for part, attributes in objects:
            found = _attributes(part)
            for name in found.keys() - attributes.keys():
                object.__delattr__(part, name)
            for name, value in attributes.items():
                if name not in found or found[name] is not value:
                    object.__setattr__(part, name, value)
        for part, saved in containers:
            if isinstance(part, list):
                part[:] = saved
            elif part.keys() != saved.keys() or any(part[key] is not saved[key] for key in saved):
                part.clear()
                part.update(saved)
        for tensor, value in values:
            if not torch.equal(tensor, value):
                tensor.copy_(value)
        for generator, state in generators:
            generator.set_state(state)

    return restore


@contextmanager
def left_as_found(model: Any) -> Iterator[list[Tensor]]:
    """Everything inside a model in evaluation mode, without gradients; yields its tensors.

    Afterwards flags, attributes, lists, tensors and the random state are what they were.
    """
    parts = parts_of(model)
    restore, tensors = _snapshot(parts), [part for part in parts if isinstance(part, Tensor)]
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    switched: list[Any] = []  # what was in training mode

    def switch(part: Any, _: Any = None) -> None:
        if isinstance(getattr(part, "training", None), bool) and part.training:
            part.training = False
            switched.append(part)

    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=list(devices)))
        stack.enter_context(torch.no_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Using `torch.compile")  # about the hook below
        if "torch._dynamo" in sys.modules:  # compiled parts run as they are written
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for part in parts:
                if isinstance(part, nn.Module) or hasattr(type(part), "training") or "training" in _attributes(part):
                    with suppress(AttributeError):  # a property
                        switch(part)
            # For modules that the search has not found, such as those that a module of Python holds.
            stack.callback(register_module_forward_pre_hook(switch).remove)
            yield tensors
        finally:
            for part in switched:
                part.training = True
            restore()
