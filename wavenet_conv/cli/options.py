"""Options that several commands share, the checks of their values, and what is read for them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from stat import S_IFREG, S_ISREG
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import CheckpointError, ConfigError, NamesError, OutputError, UsageError
from ..recipe import PRESETS, Recipe, split_names

if TYPE_CHECKING:
    import torch

    from ..checkpoint import Checkpoint
    from ..config import WaveNetConfig
    from ..scoring import Scorer
    from ..vocabulary import Vocabulary

MIN_NAMES = 10  # with fewer, a part of the split is empty

RECIPE_HELP = {
    "steps": "steps to take",
    "batch_size": "names per step",
    "optimizer": "adamw or sgd",
    "schedule": "of the learning rate: onecycle or constant",
    "lr": "the highest learning rate",
    "warmup": "share of the steps in which the learning rate rises",
    "weight_decay": "decay of the weight matrices",
    "dropout": "probability that a linear map does not see an input channel",
    "ema_decay": "keep the moving average of the weights with this decay per step",
    "eval_every": "steps between validations",
    "patience": "stop after so many validations without a lower loss; 0 does not",
    "distill_weight": "share of the targets that teachers give",
    "ngram_share": "share of what teachers give that comes from n-grams of the list; all of it without networks",
    "drawn": "names that teachers draw in each epoch, per name of the list",
    "seed": "of the weights, the order of the names and dropout",
}


class TrainingList(NamedTuple):
    """A list to train on.

    Attributes:
        sha256: What identifies the list.
        vocab: Its characters.
        parts: The names to train, validate and test on.
        repeated: How many names are equal to an earlier one.
    """

    sha256: str
    vocab: Vocabulary
    parts: tuple[list[str], list[str], list[str]]
    repeated: int


def add_command(commands: Any, run: Callable[..., None], help: str, description: str) -> argparse.ArgumentParser:
    """Add a command, named as the function that runs it; its options become the function's keyword arguments."""
    texts = {"help": help, "description": description, "formatter_class": argparse.RawDescriptionHelpFormatter}
    command: argparse.ArgumentParser = commands.add_parser(run.__name__.replace("_", "-"), **texts)
    command.set_defaults(run=run)
    return command


def add_device(command: argparse.ArgumentParser) -> None:
    """Add `--device`, whose value `device_of` takes."""
    help = "where to compute (auto: cuda if available)"
    command.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help=help)


def add_list(command: argparse.ArgumentParser, metavar: str = "FILE") -> None:
    """Add the list to train on and `--end`, whose values `training_list` takes."""
    command.add_argument("file", metavar=metavar, help="text in UTF-8, one name per line; blank lines are skipped")
    help = "the character that stands for the end, which no name has (.)"
    command.add_argument("--end", type=_character, metavar="CHAR", help=help)


def _character(text: str) -> str:
    if len(text) != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a single character")
    return text


def add_model(command: argparse.ArgumentParser) -> None:
    """Add `--model`, whose value `load_model` takes, and `--device`."""
    help = "a checkpoint; 'default' is the one in the package"
    command.add_argument("--model", default="default", metavar="PATH", help=help)
    add_device(command)


def add_prefixes(command: argparse.ArgumentParser, what: str) -> None:
    """Add PREFIX, `--top` and `--json` to a command that shows `what` for each prefix."""
    help = "how a name begins; '' is the start of a name; write -- before a prefix that starts with -"
    command.add_argument("prefixes", nargs="+", metavar="PREFIX", help=help)
    command.add_argument("--top", type=positive, default=10, metavar="K", help=f"{what} per prefix (10)")
    command.add_argument("--json", dest="as_json", action="store_true", help="JSON lines, one object per prefix")


def add_recipe(command: argparse.ArgumentParser, *names: str) -> None:
    """Add `--preset`, and options for these fields of `Recipe`, by default all, which replace the preset's."""
    help = "model and recipe to start from (fast); the options that follow replace parts of it"
    command.add_argument("--preset", choices=list(PRESETS), default="fast", help=help)
    for name in names or RECIPE_HELP:
        kind = type(getattr(Recipe, name))
        metavar = {int: "N", float: "X", str: "NAME"}[kind]
        command.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=RECIPE_HELP[name])


def number(text: str) -> float:
    """Parse a number that is not NaN, as the `type` of an option."""
    value = float(text)
    if value != value:
        raise argparse.ArgumentTypeError("nan is not a number to compare with")
    return value


