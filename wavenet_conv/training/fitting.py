"""The training loop: validates as the recipe says, stops in time and leaves the best weights in the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from time import monotonic
from typing import Any

import torch

from ..config import WaveNetConfig
from ..model import ConvWaveNet
from ..recipe import PRESETS, Recipe, teachers_of
from ..vocabulary import Vocabulary
from .trainer import Trainer

OnValidation = Callable[[Trainer], bool | None]


def run(trainer: Trainer, *, seconds: float | None = None, on_validation: OnValidation | None = None) -> None:
    """Train to the end; afterwards `trainer.model` has the best weights and is in evaluation mode.

    The weights at the start are validated too, so a trained model is never worse afterwards on the validation names.

    Args:
        trainer: new, or restored from a state.
        seconds: stop after the first validation that ends after so many seconds of training, earlier runs included.
        on_validation: called after each later validation, such as to save `trainer.state()`; True ends the training.

    Raises:
        TrainingError: where a loss is NaN or has exploded.
    """
    recipe, begin, stop = trainer.recipe, monotonic() - trainer.seconds, False
    if not trainer.validations:
        trainer.validate()
    while not (trainer.finished or stop):
        trainer.advance()
        if trainer.step % recipe.eval_every == 0 or trainer.step == recipe.steps:
            trainer.validate()
            trainer.seconds = monotonic() - begin
            stop = bool(on_validation and on_validation(trainer))
            stop = stop or (seconds is not None and trainer.seconds >= seconds)
    trainer.model.load_state_dict(trainer.best_weights)
    trainer.model.eval()


def fit(
    model: ConvWaveNet,
    vocab: Vocabulary,
    train: Sequence[str],
    valid: Sequence[str],
    recipe: Recipe | None = None,
    *,
    teachers: Sequence[ConvWaveNet] = (),
    seconds: float | None = None,
    on_validation: OnValidation | None = None,
) -> Trainer:
    """Train a model in place, and leave it with the best weights and in evaluation mode; returns the trainer.

    The weights at the start are among those that are compared. Give a trained model a small learning rate.

    Args:
        model: the model, on any device.
        vocab: its vocabulary.
        train: names to train on.
        valid: names to validate on.
        recipe: how to train (default: `Recipe()`, which has no teachers).
        teachers: models in evaluation mode from which it learns too (`Recipe.distill_weight`).
        seconds: see `run`.
        on_validation: see `run`.
    """
    trainer = Trainer(model, vocab, train, valid, recipe or Recipe(), teachers)
    run(trainer, seconds=seconds, on_validation=on_validation)
    return trainer


def new_model(
    config: WaveNetConfig, seed: int = 42, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> ConvWaveNet:
    """A model whose weights are drawn from `seed`: the same on all devices, and no other random state changes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ConvWaveNet(config, dtype=dtype).to(device)


def fit_preset(
    preset: str,
    vocab: Vocabulary,
    train: Sequence[str],
    valid: Sequence[str],
    *,
    seed: int = 42,
    steps: float = 1.0,
    trained: dict[tuple[str, int], ConvWaveNet] | None = None,
    on_validation: OnValidation | None = None,
) -> Trainer:
    """Train a preset on the CPU, after its teachers, as `wavenet-conv train --preset` does; returns its trainer.

    `steps` is the share of each recipe's steps to take; `seed` is the preset's, and its teachers have those after it.
    Teachers in `trained`, by preset and seed, are not trained again, and new ones are added.
    """
    trained = {} if trained is None else trained

    def fitted(shape: dict[str, Any], recipe: Recipe, teachers: Sequence[ConvWaveNet] = ()) -> Trainer:
        recipe = replace(recipe, steps=max(1, int(recipe.steps * steps)))
        model = new_model(WaveNetConfig(vocab_size=len(vocab), **shape), recipe.seed)
        return fit(model, vocab, train, valid, recipe, teachers=teachers, on_validation=on_validation)

    teachers = teachers_of(preset, seed)
    for name, shape, recipe in teachers:
        if (name, recipe.seed) not in trained:
            trained[name, recipe.seed] = fitted(shape, recipe).model
    shape, recipe = PRESETS[preset]
    return fitted(shape, replace(recipe, seed=seed), [trained[name, own.seed] for name, _, own in teachers])
