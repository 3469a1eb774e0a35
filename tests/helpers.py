"""Shared by all tests: random trees, exact arithmetic, Python in another process, and what this machine has."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch

import reference
from wavenet_conv import Vocabulary, from_tree

ROOT = Path(__file__).parent.parent
ALPHABET = "abcdefghijklmnopqrstuvwxyz"

try:
    import numba  # noqa: F401

    HAS_NUMBA = True
except ImportError:  # it is missing, or does not support the NumPy that is installed
    HAS_NUMBA = False
needs_numba = pytest.mark.skipif(not HAS_NUMBA, reason="needs Numba: pip install 'wavenet-conv[fast]'")

# Kinds of tree, as arguments of `random_tree`, which repeats a tuple for as many layers as there are.
LAYER_NORM = {"norm": "layer", "activation": "gelu", "head_norm": "layer"}
MIXED: dict = {"norm": ("layer", "batch", "none"), "activation": ("silu", "none", "sigmoid", "relu")}
MIXED |= {"head_kernel_size": 2, "head_norm": "batch"}
EXACT = {"activation": ("relu", "tanh", "none"), "head_kernel_size": 2, "head_norm": "batch"}  # with a clamp for tanh
LINEAR = {"norm": "none", "activation": "none"}
KINDS: list[dict] = [{"norm": "batch"}, {"norm": "none"}, {"gated": True}, LAYER_NORM, MIXED, LINEAR]


def parts_of(tree) -> list[reference.layers.Layer]:
    """The layers of a tree in order, with a gated block's linear layers instead of the block."""
    inside = [vars(layer).values() if isinstance(layer, reference.GatedBlock) else [layer] for layer in tree.layers]
    return [part for parts in inside for part in parts if isinstance(part, reference.layers.Layer)]


def norms_of(tree) -> list[reference.BatchNorm1d]:
    """The batch norms of a tree in order."""
    return [layer for layer in tree.layers if isinstance(layer, reference.BatchNorm1d)]


def assert_same_gradients(tree, conv):
    """Every parameter of the model has the gradient of its parameter in the tree, in float64; overwrites the tree."""
    for parameter in tree.parameters():
        parameter.data = parameter.grad
    pairs = list(zip(conv.parameters(), from_tree(tree).parameters(), strict=True))
    for parameter, expected in pairs:  # sums round to 1e-15, small variances magnify that
        assert (parameter.grad - expected).abs().max() < 1e-10
    assert sum(float(expected.data.abs().sum()) for _, expected in pairs) > 0.1


def random_tree(kernel_sizes=(2, 2, 2), dtype=torch.float64, device="cpu", seed=0, **sizes) -> reference.Sequential:
    """A tree in evaluation mode in which no weight, bias, gamma, beta or running statistic has its initial value.

    Statistics of 0 and 1 would hide a batch norm that is dropped, folded twice or read in the wrong order.
    """
    generator = torch.Generator().manual_seed(seed)
    repeated = {
        name: list(islice(cycle(value), len(kernel_sizes))) for name, value in sizes.items() if type(value) is tuple
    }
    tree = reference.build(kernel_sizes, generator=generator, **sizes | repeated)
    with torch.no_grad():
        for layer in parts_of(tree):
            if hasattr(layer, "gamma"):
                layer.gamma.uniform_(0.5, 1.5, generator=generator)
                layer.beta.normal_(std=0.5, generator=generator)
            if isinstance(layer, reference.BatchNorm1d):
                layer.running_mean = torch.randn(layer.gamma.shape, generator=generator)
                layer.running_var = torch.rand(layer.gamma.shape, generator=generator) + 0.5
            elif isinstance(layer, reference.Linear) and layer.bias is not None:
                layer.bias.normal_(std=0.5, generator=generator)
        if isinstance(tree.layers[-1], reference.Linear):
            tree.layers[-1].weight.mul_(10)  # the head starts ten times smaller, which would hide differences
    return tree.eval().to(dtype=dtype, device=device)