def positive(text: str) -> int:
    """Parse an integer of at least 1, as the `type` of an option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


@contextmanager
def usage_errors(kind: type[Exception], prefix: str = "") -> Iterator[None]:
    """Raise errors of this kind as `UsageError`, after a prefix."""
    try:
        yield
    except kind as error:
        raise UsageError(f"{prefix}{error}") from error


@contextmanager
def output_errors(path: object, advice: str) -> Iterator[None]:
    """Raise each `OSError` as an `OutputError` about a file."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or str(error).rstrip('.')}; {advice}") from error


def device_of(choice: str) -> torch.device:
    """Return the device that a value of `--device` means; raises `UsageError` if there is none."""
    import torch

    cuda = torch.cuda.is_available()
    if choice == "cuda" and not cuda:
        raise UsageError("--device cuda: PyTorch finds no CUDA device; use --device cpu")
    return torch.device("cuda" if cuda and choice != "cpu" else "cpu")


def configured(preset: str, vocab_size: int, settings: dict[str, Any], where: str = "") -> tuple[WaveNetConfig, Recipe]:
    """The preset with the settings that are not None, fields of `Recipe` and `WaveNetConfig`; raises `UsageError`."""
    from ..config import WaveNetConfig

    shape, recipe = PRESETS[preset]
    merged = {**asdict(recipe), **shape, **{name: value for name, value in settings.items() if value is not None}}
    given = {field.name: merged.pop(field.name) for field in fields(Recipe)}
    with usage_errors(ConfigError, where):
        return WaveNetConfig(vocab_size=vocab_size, **merged), Recipe(**given)


def load_model(path: str, option: str = "--model") -> Checkpoint:
    """Load a checkpoint; raises `UsageError` naming the option if it cannot be read."""
    from ..checkpoint import load_checkpoint

    with usage_errors(CheckpointError, f"{option} "):
        return load_checkpoint(path)


def load_scorer(path: str, device: str) -> Scorer:
    """The scorer of values of `--model` and `--device`; raises as `load_model` does."""
    from ..scoring import Scorer

    checkpoint = load_model(path)
    return Scorer(checkpoint.model, checkpoint.vocab, device=device_of(device))


@contextmanager
def unknown_characters(argument: str, names: Sequence[str], vocab: Vocabulary) -> Iterator[None]:
    """Raise the `NamesError` of an unknown character in `names`, values of an argument, as the command line's."""
    try:
        yield
    except NamesError as error:
        name, character = names[error.index or 0], error.character or ""
        found = f"character {character!r} at position {error.position} is not in the vocabulary {vocab.characters!r}"
        lower = character.lower()
        fix = f"write {lower!r}, which is" if len(lower) == 1 and lower in vocab.characters else "remove it"
        message = f"{argument} {name[:40]!r}: {found}; {fix}, or give another model with --model"
        raise NamesError(message) from error


def training_list(path: str, end: str | None = None, vocab: Vocabulary | None = None) -> TrainingList:
    """Read a list of names to train on; raises `UsageError` if it cannot be read or is too short to split.

    `end` is a value of `--end`. The vocabulary is that of the list, or the one that is given.
    """
    from ..names import read_names, sha256_of
    from ..vocabulary import Vocabulary

    end = end or ("." if vocab is None else vocab.padding)
    if path.lower().endswith((".csv", ".tsv", ".gz", ".parquet")):
        raise UsageError(f"{path}: this command reads text with one name per line; write the names to such a file")
    try:
        names = read_names(path, end)
    except NamesError as error:
        other = ", or say another end with --end" if error.character == end and vocab is None else ""
        raise UsageError(f"{error}{other}") from error
    if len(names) < MIN_NAMES:
        raise UsageError(f"{path}: {len(names)} names are too few to split 80/10/10; give at least {MIN_NAMES}")
    vocab = Vocabulary.from_names(names, end=end) if vocab is None else vocab
    if unknown := "".join(sorted({*"".join(names)}.difference(vocab.characters))):
        found = f"{path}: the model of --from has no {unknown!r}, but {vocab.characters!r}"
        raise UsageError(f"{found}; remove names with other characters, or train a new model")
    return TrainingList(sha256_of(names), vocab, split_names(names), len(names) - len({*names}))


def check_output(output: str, *inputs: str, option: str = "--output") -> None:
    """Raise `UsageError` if an option's file cannot be a regular file, or is one of the files that are read."""
    if output == "-":
        raise UsageError(f"{option} -: give the name of a file")
    path = Path(output)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = S_IFREG  # that of a new file
    except OSError as error:
        raise UsageError(f"{option} {output}: {error.strerror}; give another path") from error
    if not S_ISREG(mode) or not path.parent.is_dir():
        raise UsageError(f"{option} {output}: not a regular file in an existing folder; give another path")
    if path.exists() and any(os.path.exists(file) and os.path.samefile(path, file) for file in inputs):
        raise UsageError(f"{option} {output}: this file is being read; give another one")
