"""Follows the tokens of a window through every operator of a model while it runs.

Each ATen operator that reads a tensor which depends on the tokens is looked up in `RULES`, and its rule gives a `Value`.
Operators that read constants alone run as they are. An operator without a rule is a complaint that names the place
where the model calls it; the trace goes on, so that independent complaints come together.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from .values import Linear, Norm, Stage, Tokens, Value, folded

MOVES = (  # operators that only move elements
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "numpy_T", "squeeze", "expand"),
    *(
        "unsqueeze",
        "clone",
        "alias",
        "detach",
        "slice",
        "select",
        "split",
        "split_with_sizes",
        "unsafe_split",
        "unbind",
    ),
    *(
        "unsafe_chunk",
        "gather",
        "flip",
        "roll",
        "unfold",
        "repeat",
        "lift_fresh",
        "_to_copy",
        "cat",
        "stack",
        "diagonal",
    ),
)
SHAPES_ONLY = ("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_empty", "new_full")
_HERE, _TORCH = str(Path(__file__).parent.parent), str(Path(torch.__file__).parent)
PER_POSITION = "uses constants that differ per position (learned positions?): a node must not depend on where it stands"
STATISTICS = (
    "uses statistics per position: a node must not depend on where it stands; let the batch norm reduce over all axes "
    "but the last, (0, 1) for three axes, and train again"
)
Rule = Callable[..., "Value | list[Value]"]
RULES: dict[str, Rule] = {}  # by the name of the operator, without the underscore of its in-place form


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


class Tracer(TorchDispatchMode):
    """A mode in which `windows` are followed; `values` has what is known of each tensor that depends on them."""

    def __init__(self, model: Any, windows: Tensor):
        super().__init__()
        self.paths = {id(m): path for path, m in model.named_modules()} if isinstance(model, nn.Module) else {}
        self.values = WeakTensorKeyDictionary()
        self.roots = WeakTensorKeyDictionary()  # constants: (var, eps, power) of (var + eps) ** power
        self.noise = WeakTensorKeyDictionary()  # random constants: the complaint
        self.written: list[str] = []  # complaints about constants that the model changes
        self.operators: list[str] = []
        self.memo: dict[Any, Stage] = {}  # equal steps are one stage
        self.values[windows] = Value.of(Tokens(windows.shape[1], 1), torch.arange(windows.numel()).view(windows.shape))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.func, self.name = func, func.overloadpacket.__name__.rstrip("_")
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        if any(leaf in self.values for leaf in given):
            if outputs and self.name not in SHAPES_ONLY:
                self.shape = outputs[0].shape
                self.operators.append(self.name)
                self._follow(outputs, args, kwargs)
        else:
            self._remember_constant(given, outputs, args)
        return out

    def _follow(self, outputs: list[Tensor], args: Any, kwargs: Any) -> None:
        """Finds the values of the outputs of one operator."""
        args, kwargs = pytree.tree_map(
            lambda leaf: self.values.get(leaf, leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs)
        )
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Value)]
        if self.func._schema.is_mutable and not isinstance(args[0], Value) and outputs[0]._is_view():
            self.written.append(f"{self.where()} writes into a tensor of constants; compute a new tensor instead")
        if all(value.stage is None for value in given):
            found: Any = Value(None, {})
        elif torch.Tag.nondeterministic_seeded in self.func.tags:
            found = given[0].but(self._noise())
        else:
            found = RULES.get(self.name, RULES["unknown"])(self, *args, **kwargs)
        complaints = tuple(text for value in given for text in value.complaints)
        for tensor, value in zip(outputs, found if isinstance(found, list) else [found] * len(outputs)):
            self.values[tensor] = Value(value.stage, value.parts, value.eps, value.momentum).but(
                *complaints, *value.complaints
            )

    def _remember_constant(self, given: list[Tensor], outputs: list[Tensor], args: Any) -> None:
        """Keeps of a constant whether it is random, and whether it is a root, as in a batch norm."""
        noise = [self.noise[leaf] for leaf in given if leaf in self.noise]
        if torch.Tag.nondeterministic_seeded in self.func.tags:
            noise = [self._noise()]
        for tensor in outputs if noise else ():
            self.noise[tensor] = noise[0]
        known = self.roots.get(given[0]) if given else None
        var, eps, power = known or (given[0] if given else None, 0.0, 1.0)
        if self.name == "add" and len(args) > 1 and known is None and isinstance(args[1], (int, float)):
            root = (var, float(args[1]), 1.0)
        elif self.name == "add" and len(args) > 1 and isinstance(args[0], (int, float)):
            root = (var, float(args[0]), 1.0)
        elif (exponent := self._exponent(args)) is not None:
            root = (var, eps, power * exponent)
        elif self.name in MOVES and known and len(outputs) == 1:
            root = (self.func(var, *args[1:]), eps, power)
        else:
            return
        self.roots[outputs[0]] = root

    def _exponent(self, args: Any) -> float | None:
        """The power to which an operator raises a constant."""
        if self.name == "pow" and len(args) == 2 and isinstance(args[1], (int, float)):
            return float(args[1])
        return {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}.get(self.name)

    def _noise(self) -> str:
        return f"{self.where()} draws random numbers (dropout in training mode?); put it into evaluation mode"

    def where(self) -> str:
        """The operator, and the module or the line of the notebook that calls it."""
        path, line, frame = "", "", sys._getframe()
        while frame.f_back is not None and not path:
            frame = frame.f_back
            file, owner = frame.f_code.co_filename, frame.f_locals.get("self")
            if not line and not file.startswith((_HERE, _TORCH)):
                code = linecache.getline(file, frame.f_lineno).strip()
                line = f"{Path(file).name}, line {frame.f_lineno}" + (f" ({code:.80})" if code else "")
            if id(owner) in self.paths:
                path = f"{self.paths[id(owner)] or 'the model'} ({type(owner).__name__})"
        return f"`{self.name}` in " + (" of ".join(part for part in (line, path) if part) or "the model")

    def complaint(self, value: Value, reason: str) -> Value:
        return value.but(f"{self.where()} {reason}")

    def nothing(self, reason: str) -> Value:
        """What cannot be followed, with the reason."""
        return self.complaint(Value(None, {}), reason)

    def number(self, constant: Any) -> Tensor:
        """A constant as float64 in the shape of the output."""
        return torch.as_tensor(constant).detach().cpu().double().expand(self.shape)

    def fold(self, value: Value) -> Value | None:
        """The value with its affine map and batch norm made part of the stage; None where they differ per position.

        A batch norm stays one if it follows a linear map; elsewhere it is an affine map.
        """
        if not (isinstance(value.stage, Linear) and "var" in value.parts):
            value = value.collapsed()
        columns = {name: value.per_channel(name) for name in value.parts if name != "ids"}
        if value.stage is None or not all(same for _, same in columns.values()):
            return None
        numbers = {name: column for name, (column, _) in columns.items()}
        key = (value.stage, value.eps, *((name, column.numpy().tobytes()) for name, column in numbers.items()))
        if key not in self.memo:
            stage = folded(value.stage, numbers["scale"], numbers["shift"])
            if "var" in numbers:
                weights = [numbers[name] for name in ("gamma", "beta")]
                statistics = {name: numbers[name] for name in ("mean", "var")}
                sizes = (stage.positions, stage.channels, stage)
                stage = Norm(*sizes, *weights, value.eps, **statistics, momentum=value.momentum)
            self.memo[key] = stage
        return Value.of(self.memo[key], value["ids"], value.complaints)

    def settle(self, value: Value) -> Value:
        """As `fold`, with a complaint where that cannot be."""
        if found := self.fold(value):
            return found
        assert value.stage is not None
        reason, value = STATISTICS if "var" in value.parts else PER_POSITION, value.collapsed()
        scale, shift = (value.per_channel(name)[0] for name in ("scale", "shift"))
        return self.complaint(Value.of(folded(value.stage, scale, shift), value["ids"]), reason)

    def step(self, kind: type[Stage], below: Stage, *arguments: Any) -> Stage:
        """A stage of this kind with as many positions and channels as the one below; equal steps are one stage."""
        key = (kind, below, *arguments)
        if key not in self.memo:
            self.memo[key] = kind(below.positions, below.channels, below, *arguments)
        return self.memo[key]
