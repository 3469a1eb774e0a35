"""Follows the tokens of a window through every operator of a model while it runs.

Each ATen operator that reads a tensor which depends on the tokens has a rule in `RULES`, which gives a `Value`.
Operators that read constants alone run as they are. An operator without a rule is a complaint that names the place
where the model calls it; the trace goes on, so that independent complaints come together.
"""

from __future__ import annotations

import inspect
import linecache
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from .values import Linear, Norm, Stage, Step, Tokens, Value, affine, batch_norm_in

# Operators that only move elements.
MOVES = """
view _unsafe_view reshape _reshape_alias permute transpose t numpy_T squeeze expand unsqueeze clone alias detach slice
select split split_with_sizes unsafe_split unsafe_chunk unbind gather flip roll unfold repeat lift_fresh _to_copy cat
stack diagonal
""".split()  # noqa: SIM905
POWERS = {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}
SHAPES_ONLY = ("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_empty", "new_full")
_HERE, _TORCH = str(Path(__file__).parent.parent), str(Path(torch.__file__).parent)
PER_POSITION = (
    "uses constants that differ per position (learned positions?): a node must not depend on where it stands; train "
    "again without them"
)
STATISTICS = (
    "uses statistics per position: a node must not depend on where it stands; let the batch norm reduce over all axes "
    "but the last, (0, 1) for three axes, and train again"
)
Kind = TypeVar("Kind", bound=Stage)
Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}  # by the name of the operator, without the underscore of its in-place form


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers the rule of these operators."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def values_in(*arguments: Any) -> list[Value]:
    """The values among the arguments of an operator."""
    return [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Value)]


class Tracer(TorchDispatchMode):
    """A mode in which `windows` are followed; `values` has what is known of each tensor that depends on them."""

    def __init__(self, model: Any, windows: Tensor):
        super().__init__()
        self.paths = dict(_paths(model))
        self.values = WeakTensorKeyDictionary()
        self.roots = WeakTensorKeyDictionary()  # constants: (var, eps, power) of (var + eps) ** power
        self.noise = WeakTensorKeyDictionary()  # random constants: the complaint
        self.written: list[str] = []  # complaints about constants that the model changes
        self.operators: list[str] = []
        self.memo: dict[Any, Any] = {}  # equal steps are one stage
        ids = torch.arange(windows.numel()).view(windows.shape)
        self.values[windows] = Value(Tokens(windows.shape[1], 1, None), ids)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # operators that are made of others, which inference mode does not take apart
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        out = func(*args, **kwargs)
        self.func, self.name = func, func.overloadpacket.__name__.rstrip("_")
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        if any(leaf in self.values for leaf in given):
            if self.name in ("rand_like", "randn_like"):
                self._remember_constant([], outputs, args, kwargs)
            elif outputs and self.name not in SHAPES_ONLY:
                self.shape = outputs[0].shape
                self.operators.append(self.name)
                self._follow(outputs, args, kwargs)
        else:
            self._remember_constant(given, outputs, args, kwargs)
        return out

    def _follow(self, outputs: list[Tensor], args: Any, kwargs: Any) -> None:
        """Finds the values of the outputs of one operator."""
        args, kwargs = pytree.tree_map(
            lambda leaf: self.values.get(leaf, leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs)
        )
        given, in_place = values_in(args, kwargs), self.func.overloadpacket.__name__.endswith("_")
        if in_place and not isinstance(args[0], Value) and outputs[0]._is_view():  # noqa: SLF001
            self.written.append(f"{self.where()} writes into a tensor of constants; compute a new tensor instead")
        if in_place:  # other tensors in the same memory change too
            memory, reason = outputs[0].untyped_storage().data_ptr(), "changes a part of a tensor that is used later"
            for tensor in [t for t in self.values if t.untyped_storage().data_ptr() == memory and t is not args[0]]:
                self.values[tensor] = self.nothing(f"{reason}, as recurrent cells do; compute a new one")
        unknown = sum(value.stage is None for value in given)
        if unknown == len(given) or (unknown and torch.Tag.pointwise not in self.func.tags):
            found: Any = Value(None, None)
        elif torch.Tag.nondeterministic_seeded in self.func.tags:
            found = given[0].but(self._noise())
        else:
            try:
                found = RULES.get(self.name, RULES["unknown"])(self, *args, **kwargs)
            except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
                found = self.nothing(f"is used in a way that is not known: {error}")
        complaints = tuple(text for value in given for text in value.complaints)
        for tensor, value in zip(outputs, found if isinstance(found, list) else [found] * len(outputs)):
            self.values[tensor] = replace(value, complaints=tuple(dict.fromkeys(complaints + value.complaints)))

    def _remember_constant(self, given: list[Tensor], outputs: list[Tensor], args: Any, kwargs: Any) -> None:
        """Keeps of a constant whether it is random, and whether it is a root, as in a batch norm."""
        noise = [self.noise[leaf] for leaf in given if leaf in self.noise]
        if torch.Tag.nondeterministic_seeded in self.func.tags:
            noise = [self._noise()]
        for tensor in outputs if noise else ():
            self.noise[tensor] = noise[0]
        if self.func.overloadpacket.__name__.endswith("_"):
            self.roots.pop(outputs[0], None)
            return
        if not given or kwargs or len(outputs) != 1:
            return
        known = self.roots.get(given[0])
        var, eps, power = known or (given[0].clone(), 0.0, 1.0)
        second = args[1] if len(args) == 2 and isinstance(args[1], (int, float)) else None
        if self.name == "add" and known is None and second is not None:
            self.roots[outputs[0]] = (var, float(second), 1.0)
        elif self.name in POWERS or (self.name == "pow" and second is not None):
            self.roots[outputs[0]] = (var, eps, power * (POWERS.get(self.name) or float(second or 0)))
        elif known and (self.name in MOVES or (self.name == "mul" and second == 1)):
            self.roots[outputs[0]] = (self.func(var, *args[1:]), eps, power)

    def _noise(self) -> str:
        return f"{self.where()} draws random numbers; give F.dropout training=self.training, or call .eval()"

    def where(self) -> str:
        """The operator, and the module or the line of the notebook that calls it."""
        return f"`{self.name.strip('_')}` in " + (_caller(self.paths) or "the model")

    def complaint(self, value: Value, reason: str) -> Value:
        return value.but(f"{self.where()} {reason}")

    def then(self, value: Value, kind: str, constant: Tensor, *root: float) -> Value:
        """The value after one more step; `root` is eps and momentum."""
        return replace(value, steps=(*value.steps, Step(kind, constant, self.where(), *root)))

    def per_position(self, value: Value, steps: tuple[Step, ...], varies: Callable[[Tensor], bool]) -> Value:
        """The value with a complaint about the first step whose constant varies with the position."""
        step = next((step for step in steps if varies(step.constant)), steps[0])
        return value.but(f"{step.where} {STATISTICS if batch_norm_in(steps) else PER_POSITION}")

    def nothing(self, reason: str) -> Value:
        """What cannot be followed, with the reason."""
        return self.complaint(Value(None, None), reason)

    def number(self, constant: Any) -> Tensor:
        """A constant as float64 in the shape of the output."""
        return torch.as_tensor(constant, dtype=torch.float64, device="cpu").detach().expand(self.shape)

    def fold(self, value: Value) -> Value | None:
        """The value with its steps made part of the stage; None where their constants differ per position.

        A batch norm stays one after a linear map. Elsewhere its steps become part of a linear map, as all others do.
        """
        norm = batch_norm_in(value.steps) if isinstance(value.stage, Linear) else None
        before, *statistics, after = norm or (value.steps, ())
        numbers = [*affine(before, value.ids.shape), *(step.constant for step in statistics)]
        numbers += affine(after, value.ids.shape) if norm else []
        columns, same = zip(*map(value.per_channel, numbers))
        if not all(same):
            return None
        roots = tuple((step.eps, step.momentum) for step in statistics)
        key = (value.stage, roots, *(column.numpy().tobytes() for column in columns))
        if key not in self.memo:
            stage = folded(value.stage, *columns[:2])
            if norm:
                mean, var, gamma, beta = columns[2:]
                stage = Norm(*stage.sizes, stage, gamma, beta, roots[1][0], mean, var, roots[1][1])
            self.memo[key] = stage
        return Value(self.memo[key], value.ids, (), value.complaints)

    def settle(self, value: Value) -> Value:
        """As `fold`, with a complaint where constants differ per position."""
        if found := self.fold(value):
            return found
        columns = (value.per_channel(numbers)[0] for numbers in affine(value.steps, value.ids.shape))
        settled = Value(folded(value.stage, *columns), value.ids, (), value.complaints)
        return self.per_position(settled, value.steps, lambda constant: not value.per_channel(constant)[1])

    def linear(self, below: Stage, positions: int, taps: Tensor, bias: Tensor) -> Linear:
        """A linear map; equal ones are one stage, also if a model computes node by node."""
        key = (Linear, below, positions, taps.shape, taps.numpy().tobytes(), bias.numpy().tobytes())
        return self.memo.setdefault(key, Linear(positions, taps.shape[2], below, taps, bias))

    def stage(self, kind: type[Kind], *arguments: Any) -> Kind:
        """A stage of this kind; equal steps are one stage."""
        key = (kind, *(id(part) if isinstance(part, Tensor) else part for part in arguments))
        if key not in self.memo:
            self.memo[key] = kind(*arguments)
        return self.memo[key]


