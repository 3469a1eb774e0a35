"""Ways to write the parts of a lecture-style tree, from merges to wrappers; `tree` joins them.

No parameter or statistic has its initial value. Tensors have the default dtype.
"""

from __future__ import annotations

from collections import namedtuple
from functools import partial, reduce

import einops
import torch
import torch.nn.functional as F
from einops.layers.torch import Rearrange
from torch import nn, rand, randn

VOCAB, EMBD, HIDDEN, EPS = 27, 6, 10, 1e-3


def fresh(module):
    """A module in evaluation mode whose parameters and statistics are drawn."""
    for parameter in module.parameters():
        parameter.normal_(std=0.4)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm1d) and norm.track_running_stats:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 1.5)
        if isinstance(norm, (nn.BatchNorm1d, nn.LayerNorm)):
            norm.eps = EPS
    return module.eval()


class Layer:
    """A plain class that keeps its last output, as the lecture's; `members` are arguments and attributes."""

    def __init__(self, function, **members):
        self.training, self.function, self.names = False, function, tuple(members)
        vars(self).update(members)

    def __call__(self, x):
        self.out = self.function(x, *(getattr(self, name) for name in self.names))
        return self.out


class Part(nn.Module):
    """The same as a module."""

    def __init__(self, function, **members):
        super().__init__()
        self.function, self.names = function, tuple(members)
        for name, member in members.items():
            setattr(self, name, nn.Parameter(member) if isinstance(member, torch.Tensor) else member)
        self.eval()

    forward = Layer.__call__


def fan_in(*shape):
    """A random weight of this shape for outputs of about 1."""
    return randn(shape) / shape[0] ** 0.5


def embedding(width=EMBD):
    return Layer(lambda ix, C: C[ix], C=randn(VOCAB, width))


def head(inputs=HIDDEN):
    return Layer(lambda x, W, b: x @ W + b, W=fan_in(inputs, VOCAB), b=randn(VOCAB))


# Merges of k neighbours in x (batch, time, channels)


