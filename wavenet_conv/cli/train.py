"""`wavenet-conv train`: a list of names in, a checkpoint out, resumable."""

from __future__ import annotations

import json
import os
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, UsageError, WaveNetConvError
from ..training.recipe import PRESETS, Recipe, split_names, teachers_of
from .options import add_command, add_device, check_output, load_model, training_names, usage_errors

if TYPE_CHECKING:
    from ..model import ConvWaveNet, WaveNetConfig
    from ..vocabulary import Vocabulary
    from .resumable import Run, Setup

DESCRIPTION = """\
Trains a model on a list of names, one per line, and writes a checkpoint for `wavenet-conv score --model` and
Scorer.load. The list is split as in the lecture: shuffled with seed 42, then 80% to train on, 10% to validate on and
10% to test on (read only with --test, once, at the end). The weights with the lowest validation loss are kept.

The state of the run is saved in OUTPUT.training after each validation. --resume continues from there, to the same bits
as an uninterrupted run (on the CPU, with the same number of threads); without such a file it starts from the beginning.

Under torchrun each rank takes its share of each batch; without dropout N ranks train as one.

Exit code 0 when done, 1 for a failed job (a training that broke down, a full disk), 2 for wrong usage, 130 for Ctrl-C.
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
    epochs: int | None = None,
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

    `settings` are fields of `Recipe` and of `WaveNetConfig`; None leaves the preset's. Raises `UsageError` for what
    cannot be started, and other `WaveNetConvError`s after that.
    """
    from ..vocabulary import Vocabulary
    from .progress import Progress
    from .resumable import Run, Setup, distributed, is_first_rank, locked, sha256_of

    names = training_names(file)
    parts, vocab = split_names(names), Vocabulary.from_names(names)
    config, recipe = _configured(preset, len(vocab), len(parts[0]), epochs, settings)
    check_output(output, file, *teacher)
    _check_options(output, seconds, plot)
    given = [_loaded(path, vocab) for path in teacher]
    presets = teachers_of(preset, recipe.seed) if recipe.distill_weight and not given else []
    with distributed(device) as place, locked(output):
        say = Progress(quiet=not is_first_rank()).say
        _report_list(say, file, names, parts)
        setup = Setup(sha256_of(names), vocab, parts, place, dtype, resume)
        setup.check_interrupted(output, config, recipe)  # before teachers are trained
        trained = [
            _teacher(setup, f"{output}.teacher-{own.seed}", name, shape, own, say) for name, shape, own in presets
        ]
        teachers = given + [model for model, _ in trained]
        run = Run(setup, output, config, recipe, teachers)
        run.train(seconds)
        if is_first_rank():
            _finish(run, preset, sum(spent for _, spent in trained), test, plot, as_json)
            for _, _, own in presets:
                with suppress(OSError):
                    os.unlink(f"{output}.teacher-{own.seed}")


def _configured(
    preset: str, vocab_size: int, train_names: int, epochs: int | None, settings: dict[str, Any]
) -> tuple[WaveNetConfig, Recipe]:
    """The preset with the settings that are not None."""
    from ..model import WaveNetConfig

    shape, recipe = PRESETS[preset]
    given = {name: value for name, value in settings.items() if value is not None}
    changes = {field.name: given.pop(field.name) for field in fields(Recipe) if field.name in given}
    with usage_errors(ConfigError):
        recipe = replace(recipe, **changes)
        if epochs is not None:
            recipe = replace(recipe, steps=epochs * -(-train_names // recipe.batch_size))
        return WaveNetConfig(vocab_size=vocab_size, **{**shape, **given}), recipe


def _check_options(output: str, seconds: float | None, plot: str | None) -> None:
    if seconds is not None and not seconds >= 0:
        raise UsageError(f"--seconds is {seconds}; it must be a number of at least 0")
    if seconds is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("--seconds: ranks do not stop at the same step; give --steps under torchrun")
    if plot:
        from ..plots import check_plot

        check_plot(plot)
        if os.path.realpath(plot) == os.path.realpath(output):
            raise UsageError(f"--plot {plot}: this is --output; give another file")


def _loaded(path: str, vocab: Vocabulary) -> ConvWaveNet:
    """The model of a `--teacher`."""
    checkpoint = load_model(path, "--teacher")
    if checkpoint.vocab != vocab:
        raise UsageError(
            f"--teacher {path}: its characters are {checkpoint.vocab.characters!r} and the list's are "
            f"{vocab.characters!r}; give a teacher that was trained on names with the same characters"
        )
    return checkpoint.model


def _teacher(
    setup: Setup, output: str, preset: str, shape: dict[str, Any], recipe: Recipe, say: Callable[[str], None]
) -> tuple[ConvWaveNet, float]:
    """A teacher of a preset, and the seconds that its training took; one that an interrupted run left is read."""
    from ..checkpoint import load_checkpoint
    from ..model import WaveNetConfig
    from .resumable import Run, is_first_rank

    run = Run(setup, output, WaveNetConfig(vocab_size=len(setup.vocab), **shape), recipe)
    if os.path.exists(output):
        with suppress(WaveNetConvError):
            checkpoint = load_checkpoint(output)
            if all(checkpoint.notes.get(name) == value for name, value in run.identity.items()):
                return checkpoint.model, checkpoint.notes["seconds"]
    say(f"training a teacher, {preset} with seed {recipe.seed}")
    run.train()
    if is_first_rank():
        run.save({"seconds": run.trainer.seconds})
    return run.trainer.model, run.trainer.seconds


def _report_list(say: Callable[[str], None], file: str, names: list[str], parts: tuple[list[str], ...]) -> None:
    sizes = " / ".join(f"{len(part):,}" for part in parts)
    say(f"{file}: {len(names):,} names, split {sizes} to train, validate and test on")
    seen, held_out = set(parts[0]), parts[1] + parts[2]
    repeated = len(names) - len(set(names))
    if repeated:
        shared = sum(name in seen for name in held_out)
        say(f"{repeated:,} names are repetitions; {shared:,} validation and test names are also trained on")
    unseen = sorted(set("".join(held_out)) - set("".join(parts[0])))
    if unseen:
        say(f"characters that are never trained on: {' '.join(unseen)}")


def _finish(run: Run, preset: str, teacher_seconds: float, test: bool, plot: str | None, as_json: bool) -> None:
    """Measures the best weights, writes the checkpoint and the plot, and prints the results."""
    import torch

    from ..training import Corpus, evaluate

    trainer, vocab, model = run.trainer, run.setup.vocab, run.trainer.model
    results: dict[str, Any] = {
        "train_loss": evaluate(model, trainer.train_corpus),
        "validation_loss": trainer.best_loss,
        "best_step": trainer.best_step,
        "steps_taken": trainer.step,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(teacher_seconds + trainer.seconds, 1),
    }
    if test:
        results["test_loss"] = evaluate(model, Corpus(run.setup.parts[2], vocab, model))
    run.save({"preset": preset} | results)
    if as_json:
        print(json.dumps(results))
    else:
        print(
            ", ".join(f"{name} {value:.4f}" if "loss" in name else f"{name} {value}" for name, value in results.items())
        )
    if plot:
        from ..plots import plot_losses

        table = model.embedding.weight.detach().cpu()
        losses = torch.stack(trainer.losses).cpu()
        plot_losses(plot, losses, trainer.validations, table if table.shape[1] == 2 else None, vocab.characters)
