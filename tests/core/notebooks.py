"""Models as people write them who follow the makemore lectures: each kind with the layers that it must map to.

Every spelling of a part makes one kind, and `kind` registers whole models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from core import spellings
from core.spellings import EPS, LINEARS, NORMS, Layer, Part, embedding, fan_in, fresh, head, run, tree
from helpers import random_tree
from torch import nn, rand, randn

from wavenet_conv import WaveNetConfig


@dataclass(frozen=True)
class Kind:
    """A function that builds a model, and the fields of its `WaveNetConfig` and the eps of its batch norms.

    With `bits`, each weight is a tensor of the model, bit for bit.
    """

    make: Callable[[], Any]
    bits: bool = False
    eps: float = EPS
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> WaveNetConfig:
        return WaveNetConfig(**(dict(n_embd=6, n_hidden=10, kernel_sizes=(2, 2, 2)) | self.fields))


KINDS: dict[str, Kind] = {}
TANH = "tanh"


def build(make: str | Callable[[], Any], dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """The model of a kind or a function, of tensors of one dtype."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            return (KINDS[make].make if isinstance(make, str) else make)()
        finally:
            torch.set_default_dtype(before)


def kind(bits: bool = False, **fields: Any) -> Callable[..., Any]:
    def register(make: Callable[[], Any]) -> Callable[[], Any]:
        KINDS[make.__name__] = Kind(make, bits, EPS, fields)
        return make

    return register


def register_spellings() -> None:
    def add(part: str, name: str, bits: bool = True, eps: float = EPS, **fields: Any) -> None:
        KINDS[f"{part}: {name}"] = Kind(partial(tree, **{part: name}), bits, eps, fields)

    for name in spellings.MERGES:
        add("merge", name, name != "channel by channel")
    for name in LINEARS:
        biased = name in ("matmul and bias", "F.linear", "nn.Linear", "addmm", "a matrix per child", "weight_norm")
        add("linear", name, name not in ("with a gain", "low rank", "weight_norm"), bias=biased)
    for name in NORMS:
        eps = 0.0 if name in ("no eps", "eps as a tensor") else EPS
        add("norm", name, name not in ("eps as a tensor", "no gain"), eps)
    for name in [*spellings.FOLDING, *spellings.OTHERS]:
        add("norm", name, name in spellings.OTHERS, norm="layer" if name == "nn.LayerNorm" else "none")
    for name, (known, _) in spellings.ACTIVATIONS.items():
        add("activation", name, activation=known)
    for name in spellings.WRAPPERS:
        add("wrapper", name)


register_spellings()


@kind(bits=True, kernel_sizes=(3,), norm="none")
def mlp_of_globals():
    global C, W1, b1, W2, b2
    C, W1, b1, W2, b2 = randn(27, 6), fan_in(18, 10), randn(10), fan_in(10, 27), randn(27)
    return globals_forward


def globals_forward(X):
    h = torch.tanh(C[X].view(-1, 18) @ W1 + b1)
    return h @ W2 + b2


@kind(kernel_sizes=(3,), norm="none")
def mlp_of_the_third_lecture():
    """Batch norm by a running mean and standard deviation, with no eps."""
    p = SimpleNamespace(C=randn(27, 6), W1=fan_in(18, 10), bngain=rand(1, 10) + 0.5, bnbias=randn(1, 10))
    p.mean, p.std, p.W2, p.b2 = randn(1, 10), rand(1, 10) + 0.5, fan_in(10, 27), randn(27)

    def forward(X):
        hpreact = p.C[X].view(X.shape[0], -1) @ p.W1
        hpreact = p.bngain * (hpreact - p.mean) / p.std + p.bnbias
        return torch.tanh(hpreact) @ p.W2 + p.b2

    return forward


@kind(kernel_sizes=(3,), norm="none")
def learned_positions_in_a_flat_mlp():
    C, P, W, V = nn.Embedding(27, 6), nn.Embedding(3, 6), fan_in(18, 10), randn(10, 27)
    return lambda x: torch.tanh((C(x) + P(torch.arange(x.shape[1]))).flatten(1) @ W) @ V


