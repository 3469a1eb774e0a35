"""The lecture's layers: each keeps its last output in `.out`; weights are `(fan_in, fan_out)`."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Layer:
    """Base of all layers; one without parameters."""

    out: Any
    forward: Any

    def __call__(self, x: Any) -> Any:
        self.out = self.forward(x)
        return self.out

    def parameters(self) -> list[Tensor]:
        return []

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "out"}  # a copy has no output yet

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Replaces every tensor by `tensor.to(...)` and drops the outputs."""
        vars(self).pop("out", None)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.detach().to(*args, **kwargs).requires_grad_(value.requires_grad))
            for layer in value if isinstance(value, list) else [value]:
                if isinstance(layer, Layer):
                    layer.to(*args, **kwargs)
        return self


class Embedding(Layer):
    """Tokens `(..., time)` to their rows of `weight` `(vocab, n_embd)`: `(..., time, n_embd)`."""

    def __init__(self, num_embeddings: int, embedding_dim: int, generator: torch.Generator | None = None):
        self.weight = torch.randn(num_embeddings, embedding_dim, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.weight[tokens]

    def parameters(self) -> list[Tensor]:
        return [self.weight]


class Linear(Layer):
    """`x @ weight + bias` over the last axis, weight `(fan_in, fan_out)`, drawn normal over sqrt(fan_in)."""

    def __init__(self, fan_in: int, fan_out: int, bias: bool = True, generator: torch.Generator | None = None):
        self.weight = torch.randn(fan_in, fan_out, generator=generator) / fan_in**0.5
        self.bias = torch.zeros(fan_out) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        out = x @ self.weight
        return out if self.bias is None else out + self.bias

    def parameters(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]


class BatchNorm1d(Layer):
    """Batch norm over all axes but the last, with unbiased variance and running statistics by momentum.

    `per_position=True` is the bug that the lecture finds and fixes: only the first axis is reduced.
    """

    def __init__(self, dim: int, eps: float = 1e-5, momentum: float = 0.1, per_position: bool = False):
        self.eps, self.momentum, self.per_position = eps, momentum, per_position
        self.training = True
        self.gamma, self.beta = torch.ones(dim), torch.zeros(dim)
        self.running_mean, self.running_var = torch.zeros(dim), torch.ones(dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            axes = (0,) if self.per_position else tuple(range(x.ndim - 1))
            if prod(x.shape[axis] for axis in axes) < 2:
                raise ValueError("one value per channel has no variance; give it more than one example")
            mean, var = x.mean(axes, keepdim=True), x.var(axes, keepdim=True)  # unbiased
            with torch.no_grad():
                self.running_mean = (1 - self.momentum) * self.running_mean + self.momentum * mean
                self.running_var = (1 - self.momentum) * self.running_var + self.momentum * var
        else:
            mean, var = self.running_mean, self.running_var
        return self.gamma * (x - mean) / torch.sqrt(var + self.eps) + self.beta

    def parameters(self) -> list[Tensor]:
        return [self.gamma, self.beta]


class LayerNorm(Layer):
    """Layer norm: every node by the mean and the biased variance of its own channels, the last axis."""

    def __init__(self, dim: int, eps: float = 1e-5):
        self.eps = eps
        self.gamma, self.beta = torch.ones(dim), torch.zeros(dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.gamma.shape, self.gamma, self.beta, self.eps)

    def parameters(self) -> list[Tensor]:
        return [self.gamma, self.beta]


class Tanh(Layer):
    """tanh of every element."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


class ReLU(Layer):
    """The greater of 0 and every element."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x)


class GELU(Layer):
    """Every element times the standard normal distribution function of it, exactly."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x)


class SiLU(Layer):
    """Every element times its sigmoid."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Sigmoid(Layer):
    """The sigmoid of every element."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)


class FlattenConsecutive(Layer):
    """Fuses `n` neighbours: `(batch, time, channels)` to `(batch, time / n, n * channels)`; a time of 1 has no axis."""

    def __init__(self, n: int):
        self.n = n

    def forward(self, x: Tensor) -> Tensor:
        batch, time, channels = x.shape if x.ndim == 3 else (len(x), 1, x.shape[1])
        if time % self.n:
            raise ValueError(f"FlattenConsecutive({self.n}) got {time} nodes, which {self.n} does not divide")
        x = x.reshape(batch, time // self.n, self.n * channels)
        return x.squeeze(1) if x.shape[1] == 1 else x


class GatedBlock(Layer):
    """Fuses `n` neighbours by the WaveNet paper's block: gate, residual, skip (arXiv:1609.03499, 2.3 and 2.4).

    A node has two values, h and s, both `(batch, time, channels)`; after an Embedding, which has no s, s is 0. `linear`
    computes f and g, side by side, from the h of all children, then with `z = tanh(f) * sigmoid(g)`:

        h = residual(z) + h(last child)    s = skip(z) + s(last child)

    The output is the pair (h, s), or s alone from the last block, whose `residual` is None.
    """

    def __init__(self, n: int, channels: int, gate: int, last: bool = False, generator: torch.Generator | None = None):
        self.n = n
        self.linear = Linear(n * channels, 2 * gate, generator=generator)
        self.residual = None if last else Linear(gate, channels, generator=generator)
        self.skip = Linear(gate, channels, generator=generator)

    def forward(self, x: Tensor | tuple[Tensor, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        h, s = x if isinstance(x, tuple) else (x, torch.zeros_like(x))
        fuse, channels = FlattenConsecutive(self.n), h.shape[-1]
        h, s = fuse(h), fuse(s)
        f, g = self.linear(h).chunk(2, dim=-1)
        z = torch.tanh(f) * torch.sigmoid(g)
        s = self.skip(z) + s[..., -channels:]
        return s if self.residual is None else (self.residual(z) + h[..., -channels:], s)

    def parameters(self) -> list[Tensor]:
        inner = [self.linear, *([] if self.residual is None else [self.residual]), self.skip]
        return [p for linear in inner for p in linear.parameters()]


class Sequential(Layer):
    """Layers called in order."""

    def __init__(self, layers: list[Layer]):
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def parameters(self) -> list[Tensor]:
        return [p for layer in self.layers for p in layer.parameters()]

    def train(self, mode: bool = True) -> Sequential:
        for layer in self.layers:
            if hasattr(layer, "training"):
                layer.training = mode
        return self

    def eval(self) -> Sequential:
        return self.train(False)

    def requires_grad(self) -> Sequential:
        for parameter in self.parameters():
            parameter.requires_grad = True
        return self
