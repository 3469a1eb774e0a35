"""What a tensor inside a model holds: for each element, which number of which step of the model it is.

A `Stage` is a step of the model at every position at once, `(positions, channels)` per window. A `Value` says of a
tensor of any shape which element of its stage stands where. An operator that only moves elements is applied to these
numbers as it is applied to the tensor, so nothing has to be known about axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

WINDOWS = 2  # that are traced together, so that mixing them shows


@dataclass(frozen=True, eq=False)
class Stage:
    """A step at `positions` positions per window, with `channels` numbers at each; it reads the stage `below`."""

    positions: int
    channels: int
    below: Any

    @property
    def sizes(self) -> tuple[int, int]:
        return self.positions, self.channels


@dataclass(frozen=True, eq=False)
class Tokens(Stage):
    """The window itself, which reads nothing."""


@dataclass(frozen=True, eq=False)
class Table(Stage):
    """The rows of an embedding, weight `(vocab, channels)`, in the dtype of the model."""

    weight: Tensor


@dataclass(frozen=True, eq=False)
class Linear(Stage):
    """A linear map of `kernel_size` consecutive positions of another stage: taps `(kernel_size, c_in, c_out)`."""

    taps: Tensor
    bias: Tensor


@dataclass(frozen=True, eq=False)
class Norm(Stage):
    """Batch norm with these statistics, or layer norm over channels if there are none."""

    weight: Tensor
    bias: Tensor
    eps: float
    mean: Tensor | None = None
    var: Tensor | None = None
    momentum: float = 0.1


@dataclass(frozen=True, eq=False)
class Activation(Stage):
    """A function of each number."""

    name: str


@dataclass(frozen=True, eq=False)
class Gate(Stage):
    """tanh(below) * sigmoid(g) for pairs of channels of two linear maps."""

    g: Stage
    f_channels: Tensor
    g_channels: Tensor


@dataclass(frozen=True, eq=False)
class Skip(Stage):
    """A linear map plus the rightmost child, a node of `old`."""

    old: Stage


@dataclass(frozen=True)
class Step:
    """An operator with a constant in the shape of the tensor: "add", "sub", "mul", or "root".

    "root" divides by `sqrt(constant + eps)`, as a batch norm does; the constant is then its variance.
    """

    kind: str
    constant: Tensor
    where: str = ""  # in the model, for errors
    eps: float = 0.0
    momentum: float = 0.1


@dataclass(frozen=True)
class Value:
    """A tensor that depends on the window: elements `ids` of a stage, int64 of its shape, and then `steps`.

    `stage` is None where an operator gave something that cannot be followed. `complaints` say what was wrong so far.
    """

    stage: Any  # a Stage, or None
    ids: Any  # a Tensor, or None
    steps: tuple[Step, ...] = ()
    complaints: tuple[str, ...] = ()

    def map(self, function: Callable[[Tensor], Tensor]) -> Value:
        """The value after an operator that only moves elements."""
        if self.stage is None:
            return self
        return self.moved(function(self.ids), [function(step.constant) for step in self.steps])

    def moved(self, ids: Tensor, constants: Sequence[Tensor]) -> Value:
        """The value with other elements, and the constants of its steps for these."""
        steps = tuple(replace(step, constant=constant) for step, constant in zip(self.steps, constants))
        return replace(self, ids=ids, steps=steps)

    def but(self, *complaints: str) -> Value:
        """The value with more complaints."""
        return replace(self, complaints=tuple(dict.fromkeys(self.complaints + complaints)))

    def places(self) -> Tensor:
        """Window, position and channel of each element, stacked."""
        nodes, positions = self.ids // self.stage.channels, self.stage.positions
        return torch.stack([nodes // positions, nodes % positions, self.ids % self.stage.channels])

    def per_channel(self, numbers: Tensor) -> tuple[Tensor, bool]:
        """Numbers in the shape of the tensor as one per channel, and whether they are the same at all positions."""
        channels = self.places()[2]
        column = torch.ones(self.stage.channels).double()
        column[channels] = numbers
        return column, torch.equal(column[channels], numbers)


def affine(steps: Sequence[Step], shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The scale and the shift, float64 `shape`, that the steps amount to."""
    scale, shift = torch.ones(shape).double(), torch.zeros(shape).double()
    for step in steps:
        if step.kind in ("add", "sub"):
            shift = shift + step.constant if step.kind == "add" else shift - step.constant
        else:
            factor = step.constant if step.kind == "mul" else 1 / torch.sqrt(step.constant + step.eps)
            scale, shift = scale * factor, shift * factor
    return scale, shift


def batch_norm_in(steps: tuple[Step, ...]) -> tuple[tuple[Step, ...], Step, Step, tuple[Step, ...]] | None:
    """Steps before a batch norm, its mean, its variance and its gamma and beta; None if there is no batch norm."""
    root = next((index for index, step in enumerate(steps) if step.kind == "root"), 0)
    start = max((index for index in range(root) if steps[index].kind != "mul"), default=-1)
    if start < 0 or steps[start].kind != "sub":
        return None
    return steps[:start], steps[start], steps[root], steps[start + 1 : root] + steps[root + 1 :]


def alike(values: Sequence[Value]) -> list[Value] | None:
    """The values with steps of the same kinds, if all are of one stage; else None."""
    if any(value.stage is not values[0].stage or value.stage is None for value in values):
        return None
    kinds = {tuple((step.kind, step.eps) for step in value.steps) for value in values}
    if len(kinds) == 1:
        return list(values)
    pairs = [affine(value.steps, value.ids.shape) for value in values]
    return [
        replace(value, steps=(Step("mul", scale), Step("add", shift))) for value, (scale, shift) in zip(values, pairs)
    ]