@kind(kernel_sizes=(1,), n_hidden=27, norm="none", activation="none", n_embd=27)
def bigram_table():
    return fresh(nn.Sequential(nn.Embedding(27, 27), nn.Flatten()))


@kind(kernel_sizes=(1,), n_hidden=27, norm="none", activation="none", n_embd=27)
def one_hot():
    W = randn(27, 27)
    return lambda x: F.one_hot(x.view(-1), num_classes=27).to(W.dtype) @ W


@kind(kernel_sizes=(1,), n_hidden=27, norm="none", activation="none", n_embd=27, head_kernel_size=3)
def one_hots_side_by_side():
    W = randn(81, 27)
    return lambda x: F.one_hot(x, 27).to(W).view(-1, 81) @ W


@kind(bits=True, kernel_sizes=(2,), norm="none", head_kernel_size=4)
def head_that_merges():
    pairs = nn.Sequential(nn.Unflatten(1, (4, 2)), nn.Flatten(2), nn.Linear(12, 10))
    return fresh(nn.Sequential(nn.Embedding(27, 6), pairs, nn.Tanh(), nn.Flatten(), nn.Linear(40, 27)))


@kind(bits=True, kernel_sizes=(3, 1, 2), n_hidden=(8, 9, 10), activation="relu")
def sizes_that_differ():
    return tree((3, 1, 2), (8, 9, 10), activation="clamp")