@st.composite
def trees_and_names(draw):
    """Arguments of `random_tree` of any kind and size, ragged names in any order, and their vocabulary."""
    kernel_sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    widths = draw(st.lists(st.integers(1, 9), min_size=len(kernel_sizes), max_size=len(kernel_sizes)))
    alphabet = draw(st.sampled_from(["a", "ab", ALPHABET, "-é 😀ß"]))
    context = torch.tensor(kernel_sizes).prod().item()
    longest = 3 * context if context <= 60 else context + 9  # several contexts long, unless that is slow
    name = st.integers(0, longest).flatmap(lambda n: st.text(alphabet, min_size=n, max_size=n))
    sizes = dict(
        kernel_sizes=kernel_sizes,
        n_hidden=widths,
        n_embd=draw(st.integers(1, 7)),
        vocab_size=len(set(alphabet)) + 1,
        **draw(st.sampled_from(KINDS)),
        seed=draw(st.integers(0, 999)),
    )
    return sizes, draw(st.lists(name, min_size=1, max_size=6)), Vocabulary(alphabet)


@st.composite
def numberings(draw):
    """A notebook's numbers: its vocabulary, `order`, and names.

    `order[token]` is the token of the same character in `Vocabulary(ALPHABET[:n])`, whose names `standard` are the
    notebook's `names` in other letters. The end is anywhere, and `.` may be a character.
    """
    end = draw(st.sampled_from([".", "<E>", "\n", ""]))
    characters = draw(st.lists(st.sampled_from([c for c in ".\n\0aZé😀ß b" if c != end]), min_size=1, unique=True))
    order = draw(st.permutations(range(len(characters) + 1)))
    standard = draw(st.lists(st.text(ALPHABET[: len(characters)], max_size=20), min_size=1, max_size=6))
    keys = [end if token == 0 else characters[token - 1] for token in order]
    mapping = draw(st.sampled_from([keys, dict(enumerate(keys)), {key: token for token, key in enumerate(keys)}]))
    names = [name.translate({ord(ALPHABET[i]): c for i, c in enumerate(characters)}) for name in standard]
    return Vocabulary.from_mapping(mapping, end=end), order, names, standard


def renumbered(tree: reference.Sequential, order: Sequence[int]) -> reference.Sequential:
    """The same tree with its token `order[t]` as token t."""
    tree = copy.deepcopy(tree)
    last = next(place for place, layer in reversed([*enumerate(tree.layers)]) if isinstance(layer, reference.Linear))
    with torch.no_grad():
        tree.layers[0].weight.copy_(tree.layers[0].weight[torch.tensor(order)])
        for part in tree.layers[last:]:  # the head, and its norm
            for tensor in (tensor for tensor in vars(part).values() if isinstance(tensor, torch.Tensor)):
                if tensor.shape[-1:] == (len(order),):
                    tensor.copy_(tensor.index_select(-1, torch.tensor(order)))
    return tree


def to_exact(tree, seed=0):
    """Small integers as weights and powers of two as scales: every sum is exact in float64, in any order."""
    generator = torch.Generator().manual_seed(seed)

    def integers(like, low=-2, high=3):
        return torch.randint(low, high, like.shape, generator=generator).to(like.dtype)

    for layer in parts_of(tree):
        if isinstance(layer, reference.BatchNorm1d):  # layer norm is never exact
            layer.eps = 0.0
            layer.gamma = 2.0 ** integers(layer.gamma)
            layer.running_var = 4.0 ** integers(layer.gamma, -1, 2)
            layer.beta, layer.running_mean = integers(layer.beta), integers(layer.running_mean)
        elif hasattr(layer, "weight"):
            layer.weight = integers(layer.weight)
            if getattr(layer, "bias", None) is not None:
                layer.bias = integers(layer.bias)
    return tree


def run_python(
    code: str, *arguments: object, blocked: Sequence[str] = (), env: Mapping[str, str] | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Runs Python code at the root of the repository in another process, where the imports of `blocked` modules fail.

    `arguments` are `sys.argv[1:]`, `env` changes the environment, `check` makes an exit code other than 0 an error.
    """
    block = f"import runpy, sys; sys.modules.update(dict.fromkeys({list(blocked)!r}))\n"
    command = [sys.executable, "-c", block + code, *map(str, arguments)]
    environment = os.environ | dict(env or {})
    return subprocess.run(command, cwd=ROOT, env=environment, check=check, capture_output=True, text=True)
