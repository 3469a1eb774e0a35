"""What a tensor inside a model holds: for each of its elements, which node's channel it is, and an affine map of it.

A `Stage` is one step of what the model computes, at every position at once: `(positions, channels)` per window. A
`Value` says of a tensor of any shape which element of its stage stands where. Operators that only move elements are
applied to these numbers just as they are applied to the tensor, so nothing has to be known about axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

WINDOWS = 2  # windows that are traced, so that mixing of windows shows


@dataclass(frozen=True, eq=False)
class Stage:
    """A step at `positions` positions per window, with `channels` numbers at each; `where` names it in errors."""

    positions: int
    channels: int
    where: str = field(default="", kw_only=True)


@dataclass(frozen=True, eq=False)
class Tokens(Stage):
    """The window itself."""


@dataclass(frozen=True, eq=False)
class Table(Stage):
    """The rows of an embedding, weight `(vocab, channels)`, in the dtype of the model."""

    weight: Tensor


@dataclass(frozen=True, eq=False)
class Linear(Stage):
    """A linear map of `kernel_size` consecutive positions of another stage: taps `(kernel_size, c_in, c_out)`."""

    below: Stage
    taps: Tensor
    bias: Tensor


@dataclass(frozen=True, eq=False)
class Norm(Stage):
    """Batch norm with these statistics, or layer norm over channels if there are none."""

    below: Stage
    weight: Tensor
    bias: Tensor
    eps: float
    mean: Tensor | None = None
    var: Tensor | None = None
    momentum: float = 0.1


@dataclass(frozen=True, eq=False)
class Activation(Stage):
    """A function of each number."""

    below: Stage
    name: str


@dataclass(frozen=True, eq=False)
class Gate(Stage):
    """tanh(f) * sigmoid(g) for pairs of channels of two linear maps."""

    f: Stage
    g: Stage
    f_channels: Tensor
    g_channels: Tensor


@dataclass(frozen=True, eq=False)
class Skip(Stage):
    """A linear map plus the rightmost child, `old`."""

    new: Stage
    old: Stage


@dataclass(frozen=True)
class Value:
    """A tensor that depends on the window; element i is `gamma * (x - mean) / sqrt(var + eps) + beta`.

    There x is `scale * stage + shift`, and without a batch norm under way the element is x. All parts have the shape of
    the tensor. `stage` is None where an operator gave something that cannot be followed. `complaints` are what was
    wrong on the way here.
    """

    stage: Stage | None
    parts: dict[str, Tensor]  # ids int64; scale, shift, mean, var, gamma, beta float64
    eps: float = 0.0
    momentum: float = 0.1
    complaints: tuple[str, ...] = ()

    @classmethod
    def of(cls, stage: Stage, ids: Tensor, complaints: tuple[str, ...] = ()) -> Value:
        """The elements `ids` of a stage as they are."""
        parts = {"ids": ids, "scale": torch.ones(ids.shape).double(), "shift": torch.zeros(ids.shape).double()}
        return cls(stage, parts, complaints=complaints)

    def __getitem__(self, name: str) -> Tensor:
        return self.parts[name]

    def map(self, function: Callable[[Tensor], Tensor]) -> Value:
        """The value after an operator that only moves elements."""
        return replace(self, parts={name: function(part) for name, part in self.parts.items()})

    def with_parts(self, **parts: Tensor) -> Value:
        return replace(self, parts=self.parts | parts)

    def but(self, *complaints: str) -> Value:
        """The value with more complaints."""
        return replace(self, complaints=tuple(dict.fromkeys(self.complaints + complaints)))

    def is_whole(self) -> bool:
        """Whether the elements are those of the stage as they are, in any order."""
        return len(self.parts) == 3 and bool((self["scale"] == 1).all()) and not self["shift"].any()

    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Window, position and channel of each element."""
        assert self.stage is not None
        nodes, channels = self["ids"] // self.stage.channels, self["ids"] % self.stage.channels
        return nodes // self.stage.positions, nodes % self.stage.positions, channels

    def per_channel(self, name: str) -> tuple[Tensor, bool]:
        """A part as one number per channel `(channels,)`, and whether it is the same at all positions."""
        assert self.stage is not None
        channels = self.places()[2].flatten()
        out = torch.full((self.stage.channels,), float(name in ("scale", "var", "gamma"))).double()
        out[channels] = self[name].flatten()
        return out, bool((out[channels] == self[name].flatten()).all())

    def collapsed(self) -> Value:
        """The same elements with a batch norm written as scale and shift."""
        if "mean" not in self.parts:
            return self
        scale = self["gamma"] / torch.sqrt(self["var"] + self.eps) if "var" in self.parts else self["gamma"]
        shift = self["beta"] + (self["shift"] - self["mean"]) * scale
        return replace(self, parts={"ids": self["ids"], "scale": self["scale"] * scale, "shift": shift})

    # Arithmetic with constants of the shape of the tensor.

    def plus(self, c: Tensor) -> Value:
        if "var" in self.parts:
            return self.with_parts(beta=self["beta"] + c)
        value = self.collapsed()
        return value.with_parts(shift=value["shift"] + c)

    def minus(self, c: Tensor) -> Value:
        """The first step of a batch norm, if there is none under way."""
        if "var" in self.parts:
            return self.with_parts(beta=self["beta"] - c)
        value = self.collapsed()
        return value.with_parts(mean=c, gamma=torch.ones_like(c), beta=torch.zeros_like(c))

    def times(self, c: Tensor) -> Value:
        if "mean" in self.parts:
            return self.with_parts(gamma=self["gamma"] * c, beta=self["beta"] * c)
        return self.with_parts(scale=self["scale"] * c, shift=self["shift"] * c)

    def over_root(self, var: Tensor, eps: float) -> Value:
        """Divided by sqrt(var + eps): the second step of a batch norm, after `minus`."""
        if "mean" in self.parts and "var" not in self.parts and not self["beta"].any():
            return replace(self.with_parts(var=var), eps=eps)
        return self.times(1 / torch.sqrt(var + eps))


def same_stage(values: Sequence[Value]) -> list[Value] | None:
    """The values, written alike, if all are of one stage; else None."""
    if any(value.stage is not values[0].stage or value.stage is None for value in values):
        return None
    if any((value.parts.keys(), value.eps) != (values[0].parts.keys(), values[0].eps) for value in values):
        return [value.collapsed() for value in values]
    return list(values)


def folded(stage: Stage, scale: Tensor, shift: Tensor) -> Stage:
    """`scale * stage + shift` per channel: part of a linear map, or a new one that maps each channel to itself."""
    if bool((scale == 1).all()) and not shift.any():
        return stage
    if not isinstance(stage, Linear):
        taps = torch.diag(scale)[None]
        return Linear(stage.positions, stage.channels, stage, taps, shift, where=stage.where)
    return replace(stage, taps=stage.taps * scale, bias=stage.bias * scale + shift)