@kind(bits=True, kernel_sizes=(2, 1, 2, 1), n_hidden=(8, 10, 9, 10), norm="none", activation=("none", "tanh") * 2)
def two_linear_maps_per_merge():
    flat = lambda: Layer(lambda x: x.view(x.shape[0], x.shape[1] // 2, -1))
    linear = lambda i, o: fresh(nn.Linear(i, o))
    lower = [embedding(), flat(), linear(12, 8), linear(8, 10), nn.Tanh()]
    return [*lower, flat(), linear(20, 9), linear(9, 10), nn.Tanh(), head()]


@kind(bits=True, kernel_sizes=(2, 2), head_norm="batch")
def norm_of_logits():
    return [*tree((2, 2))[:-1], fresh(nn.Linear(10, 27)), fresh(nn.BatchNorm1d(27))]


@kind(kernel_sizes=(2, 2), norm="none")
def norm_after_the_activation():
    layers = tree((2, 2))
    return [layers[i] for i in (0, 1, 2, 4, 3, 5, 6, 8, 7, 9)]


@kind(kernel_sizes=(2, 2), norm="none")
def norm_of_the_embedding():
    layers = tree((2, 2), norm="nn.Identity")
    return [layers[0], NORMS["around, permuted"](6), *layers[1:]]


@kind(kernel_sizes=(2, 2, 1), n_hidden=(10, 20, 10), norm=("none", "batch", "none"), activation=("none", TANH, TANH))
def norm_of_merged_channels_before_the_activation():
    embed, merge, linear, *_ = tree((2, 2), norm="nn.Identity")
    above = [LINEARS["nn.Linear"](1, 20, 10), nn.Tanh(), head()]
    return [embed, merge, linear, merge, NORMS["lecture"](20), nn.Tanh(), *above]


@kind(kernel_sizes=(2,), norm="none")
def norm_of_merged_channels_before_the_linear_map():
    layers = tree((2,), norm="nn.Identity")
    return [*layers[:2], NORMS["lecture"](12), *layers[2:]]


@kind(kernel_sizes=(2, 1) * 2, n_hidden=(12, 10, 20, 10), norm=("layer", "none") * 2, activation=("none", "tanh") * 2)
def layer_norm_of_merged_channels():
    layers = tree((2, 2), norm="nn.Identity")
    return [*layers[:2], fresh(nn.LayerNorm(12)), *layers[2:6], fresh(nn.LayerNorm(20)), *layers[6:]]


@kind(kernel_sizes=(1, 2, 1), n_hidden=(6, 10, 10), norm=("layer", "none", "layer"), activation=("none", TANH, "none"))
def layer_norm_first():
    layers = tree((2,), norm="nn.Identity")
    return [layers[0], fresh(nn.LayerNorm(6)), *layers[1:5], fresh(nn.LayerNorm(10)), layers[5]]


class ChannelsFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(27, 6)
        self.convs = nn.ModuleList([nn.Conv1d(i, 10, 2, stride=2, bias=False) for i in (6, 10, 10)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(10) for _ in range(3)])
        self.lm_head = nn.Conv1d(10, 27, 1)

    def forward(self, idx):
        x = self.emb(idx).permute(0, 2, 1)
        for conv, norm in zip(self.convs, self.norms):
            x = F.tanh(norm(conv(x)))
        return self.lm_head(x).squeeze(-1)


@kind(bits=True)
def channels_first():
    return fresh(ChannelsFirst())


class LeftAndRight(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(27, 6)
        self.left, self.right = (nn.ModuleList([nn.Linear(i, 10, bias=b) for i in (6, 10, 10)]) for b in (True, False))
        self.bns = nn.ModuleList([nn.BatchNorm1d(10) for _ in range(3)])
        self.out = nn.Linear(10, 27)

    def forward(self, x):
        x = self.emb(x)
        for left, right, bn in zip(self.left, self.right, self.bns):
            x = left(x[:, ::2]) + right(x[:, 1::2])
            x = bn(x.mT).mT.tanh()
        return self.out(x.squeeze(dim=1))


@kind(bias=True)
def a_matrix_for_the_left_and_the_right_child():
    return fresh(LeftAndRight())


@kind(n_embd=10, norm="none")
def tied_weights_and_a_temperature():
    table, layers = 0.4 * randn(27, 10), tree(norm="nn.Identity")
    layers[2] = LINEARS["nn.Linear"](2, 10, 10)
    return lambda x: run(layers[1:-1], table[x]) @ table.T / 0.8


@kind(bits=True, gated=True, n_hidden=(5, 3), kernel_sizes=(2, 3))
def reference_gated():
    return random_tree((2, 3), n_embd=6, n_hidden=(5, 3), gated=True, dtype=torch.get_default_dtype()).layers


class Gated(nn.Module):
    """The paper's block with a linear layer each for filter and gate, and skip sums."""

    def __init__(self, channels=6, gate=5, layers=3):
        super().__init__()
        self.emb = nn.Embedding(27, channels)
        make = lambda i, o: nn.ModuleList([nn.Linear(i, o) for _ in range(layers)])
        self.filters, self.gates = make(2 * channels, gate), make(2 * channels, gate)
        self.residuals, self.skips = make(gate, channels), make(gate, channels)
        self.post = nn.Sequential(nn.ReLU(), nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, 27))

    def forward(self, x):
        h, skips = self.emb(x), None
        for f, g, residual, skip in zip(self.filters, self.gates, self.residuals, self.skips):
            pairs = h.reshape(h.shape[0], h.shape[1] // 2, -1)
            z = torch.tanh(f(pairs)) * torch.sigmoid(g(pairs))
            skips = skip(z) if skips is None else skip(z) + skips[:, 1::2]
            h = residual(z) + h[:, 1::2]
        return self.post(skips)


@kind(gated=True, n_hidden=5)
def gated_module():
    return fresh(Gated())


@kind(norm="none", activation="sigmoid")
def tanh_by_sigmoid():
    layers = tree(norm="nn.Identity")
    layers[4::4] = [Layer(lambda x: 2 * torch.sigmoid(2 * x) - 1) for _ in range(3)]
    return layers


@kind(norm="batch", kernel_sizes=(2,))
def scaled_tanh():
    layers = tree((2,))
    return [*layers[:4], Part(lambda x: 1.7159 * torch.tanh(2 * x / 3) + 0.1), layers[5]]


@kind(kernel_sizes=(1,) * 100, norm="none", bits=True)
def hundred_layers():
    return tree((1,) * 100, norm="nn.Identity")


@kind(kernel_sizes=(4,), bits=True)
def flat_of_torch():
    first = nn.Linear(24, 10, bias=False)
    return fresh(
        nn.Sequential(nn.Embedding(27, 6), nn.Flatten(), first, nn.BatchNorm1d(10), nn.Tanh(), nn.Linear(10, 27))
    )
