"""`wavenet-conv train`: a list of names in, a checkpoint out, resumable."""

from __future__ import annotations

import json
import os
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, UsageError, WaveNetConvError
from ..recipe import PRESETS, Recipe, split_names, teachers_of
from .options import add_command, add_device, check_output, load_model, training_names, usage_errors

if TYPE_CHECKING:
    from ..model import ConvWaveNet, WaveNetConfig
    from ..training import Trainer
    from ..vocabulary import Vocabulary
    from .resumable import Run, Setup

DESCRIPTION = """\
Trains a model on a list of names, one per line, and writes a checkpoint for `wavenet-conv score --model`. The list is
split as in the lecture: shuffled with seed 42, then 80% to train on, 10% to validate on and 10% to test on (read only
with --test, once, at the end). The weights with the lowest validation loss are kept.

The state of the run is saved in OUTPUT.training after each validation. --resume continues from there, to the same bits
as an uninterrupted run (on the CPU, with the same number of threads), or starts from the beginning without such a file.
Under torchrun each rank takes its share of each batch; without dropout N ranks train as one.
"""

RECIPE_HELP = {
    "batch_size": "names per step",
    "lr": "the highest learning rate",
    "warmup": "share of the steps in which the learning rate rises",
    "weight_decay": "decay of the weight matrices",
    "dropout": "probability that a linear map does not see an input channel",
    "ema_decay": "keep the moving average of the weights with this decay per step",
    "eval_every": "steps between validations",
    "patience": "stop after so many validations without a lower loss; 0 does not",
    "distill_weight": "share of the targets that teachers give",
    "seed": "of the weights, the order of the names and dropout",
}


def add_parser(commands: Any) -> None:
    """Add `wavenet-conv train`."""
    command = add_command(commands, train, "train a model on a list of names", DESCRIPTION)
    command.set_defaults(hint="; start again with the same arguments and --resume to continue")
    add = command.add_argument
    add("file", metavar="FILE", help="one name per line, UTF-8")
    add("-o", "--output", required=True, metavar="OUTPUT", help="where the checkpoint is written")
    add("--preset", choices=list(PRESETS), default="fast", help="model and recipe to start from (fast)")
    help = "a checkpoint to learn from, in place of the preset's teachers; may be repeated"
    add("--teacher", action="append", default=[], metavar="PATH", help=help)
    add("--kernel-sizes", type=_integers, metavar="2,2,2", help="how many nodes each layer fuses, lowest first")
    add("--n-embd", type=int, metavar="N", help="width of the embedding")
    add("--n-hidden", type=int, metavar="N", help="width of every layer")
    add("--gated", action="store_true", default=None, help="gated layers with residual and skip connections")
    length = command.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help="steps to take")
    length.add_argument("--epochs", type=int, metavar="N", help="times to see every name")
    add("--seconds", type=float, metavar="S", help="stop after the validation that ends after S seconds of training")
    for name, text in RECIPE_HELP.items():
        kind = type(getattr(Recipe, name))
        add(f"--{name.replace('_', '-')}", type=kind, metavar="N" if kind is int else "X", help=text)
    add("--optimizer", choices=("adamw", "sgd"), help="of torch.optim")
    add("--schedule", choices=("onecycle", "constant"), help="of the learning rate")
    add("--dtype", choices=("float32", "float64"), default="float32", help="of the weights")
    add_device(command)
    add("--resume", action="store_true", help="continue an interrupted run with the same arguments")
    add("--test", action="store_true", help="measure the test part too, once, at the end")
    add("--plot", metavar="FILE", help="write the loss curves as a picture")
    add("--json", dest="as_json", action="store_true", help="the results as one line of JSON")


def _integers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ArgumentTypeError(f"{text!r} is not a list of integers such as 2,2,2")
    return tuple(map(int, parts))