def _paths(model: Any, prefix: str = "") -> Iterator[tuple[int, str]]:
    """The names of layers for errors: paths of modules, places in a list."""
    if isinstance(model, (list, tuple)):
        for place, layer in enumerate(model):
            yield from _paths(layer, f"{prefix}{place}.")
    elif isinstance(model, nn.Module):
        for path, module in model.named_modules():
            yield id(module), f"{(prefix + path).rstrip('.') or 'the model'} ({type(module).__name__})"
    elif prefix:
        yield id(model), f"{prefix.rstrip('.')} ({type(model).__name__})"


def _caller(paths: dict[int, str]) -> str:
    """The line outside of PyTorch and this package that is running, and the module that it belongs to."""
    path, line, frame = "", "", inspect.currentframe()
    while frame is not None and not path:
        file, owner = frame.f_code.co_filename, frame.f_locals.get("self")
        if not line and not file.startswith((_HERE, _TORCH)):
            code = linecache.getline(file, frame.f_lineno).strip()
            line = f"{Path(file).name}, line {frame.f_lineno}" + (f" ({code:.80})" if code else "")
        path, frame = paths.get(id(owner), ""), frame.f_back
    return " of ".join(part for part in (line, path) if part)


def folded(stage: Stage, scale: Tensor, shift: Tensor) -> Stage:
    """`scale * stage + shift` per channel: part of a linear map, or a new one that maps each channel to itself."""
    if bool((scale == 1).all()) and not shift.any():
        return stage
    if not isinstance(stage, Linear):
        return Linear(*stage.sizes, stage, torch.diag(scale)[None], shift)
    return replace(stage, taps=stage.taps * scale, bias=stage.bias * scale + shift)
