"""`wavenet-conv train`: a list of names in, a checkpoint out, resumable."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, UsageError
from ..recipe import Recipe, teachers_of
from .options import (
    add_command,
    add_device,
    add_list,
    add_recipe,
    check_output,
    configured,
    load_model,
    training_list,
    usage_errors,
)

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..config import WaveNetConfig
    from ..model import ConvWaveNet
    from ..training import Trainer
    from ..vocabulary import Vocabulary
    from .options import TrainingList
    from .resumable import Run, Setup

DESCRIPTION = """\
Trains a model on a list of names, one per line, and writes a checkpoint for `wavenet-conv score --model`. The list is
split as in the lecture: shuffled with seed 42, then 80% to train on, 10% to validate on and 10% to test on (read only
with --test, once, at the end). The weights with the lowest validation loss are kept.

The state of the run is saved in OUTPUT.training after each validation. --resume continues from there, to the same bits
as an uninterrupted run (on the CPU, with the same number of threads), or starts from the beginning without such a file.
A run that is finished stays as it is. A file that is there already is replaced only with --overwrite.

--from PATH trains the model of a checkpoint on, with its vocabulary and its shape; --preset then says the recipe only.
On the names to validate on, the result is never worse than that model. A small --lr harms least.

Under torchrun each rank takes its share of each batch; without dropout N ranks train as one.
"""


def add_parser(commands: Any) -> None:
    """Add `wavenet-conv train`."""
    command = add_command(commands, train, "train a model on a list of names", DESCRIPTION)
    command.set_defaults(hint="; start again with the same arguments and --resume to continue")
    add = command.add_argument
    add_list(command)
    add("-o", "--output", required=True, metavar="OUTPUT", help="where the checkpoint is written")
    add_recipe(command)
    add("--epochs", type=int, metavar="N", help="times to see every name of the list, in place of --steps")
    add("--seconds", type=float, metavar="S", help="stop after the validation that ends after S seconds of training")
    add("--kernel-sizes", type=_integers, metavar="2,2,2", help="how many nodes each layer fuses, lowest first")
    add("--n-embd", type=int, metavar="N", help="width of the embedding")
    add("--n-hidden", type=int, metavar="N", help="width of every layer")
    add("--gated", action="store_true", default=None, help="gated layers with residual and skip connections")
    add("--from", dest="origin", metavar="PATH", help="a checkpoint whose model is trained on")
    help = "a checkpoint to learn from, in place of the preset's teachers; may be repeated"
    add("--teacher", action="append", default=[], metavar="PATH", help=help)
    add("--dtype", choices=("float32", "float64"), help="of the weights (float32, or that of --from)")
    add_device(command)
    add("--resume", action="store_true", help="continue an interrupted run with the same arguments")
    add("--overwrite", action="store_true", help="replace OUTPUT if it is there")
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
    origin: str | None,
    end: str | None,
    epochs: int | None,
    seconds: float | None,
    teacher: list[str],
    dtype: str | None,
    device: str,
    resume: bool,
    overwrite: bool,
    test: bool,
    plot: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Run the command; the arguments are its options, `settings` as in `configured`."""
    check_output(output, file, *teacher, *([origin] if origin else []))
    if Path(output).exists() and not (resume or overwrite):
        raise UsageError(f"--output {output}: this file is there already; give another path, or add --overwrite")
    from ..plots import check_plot
    from .resumable import Run, Setup, digest, distributed, is_first_rank, locked, rank_and_count

    if plot:
        check_plot(plot)
    start = _start(origin, end, settings) if origin else None
    names = training_list(file, end, start.vocab if start else None)
    given = [_loaded(path, names.vocab) for path in teacher]
    config, recipe, presets = _configured(preset, names, epochs, bool(given), settings)
    with distributed(device) as place, locked(output) if is_first_rank() else nullcontext():
        if seconds is not None and rank_and_count()[1] > 1:
            raise UsageError("--seconds: ranks do not stop at the same step; give --steps under torchrun")
        setup = Setup(names, place, dtype or _dtype(start), resume)
        _say_what_is_read(setup, file)
        identities = [digest(model) for model in given] + [f"{name}, seed {own.seed}" for name, _, own in presets]
        run = Run(setup, output, config, recipe, identities, start.model if start else None)
        if resume and _is_finished(run, overwrite):
            return
        paths = [Path(f"{output}.teacher-{own.seed}") for _, _, own in presets]
        trained = [_teacher(setup, str(path), *own) for path, own in zip(paths, presets)]
        trainer = run.train(given + [model for model, _ in trained], seconds)
        if is_first_rank():
            spent = round(trainer.seconds + sum(spent for _, spent in trained), 1)
            _write(run, trainer, {"preset": preset, "seconds": spent}, test=test, plot=plot, as_json=as_json)
            for path in paths:
                path.unlink(missing_ok=True)


