"""The shape of a model: sizes, norms and activations, checked when they are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ConfigError

NORMS = ("batch", "layer", "none")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": lambda x: torch.tanh(x),  # looked up at each call, so that tests can replace it
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": lambda x: torch.sigmoid(x),
    "none": lambda x: x,
}


@dataclass(frozen=True)
class WaveNetConfig:
    """The shape of a model. The defaults are the lecture's last network (76,579 parameters).

    Afterwards `n_hidden`, `norm` and `activation` are tuples with one entry per layer.

    Args:
        vocab_size: Number of tokens, including `.`.
        n_embd: Width of the embedding.
        n_hidden: Width of every layer, or one width per layer.
        kernel_sizes: How many consecutive nodes each layer fuses, lowest layer first.
        norm: "batch", "layer" (over the channels of one node) or "none"; one for all layers, or one per layer.
            Default: "batch", or "none" if the model is gated.
        activation: "tanh", "relu", "gelu" (by erf), "silu", "sigmoid" or "none"; one for all layers, or one per layer.
        bias: Bias in every layer's linear map. Default: in layers without batch norm, which has a shift of its own.
        gated: Layers are `GatedLayer`s, `n_embd` wide outside and `n_hidden` inside the gate; they have biases, and no
            norm. Their activation is the gate.
        head_kernel_size: How many consecutive nodes the head fuses.
        head_norm: The norm of the logits, as `norm`.

    Raises:
        ConfigError: A field is wrong; the message names it.
    """

    vocab_size: int = 27
    n_embd: int = 24
    n_hidden: int | tuple[int, ...] = 128
    kernel_sizes: tuple[int, ...] = (2, 2, 2)
    norm: str | tuple[str, ...] | None = None
    activation: str | tuple[str, ...] = "tanh"
    bias: bool | None = None
    gated: bool = False
    head_kernel_size: int = 1
    head_norm: str = "none"

    def __post_init__(self) -> None:
        if not isinstance(self.kernel_sizes, Sequence) or not self.kernel_sizes:
            raise ConfigError(f"kernel_sizes is {self.kernel_sizes!r}; a model needs at least one, such as (2, 2, 2)")
        set_field = lambda name, value: object.__setattr__(self, name, value)
        if self.norm is None:
            set_field("norm", "none" if self.gated else "batch")
        set_field("kernel_sizes", tuple(self.kernel_sizes))
        for name in ("n_hidden", "norm", "activation"):
            set_field(name, self._per_layer(name))
        self._check()
        if self.bias is None and len(set(self.biases)) == 1:
            set_field("bias", self.biases[0])

    def _per_layer(self, name: str) -> tuple[Any, ...]:
        """A field as a tuple with one entry per layer."""
        value, layers = getattr(self, name), len(self.kernel_sizes)
        values = (value,) * layers if isinstance(value, str) or not isinstance(value, Sequence) else tuple(value)
        if len(values) != layers:
            raise ConfigError(f"{name} has {len(values)} entries for {layers} layers; give one each, or one for all")
        return values

    def _check(self) -> None:
        fields: dict[str, Any] = {name: getattr(self, name) for name in ("vocab_size", "n_embd", "head_kernel_size")}
        for name in ("kernel_sizes", "n_hidden"):
            fields |= {f"{name}[{layer}]": value for layer, value in enumerate(getattr(self, name))}
        for name, value in fields.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be an integer of at least 1")
        for name, values, known in (
            ("norm", self.norms, NORMS),
            ("activation", self.activations, tuple(ACTIVATIONS)),
            ("bias", (self.bias,), (None, True, False)),
            ("gated", (self.gated,), (True, False)),
            ("head_norm", (self.head_norm,), NORMS),
        ):
            for value in values:
                if not any(value is choice or (isinstance(value, str) and value == choice) for choice in known):
                    raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, known))}")
        plain = self.head_kernel_size == 1 and self.head_norm == "none" and self.bias is not False
        if self.gated and not (plain and {*self.norms} == {"none"} and {*self.activations} == {"tanh"}):
            raise ConfigError(
                "gated layers have biases, their own activation and no norm, and a head of one node without norm; "
                "leave norm, activation, bias, head_kernel_size and head_norm out"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """`n_hidden`, one per layer."""
        assert isinstance(self.n_hidden, tuple)  # since __post_init__
        return self.n_hidden

    @property
    def norms(self) -> tuple[str, ...]:
        """`norm`, one per layer."""
        assert isinstance(self.norm, tuple)  # since __post_init__
        return self.norm

    @property
    def activations(self) -> tuple[str, ...]:
        """`activation`, one per layer."""
        assert isinstance(self.activation, tuple)  # since __post_init__
        return self.activation

    @property
    def biases(self) -> tuple[bool, ...]:
        """Per layer, whether its linear map has a bias; `bias` is None where layers differ."""
        return tuple(norm != "batch" if self.bias is None else self.bias for norm in self.norms)

    @property
    def context(self) -> int:
        """Tokens that one prediction sees: the product of the kernel sizes, the head's included."""
        return prod(self.kernel_sizes) * self.head_kernel_size

    @property
    def dilations(self) -> tuple[int, ...]:
        """Per layer, the distance between two taps: the product of the kernel sizes below it."""
        return tuple(prod(self.kernel_sizes[:layer]) for layer in range(len(self.kernel_sizes)))