def lecture(x, k):
    x = x.reshape(x.shape[0], x.shape[1] // k, x.shape[2] * k)
    return x.squeeze(1) if x.shape[1] == 1 else x


MERGES = {
    "lecture": lecture,
    "view": lambda x, k: x.contiguous().view(len(x), -1, k * x.shape[2]),
    "squeeze without an axis": lambda x, k: x.reshape(len(x), -1, x.shape[2] * k).squeeze(),
    "cat of even and odd": lambda x, k: torch.cat([x[:, j::k, :] for j in range(k)], dim=-1),
    "stack": lambda x, k: torch.stack([x[:, j::k] for j in range(k)], 2).flatten(2),
    "unbind": lambda x, k: torch.cat(x.unflatten(1, (-1, k)).unbind(2), -1),
    "loop": lambda x, k: torch.stack([torch.cat([*x[:, t : t + k].unbind(1)], 1) for t in range(0, x.shape[1], k)], 1),
    "rearrange": lambda x, k: einops.rearrange(x, "b (t k) c -> b t (k c)", k=k),
    "Rearrange": lambda x, k: Rearrange("b (t k) c -> b t (k c)", k=k)(x),
    "Unflatten and Flatten": lambda x, k: nn.Flatten(2)(nn.Unflatten(1, (-1, k))(x)),
    "unfold": lambda x, k: x.unfold(1, k, k).mT.flatten(2),
    "indexed": lambda x, k: x[:, torch.arange(x.shape[1]).view(-1, k)].flatten(2),
    "swapaxes": lambda x, k: x.swapaxes(0, 1).unflatten(0, (-1, k)).movedim(2, 0).flatten(2),
    "channel by channel": lambda x, k: x.unflatten(1, (-1, k)).mT.flatten(2),
}

# Linear maps of merged channels: of k children of i channels to o


def by_weight(function, bias=False, transposed=False, cls=Layer):
    """A linear map by a weight `(k * i, o)`, or its transpose."""

    def make(k, i, o):
        weight = fan_in(k * i, o).T.contiguous() if transposed else fan_in(k * i, o)
        return cls(function, weight=weight, **({"bias": randn(o)} if bias else {}))

    return make


def per_child(x, b, *matrices):
    return sum(part @ W for part, W in zip(x.chunk(len(matrices), -1), matrices)) + b


LINEARS = {
    "matmul": by_weight(lambda x, W: x @ W),
    "matmul and bias": by_weight(lambda x, W, b: x @ W + b, bias=True, cls=Part),
    "F.linear": by_weight(F.linear, bias=True, transposed=True),
    "nn.Linear": lambda k, i, o: fresh(nn.Linear(k * i, o)),
    "einsum": by_weight(lambda x, W: torch.einsum("...i,io->...o", x, W)),
    "tensordot": by_weight(lambda x, W: torch.tensordot(x, W, 1)),
    "addmm": by_weight(lambda x, W, b: torch.addmm(b, x.flatten(0, -2), W).view(*x.shape[:-1], -1), bias=True),
    "weight from the left": by_weight(lambda x, W: (W @ x[..., None]).squeeze(-1), transposed=True),
    "einsum of children": lambda k, i, o: Layer(
        lambda x, W: torch.einsum("...kc,kco->...o", x.unflatten(-1, W.shape[:2]), W), W=fan_in(k, i, o) / i**0.5
    ),
    "a matrix per child": lambda k, i, o: Layer(per_child, b=randn(o), **{f"W{j}": fan_in(i, o) for j in range(k)}),
    "with a gain": by_weight(lambda x, W: 5 / 3 * (x @ W) / 1.1),
    "low rank": lambda k, i, o: Layer(lambda x, U, V: x @ (U @ V), U=fan_in(k * i, 3), V=fan_in(3, o)),
    "weight_norm": lambda k, i, o: fresh(nn.utils.parametrizations.weight_norm(nn.Linear(k * i, o))),
}

# Norms of a width: functions of x, mean, variance, gamma, beta and eps, or of nn.BatchNorm1d


def spelled(function, names="running_mean running_var gamma beta eps", cls=Layer):
    def make(width):
        members = (randn(width), rand(width) + 0.5, rand(width) + 0.5, randn(width), EPS)
        return cls(function, **dict(zip(names.split(), members)))

    return make


def around(function):
    return lambda width: Part(function, bn=fresh(nn.BatchNorm1d(width)))


def by_einops(x, bn):
    x = einops.rearrange(x, "b t c -> b c t") if x.ndim == 3 else x
    return einops.rearrange(bn(x), "b c t -> b t c") if x.ndim == 3 else bn(x)


def shaped(x, m, v, g, b, e):
    one = (1,) * (x.ndim - 1)
    return (x - m.view(*one, -1)) / torch.sqrt(v.view(*one, -1) + e) * g.view(*one, -1) + b.expand(x.shape)


BatchNorm1D, BatchNormXD = type("BatchNorm1D", (Layer,), {}), type("BatchNormXD", (Part,), {})
NORMS = {  # these stay batch norms
    "lecture": spelled(lambda x, m, v, g, b, e: g * ((x - m) / torch.sqrt(v + e)) + b),
    "bngain": spelled(
        lambda x, m, v, g, b, e: g * (x - m) / torch.sqrt(v + e) + b,
        "running_mean running_variance bngain bnbias epsilon",
    ),
    "BatchNorm1D": spelled(
        lambda x, m, v, g, b, e: (x - m) / (v + e) ** 0.5 * g + b, "mean var scale_by b e", BatchNorm1D
    ),
    "BatchNormXD": spelled(lambda x, m, v, g, b, e: b + g * (x - m) / torch.sqrt(e + v), cls=BatchNormXD),
    "gamma in the middle": spelled(lambda x, m, v, g, b, e: (x - m) * g / (v + e).sqrt() + b),
    "rsqrt": spelled(lambda x, m, v, g, b, e: (x - m) * torch.rsqrt(v + e) * g + b),
    "minus a half": spelled(lambda x, m, v, g, b, e: (x - m) * (v + e) ** -0.5 * g + b),
    "one over the root": spelled(lambda x, m, v, g, b, e: (x - m) * (1 / torch.sqrt(v + e)) * g + b),
    "shaped": spelled(shaped),
    "in place": spelled(lambda x, m, v, g, b, e: x.sub_(m).div_(torch.sqrt(v + e)).mul_(g).add_(b)),
    "eps as a tensor": spelled(lambda x, m, v, g, b, e: (x - m) / torch.sqrt(v + torch.tensor(e)) * g + b),
    "no gain": spelled(lambda x, m, v, g, b, e: (x - m) / torch.sqrt(v + e)),
    "no eps": spelled(lambda x, m, v, g, b, e: (x - m) / torch.sqrt(v) * g + b),
    "F.batch_norm": spelled(
        lambda x, m, v, g, b, e: F.batch_norm(x.reshape(-1, x.shape[-1]), m, v, g, b, eps=e).view(x.shape)
    ),
    "around, permuted": around(lambda x, bn: bn(x.permute(0, 2, 1)).permute(0, 2, 1) if x.ndim == 3 else bn(x)),
    "around, reshaped": around(lambda x, bn: bn(x.view(-1, x.shape[-1])).view(x.shape)),
    "around, transposed": around(lambda x, bn: bn(x.transpose(1, -1)).transpose(1, -1)),
    "around, by einops": around(by_einops),
}
FOLDING = {  # these become part of the linear map
    "running_std": lambda x, m, v, g, b, e: g * (x - m) / v + b,
    "running_std and epsilon": lambda x, m, v, g, b, e: g * (x - m) / (v + e) + b,
    "scale and shift": lambda x, m, v, g, b, e: x * (g * (v + e) ** -0.5) + (b - m * g * (v + e) ** -0.5),
    "gain and bias": lambda x, m, v, g, b, e: x * g + b,
}
OTHERS = {
    "nn.Identity": lambda width: nn.Identity(),
    "nn.Dropout": lambda width: nn.Dropout(0.3).eval(),
    "nn.LayerNorm": lambda width: fresh(nn.LayerNorm(width)),
}
MAKE_NORM = NORMS | {name: spelled(function) for name, function in FOLDING.items()} | OTHERS

# Activations: the name that each maps to, and the function

ACTIVATIONS = {
    "torch.tanh": ("tanh", torch.tanh),
    "nn.Tanh": ("tanh", nn.Tanh()),
    "tanh_": ("tanh", lambda x: x.tanh_()),
    "nn.ReLU in place": ("relu", nn.ReLU(inplace=True)),
    "clamp": ("relu", lambda x: x.clamp(min=0)),
    "clip": ("relu", lambda x: x.clip(0.0)),
    "nn.GELU": ("gelu", nn.GELU()),
    "nn.SiLU": ("silu", nn.SiLU()),
    "x * sigmoid(x)": ("silu", lambda x: x * torch.sigmoid(x)),
    "sigmoid(x) * x": ("silu", lambda x: F.sigmoid(x).mul_(x)),
    "sigmoid": ("sigmoid", torch.sigmoid),
    "with dropout": ("tanh", lambda x: F.dropout(torch.tanh(x), 0.2, training=False)),
    "none": ("none", lambda x: x),
}

# Wrappers of a list of layers


def run(layers, x):
    return reduce(lambda x, layer: layer(x), layers, x)


class Net(nn.Module):
    """Layers under any name, as a Lightning module has them; gives `result(logits, loss)`."""

    def __init__(self, name, layers, result=lambda logits, loss: logits):
        super().__init__()
        self.name, self.result = name, result
        setattr(self, name, layers)
        self.eval()

    def forward(self, xb, targets=None):
        logits = run(getattr(self, self.name), xb)
        loss = None if targets is None else F.cross_entropy(logits, targets)
        return self.result(logits, loss)

    def training_step(self, batch, index):
        return F.cross_entropy(self(batch[0]), batch[1])


class Model:
    """A plain class that runs a list."""

    def __init__(self, layers):
        self.layers = layers

    def __call__(self, x, y=None):
        for layer in self.layers:
            x = layer(x)
        self.logits = x
        return x if y is None else (x, F.cross_entropy(x, y))

    def predict(self, x):
        return self(x)


def modules(layers):
    return nn.ModuleList([layer if isinstance(layer, nn.Module) else Part(layer) for layer in layers]).eval()


Result = namedtuple("Result", "loss logits")
WRAPPERS = {
    "list": lambda layers: layers,
    "nested lists": lambda layers: [layers[:2], [[layers[2]], tuple(layers[3:])]],
    "net": lambda layers: Net("net", layers),
    "all_layers": lambda layers: Net("all_layers", modules(layers)),
    "model": lambda layers: Net("model", nn.Sequential(*modules(layers))),
    "own Sequential": Model,
    "nn.Sequential": lambda layers: nn.Sequential(*modules(layers)).eval(),
    "nn.ModuleList": modules,
    "closure": lambda layers: lambda x: run(layers, x),
    "partial": lambda layers: partial(run, layers),
    "bound method": lambda layers: Model(layers).predict,
    "logits and loss": lambda layers: Net("net", layers, lambda logits, loss: (logits, loss)),
    "namedtuple": lambda layers: Net("net", layers, lambda logits, loss: Result(loss, logits)),
    "dict": lambda layers: Net("net", layers, lambda logits, loss: {"loss": loss, "logits": logits}),
    "one position": lambda layers: Net("net", layers, lambda logits, loss: logits.view(-1, 1, VOCAB)),
    "compiled": lambda layers: torch.compile(Net("net", layers), backend="eager"),
    "DataParallel": lambda layers: nn.DataParallel(Net("net", layers)),
    "no_grad": lambda layers: torch.no_grad()(lambda x: run(layers, x)),
    "inference_mode": lambda layers: torch.inference_mode()(lambda x: run(layers, x)),
}


def tree(
    sizes=(2, 2, 2),
    widths=None,
    merge="lecture",
    linear="matmul",
    norm="lecture",
    activation="torch.tanh",
    wrapper="list",
):
    """A model of these spellings: per kernel size a merge, a linear map, a norm and an activation; then a head."""
    layers, inputs = [embedding()], EMBD
    for size, width in zip(sizes, widths or [HIDDEN] * len(sizes)):
        three_axes = lambda x, k, merge: merge(x if x.ndim == 3 else x[:, None], k)
        layers += [Layer(three_axes, k=size, merge=MERGES[merge]), LINEARS[linear](size, inputs, width)]
        layers += [MAKE_NORM[norm](width), Layer(lambda x, f: f(x), f=ACTIVATIONS[activation][1])]
        inputs = width
    return WRAPPERS[wrapper]([*layers, head(inputs)])
