"""`wavenet-conv train`: a list of names in, a checkpoint out, resumable."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, WaveNetConvError
from ..recipe import Recipe, teachers_of
from .options import add_command, add_device, add_recipe, check_output, configured, load_model, training_list

if TYPE_CHECKING:
    from ..model import ConvWaveNet
    from ..vocabulary import Vocabulary
    from .resumable import Setup

DESCRIPTION = """\
Trains a model on a list of names, one per line, and writes a checkpoint for `wavenet-conv score --model`. The list is
split as in the lecture: shuffled with seed 42, then 80% to train on, 10% to validate on and 10% to test on (read only
with --test, once, at the end). The weights with the lowest validation loss are kept.

The state of the run is saved in OUTPUT.training after each validation. --resume continues from there, to the same bits
as an uninterrupted run (on the CPU, with the same number of threads), or starts from the beginning without such a file.
Under torchrun each rank takes its share of each batch; without dropout N ranks train as one.
"""


def add_parser(commands: Any) -> None:
    """Add `wavenet-conv train`."""
    command = add_command(commands, train, "train a model on a list of names", DESCRIPTION)
    command.set_defaults(hint="; start again with the same arguments and --resume to continue")
    add = command.add_argument
    add("file", metavar="FILE", help="one name per line, UTF-8")
    add("-o", "--output", required=True, metavar="OUTPUT", help="where the checkpoint is written")
    add_recipe(command)
    add("--epochs", type=int, metavar="N", help="times to see every name, in place of --steps")
    add("--seconds", type=float, metavar="S", help="stop after the validation that ends after S seconds of training")
    add("--kernel-sizes", type=_integers, metavar="2,2,2", help="how many nodes each layer fuses, lowest first")
    add("--n-embd", type=int, metavar="N", help="width of the embedding")
    add("--n-hidden", type=int, metavar="N", help="width of every layer")
    add("--gated", action="store_true", default=None, help="gated layers with residual and skip connections")
    help = "a checkpoint to learn from, in place of the preset's teachers; may be repeated"
    add("--teacher", action="append", default=[], metavar="PATH", help=help)
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
    preset: str,
    epochs: int | None,
    seconds: float | None,
    teacher: list[str],
    dtype: str,
    device: str,
    resume: bool,
    test: bool,
    plot: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Run the command; the arguments are its options, `settings` as in `configured`."""
    from ..plots import check_plot, plot_losses
    from ..training import Corpus, evaluate
    from .resumable import Run, Setup, digest, distributed, is_first_rank, locked, rank_and_count, results_of

    names = training_list(file)
    config, recipe = configured(preset, len(names.vocab), settings)
    if epochs is not None:
        if settings["steps"] is not None:
            raise UsageError("--steps and --epochs are both given; give one of them")
        settings["steps"] = epochs * -(-len(names.parts[0]) // recipe.batch_size)
        config, recipe = configured(preset, len(names.vocab), settings)
    check_output(output, file, *teacher)
    if plot:
        check_plot(plot)
    given = [_loaded(path, names.vocab) for path in teacher]
    presets = teachers_of(preset, recipe.seed) if recipe.distill_weight and not given else []
    with distributed(device) as place, locked(output) if is_first_rank() else nullcontext():
        if seconds is not None and rank_and_count()[1] > 1:
            raise UsageError("--seconds: ranks do not stop at the same step; give --steps under torchrun")
        setup = Setup(names, place, dtype, resume)
        sizes = " / ".join(f"{len(part):,}" for part in names.parts)
        setup.say(f"{file}: {sum(map(len, names.parts)):,} names, split {sizes} to train, validate and test on")
        identities = [digest(model) for model in given] + [f"{name}, seed {own.seed}" for name, _, own in presets]
        run = Run(setup, output, config, recipe, identities)
        paths = [Path(f"{output}.teacher-{own.seed}") for _, _, own in presets]
        trained = [_teacher(setup, str(path), *own) for path, own in zip(paths, presets)]
        trainer = run.train(given + [model for model, _ in trained], seconds)
        if not is_first_rank():
            return
        spent = round(trainer.seconds + sum(spent for _, spent in trained), 1)
        results = {"preset": preset, "seconds": spent, **results_of(trainer)}
        if test:
            results["test_loss"] = evaluate(trainer.model, Corpus(names.parts[2], names.vocab, trainer.model))
        run.save(results)
        losses = {name: f"{value:.4f}" for name, value in results.items() if "loss" in name}
        text = ", ".join(f"{name} {value}" for name, value in (results | losses).items())
        print(json.dumps(results) if as_json else text)
        if plot:
            embedding = trainer.model.embedding.weight if config.n_embd == 2 else None
            plot_losses(plot, trainer.losses, trainer.validations, embedding, names.vocab.characters)
        for path in paths:
            path.unlink(missing_ok=True)


def _loaded(path: str, vocab: Vocabulary) -> ConvWaveNet:
    """The model of a `--teacher`."""
    checkpoint = load_model(path, "--teacher")
    if checkpoint.vocab != vocab:
        found = f"its vocabulary is {checkpoint.vocab!r} and not {vocab!r} as of the list"
        raise UsageError(f"--teacher {path}: {found}; give one with the same vocabulary")
    return checkpoint.model


def _teacher(
    setup: Setup, output: str, preset: str, shape: dict[str, Any], recipe: Recipe
) -> tuple[ConvWaveNet, float]:
    """A teacher of a preset, and the seconds that its training took; one that an interrupted run left is read."""
    from ..checkpoint import load_checkpoint
    from ..config import WaveNetConfig
    from .resumable import Run, is_first_rank

    run = Run(setup, output, WaveNetConfig(vocab_size=len(setup.names.vocab), **shape), recipe)
    with suppress(WaveNetConvError):
        checkpoint = load_checkpoint(output)
        if checkpoint.notes.items() >= run.identity.items():
            return checkpoint.model, checkpoint.notes["seconds"]
    setup.say(f"training a teacher, {preset} with seed {recipe.seed}")
    trainer = run.train()
    if is_first_rank():
        run.save({"seconds": trainer.seconds})
    return trainer.model, trainer.seconds