def train(
    file: str,
    output: str,
    *,
    preset: str = "fast",
    teacher: Sequence[str] = (),
    seconds: float | None = None,
    dtype: str = "float32",
    device: str = "auto",
    resume: bool = False,
    test: bool = False,
    plot: str | None = None,
    as_json: bool = False,
    **settings: Any,
) -> None:
    """Run `wavenet-conv train`; the arguments are its options.

    `settings` are as in `configured`. Raises `UsageError` for what cannot be started, and other `WaveNetConvError`s
    after that.
    """
    from ..plots import check_plot
    from ..vocabulary import Vocabulary
    from .progress import Progress
    from .resumable import Run, Setup, digest, distributed, is_first_rank, locked, sha256_of

    names = training_names(file)
    parts, vocab = split_names(names), Vocabulary.from_names(names)
    config, recipe = configured(preset, len(vocab), settings, len(parts[0]))
    check_output(output, file, *teacher)
    if plot:
        check_plot(plot)
    if seconds is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("--seconds: ranks do not stop at the same step; give --steps under torchrun")
    given = [_loaded(path, vocab) for path in teacher]
    presets = teachers_of(preset, recipe.seed) if recipe.distill_weight and not given else []
    with distributed(device) as place, locked(output) if is_first_rank() else nullcontext():
        say = Progress(quiet=not is_first_rank()).say
        sizes = " / ".join(f"{len(part):,}" for part in parts)
        say(f"{file}: {len(names):,} names, split {sizes} to train, validate and test on")
        setup = Setup(sha256_of(names), vocab, parts, place, dtype, resume)
        identities = [digest(model) for model in given] + [f"{name}, seed {own.seed}" for name, _, own in presets]
        run = Run(setup, output, config, recipe, identities)
        paths = [Path(f"{output}.teacher-{own.seed}") for _, _, own in presets]
        trained = [_teacher(setup, str(path), *own, say) for path, own in zip(paths, presets)]
        trainer = run.train(given + [model for model, _ in trained], seconds)
        if is_first_rank():
            results = {"preset": preset, "seconds": round(trainer.seconds + sum(spent for _, spent in trained), 1)}
            _finish(run, trainer, results, test, plot, as_json)
            for path in paths:
                path.unlink(missing_ok=True)


def configured(
    preset: str, vocab_size: int, settings: dict[str, Any], train_names: int = 0
) -> tuple[WaveNetConfig, Recipe]:
    """The preset with settings that are not None: fields of `Recipe` and of `WaveNetConfig`, and `epochs`."""
    from ..model import WaveNetConfig

    shape, recipe = PRESETS[preset]
    given = {name: value for name, value in settings.items() if value is not None}
    changes = {field.name: given.pop(field.name) for field in fields(Recipe) if field.name in given}
    epochs = given.pop("epochs", None)
    with usage_errors(ConfigError):
        recipe = replace(recipe, **changes)
        if epochs is not None:
            recipe = replace(recipe, steps=epochs * -(-train_names // recipe.batch_size))
        return WaveNetConfig(vocab_size=vocab_size, **{**shape, **given}), recipe


def _loaded(path: str, vocab: Vocabulary) -> ConvWaveNet:
    """The model of a `--teacher`."""
    checkpoint = load_model(path, "--teacher")
    if checkpoint.vocab != vocab:
        characters = f"{checkpoint.vocab.characters!r} and not {vocab.characters!r} as in the list"
        raise UsageError(f"--teacher {path}: its characters are {characters}; give one with the same characters")
    return checkpoint.model


def _teacher(
    setup: Setup, output: str, preset: str, shape: dict[str, Any], recipe: Recipe, say: Callable[[str], None]
) -> tuple[ConvWaveNet, float]:
    """A teacher of a preset, and the seconds that its training took; one that an interrupted run left is read."""
    from ..checkpoint import load_checkpoint
    from ..model import WaveNetConfig
    from .resumable import Run, is_first_rank

    run = Run(setup, output, WaveNetConfig(vocab_size=len(setup.vocab), **shape), recipe)
    with suppress(WaveNetConvError):
        checkpoint = load_checkpoint(output)
        if checkpoint.notes.items() >= run.identity.items():
            return checkpoint.model, checkpoint.notes["seconds"]
    say(f"training a teacher, {preset} with seed {recipe.seed}")
    trainer = run.train()
    if is_first_rank():
        run.save({"seconds": trainer.seconds})
    return trainer.model, trainer.seconds


def _finish(run: Run, trainer: Trainer, results: dict[str, Any], test: bool, plot: str | None, as_json: bool) -> None:
    """Measures the best weights, writes the checkpoint and the plot, and prints the results."""
    from ..plots import plot_losses
    from ..training import Corpus, evaluate

    vocab, model = run.setup.vocab, trainer.model
    results |= {
        "train_loss": evaluate(model, trainer.train_corpus),
        "validation_loss": trainer.best_loss,
        "best_step": trainer.best_step,
        "steps_taken": trainer.step,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    if test:
        results["test_loss"] = evaluate(model, Corpus(run.setup.parts[2], vocab, model))
    run.save(results)
    text = ", ".join(f"{name} {value:.4f}" if "loss" in name else f"{name} {value}" for name, value in results.items())
    print(json.dumps(results) if as_json else text)
    if plot:
        plot_losses(plot, trainer.losses, trainer.validations, model.embedding.weight, vocab.characters)