def _start(path: str, end: str | None, settings: dict[str, Any]) -> Checkpoint:
    """The checkpoint of `--from`; raises `UsageError` if an option contradicts it."""
    checkpoint = load_model(path, "--from")
    config = checkpoint.model.config
    found = {name: getattr(config, name) for name in ("kernel_sizes", "n_embd", "n_hidden", "gated")}
    for name, value in {**found, "end": checkpoint.vocab.padding}.items():
        given = end if name == "end" else settings[name]
        if given not in (None, value) and not (name == "n_hidden" and {given} == {*value}):
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} is {given!r}, but the model of --from {path} has {value!r}; leave {option} out")
    return checkpoint


def _configured(
    preset: str, names: TrainingList, epochs: int | None, given: bool, settings: dict[str, Any]
) -> tuple[WaveNetConfig, Recipe, list[tuple[str, dict[str, Any], Recipe]]]:
    """The shape, the recipe with `epochs` in place of steps, and the preset's teachers where no others are `given`."""
    config, recipe = configured(preset, len(names.vocab), settings)
    presets = teachers_of(preset, recipe.seed) if recipe.distill_weight and not given else []
    if settings["distill_weight"] and not (given or presets or recipe.ngram_share):
        fix = "nothing teaches here; give --teacher, or --ngram-share above 0"
        raise UsageError(f"--distill-weight {recipe.distill_weight:g}: {fix}")
    if settings["ngram_share"] and not recipe.distill_weight:
        raise UsageError(
            f"--ngram-share {recipe.ngram_share:g}: with --distill-weight 0 nothing teaches; leave one out"
        )
    if recipe.drawn and not (given or presets):
        if settings["drawn"]:
            raise UsageError(f"--drawn {recipe.drawn}: networks draw names, and none teaches here; give --teacher too")
        recipe = replace(recipe, drawn=0)
    if epochs is not None:
        if settings["steps"] is not None:
            raise UsageError("--steps and --epochs are both given; give one of them")
        seen = len(names.parts[0]) * (1 + recipe.drawn)
        with usage_errors(ConfigError):
            recipe = replace(recipe, steps=epochs * -(-seen // recipe.batch_size))
    return config, recipe, presets


def _dtype(start: Checkpoint | None) -> str:
    """The default of `--dtype`; a model of 16 bits is trained in float32."""
    return "float64" if start is not None and start.model.embedding.weight.element_size() == 8 else "float32"


def _say_what_is_read(setup: Setup, file: str) -> None:
    names = setup.names
    count, sizes = sum(map(len, names.parts)), " / ".join(f"{len(part):,}" for part in names.parts)
    repeated = f"{names.repeated:,} of them repeated, " if names.repeated else ""
    setup.say(f"{file}: {count:,} names, {repeated}split {sizes} to train, validate and test on")


def _is_finished(run: Run, overwrite: bool) -> bool:
    """Say whether a run has ended and written OUTPUT; raises `UsageError` if another run's file is there."""
    if not Path(run.output).exists():
        return False
    try:
        run.finished()
    except UsageError:
        if overwrite:
            return False
        raise
    if run.interrupted is None:
        fix = f"give --from {run.output} and another --output to train on"
        run.setup.say(f"{run.output}: this training is finished; {fix}")
    return run.interrupted is None


def _write(run: Run, trainer: Trainer, results: dict[str, Any], *, test: bool, plot: str | None, as_json: bool) -> None:
    """Write the checkpoint and the plot of a training that has ended, and print its results."""
    from ..plots import plot_losses
    from ..training import Corpus, evaluate
    from .resumable import results_of

    names, model, results = run.setup.names, trainer.model, results | results_of(trainer)
    if test:
        results["test_loss"] = evaluate(model, Corpus(names.parts[2], names.vocab, model))
    run.save(results)
    losses = {name: f"{value:.4f}" for name, value in results.items() if "loss" in name}
    text = ", ".join(f"{name} {value}" for name, value in (results | losses).items())
    best, steps = trainer.best_step, run.recipe.steps
    if trainer.step == steps and 0 < best <= steps / 2 and run.recipe.schedule == "onecycle":
        fix = f"fewer steps (--steps {best}, or fewer --epochs) may give a lower one"
        run.setup.say(f"the validation loss was lowest at step {best:,} of {steps:,}; {fix}")
    print(json.dumps(results) if as_json else text)
    if plot:
        embedding = model.embedding.weight if model.config.n_embd == 2 else None
        plot_losses(plot, trainer.losses, trainer.validations, embedding, names.vocab.characters)


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
    from ..config import WaveNetConfig
    from .resumable import Run, is_first_rank

    run = Run(setup, output, WaveNetConfig(vocab_size=len(setup.names.vocab), **shape), recipe)
    with suppress(UsageError):
        checkpoint = run.finished()
        return checkpoint.model, checkpoint.notes["seconds"]
    setup.say(f"training a teacher, {preset} with seed {recipe.seed}")
    trainer = run.train()
    if is_first_rank():
        run.save({"seconds": trainer.seconds})
    return trainer.model, trainer.seconds
