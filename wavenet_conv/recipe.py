"""How to train: recipes, presets and the lecture's split of a list. Imports no PyTorch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

from .errors import ConfigError


@dataclass(frozen=True)
class Recipe:
    """How to train. The preset "fast" has these defaults but for its teachers, which are n-grams.

    Args:
        steps: optimizer steps.
        batch_size: names per step.
        optimizer: "adamw" or "sgd".
        schedule: "onecycle" (rises to `lr` over the first `warmup` of the steps, then falls to zero) or "constant".
        lr: the highest learning rate.
        warmup: a share of the steps, in which the learning rate rises.
        weight_decay: of the weight matrices; biases, norms and the embedding are not decayed.
        dropout: probability that a linear map does not see an input channel.
        ema_decay: decay per step of the exponential moving average of the weights, which is then what is validated
            and kept; 0 keeps the weights themselves.
        eval_every: steps between validations.
        patience: validations without a new lowest loss after which training stops; 0 never stops early.
        distill_weight: with teachers, their share of the targets; the rest is what follows in the list.
        ngram_share: what part of the teachers' share comes from 6-grams of the list, which need no training; above 0
            and without networks as teachers, all of it. Each name is predicted from the nine tenths of the list that
            it is not in (a repeated name may be in both).
        drawn: names that the networks among the teachers draw, per name of the list; others in each epoch.
        seed: of the initial weights, the order of the names and dropout.

    Raises:
        ConfigError: naming the field that is wrong.
    """

    steps: int = 1500
    batch_size: int = 256
    optimizer: str = "adamw"
    schedule: str = "onecycle"
    lr: float = 1e-2
    warmup: float = 0.25
    weight_decay: float = 0.05
    dropout: float = 0.0
    ema_decay: float = 0.0
    eval_every: int = 100
    patience: int = 0
    distill_weight: float = 0.8
    ngram_share: float = 0.0
    drawn: int = 0
    seed: int = 42

    def __post_init__(self) -> None:
        limits = dict.fromkeys(("steps", "batch_size", "eval_every"), (1, 2**31))
        limits |= dict.fromkeys(("weight_decay", "patience", "seed"), (0, 2**30)) | {"drawn": (0, 1001)}
        limits |= dict.fromkeys(("warmup", "dropout", "ema_decay", "distill_weight"), (0, 1))
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) < high:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {low} and below {high:,}")
        if not 0 <= self.ngram_share <= 1:
            raise ConfigError(f"ngram_share is {self.ngram_share}; it must be from 0 to 1")
        if not (isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"lr is {self.lr}; it must be a positive number")
        for name, known in (("optimizer", ("adamw", "sgd")), ("schedule", ("onecycle", "constant"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be {' or '.join(map(repr, known))}")


_GATED = {"gated": True, "kernel_sizes": (2, 2, 2, 2), "n_embd": 96, "n_hidden": 96}
_TAUGHT: dict[str, Any] = {"steps": 10_000, "batch_size": 512, "eval_every": 500, "ngram_share": 0.3}

# name: (fields of WaveNetConfig without the vocabulary, recipe)
PRESETS: dict[str, tuple[dict[str, Any], Recipe]] = {
    # The lecture's last network, below its last validation loss in seconds; n-grams are its teachers.
    "fast": ({}, Recipe(distill_weight=0.5, ngram_share=0.3)),
    "plain": ({}, Recipe(steps=6000, dropout=0.05, eval_every=250)),
    "gated-plain": (_GATED, Recipe(steps=7000, lr=3e-3, dropout=0.2, eval_every=250)),
    "wide": ({}, Recipe(weight_decay=0.03, **_TAUGHT, drawn=1)),
    "gated": (_GATED, Recipe(lr=3e-3, **_TAUGHT, drawn=4)),
}

# preset: the presets of its teachers, which are trained first
TEACHERS: dict[str, tuple[str, ...]] = {
    "wide": ("gated-plain", "gated-plain", "plain"),
    "gated": ("gated-plain", "gated-plain", "plain", "gated-plain", "gated-plain"),
}


def teachers_of(preset: str, seed: int) -> list[tuple[str, dict[str, Any], Recipe]]:
    """Name, shape and recipe of each teacher of a preset; their seeds are those after `seed`."""
    teachers = [(name, *PRESETS[name]) for name in TEACHERS.get(preset, ())]
    return [(name, shape, replace(recipe, seed=seed + 1 + i)) for i, (name, shape, recipe) in enumerate(teachers)]


def split_names(names: Sequence[str], seed: int = 42) -> tuple[list[str], list[str], list[str]]:
    """The lecture's split: shuffled with `seed`, then 80% to train on, 10% to validate on and 10% to test on."""
    shuffled = list(names)
    random.Random(seed).shuffle(shuffled)
    first, second = int(0.8 * len(shuffled)), int(0.9 * len(shuffled))
    return shuffled[:first], shuffled[first:second], shuffled[second:]
