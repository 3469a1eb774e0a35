"""Options that several commands share, and the checks of their values."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, NamesError, UsageError

if TYPE_CHECKING:
    import torch

    from ..checkpoint import Checkpoint

MIN_NAMES = 10  # with fewer, a part of the split is empty


def add_command(commands: Any, run: Callable[..., None], help: str, description: str) -> argparse.ArgumentParser:
    """Add a command, named as the function that runs it; its options become the function's keyword arguments."""
    texts = {"help": help, "description": description, "formatter_class": argparse.RawDescriptionHelpFormatter}
    command: argparse.ArgumentParser = commands.add_parser(run.__name__.replace("_", "-"), **texts)
    command.set_defaults(run=run)
    return command


@contextmanager
def usage_errors(kind: type[Exception], prefix: str = "") -> Iterator[None]:
    """Raise errors of this kind as `UsageError`, after a prefix."""
    try:
        yield
    except kind as error:
        raise UsageError(f"{prefix}{error}") from error


def add_device(command: argparse.ArgumentParser) -> None:
    """Add `--device`, whose value `device_of` takes."""
    help = "where to compute (auto: cuda if available)"
    command.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help=help)


def add_model(command: argparse.ArgumentParser) -> None:
    """Add `--model`, whose value `load_model` takes, and `--device`."""
    help = "a checkpoint; 'default' is the one in the package"
    command.add_argument("--model", default="default", metavar="PATH", help=help)
    add_device(command)


def positive(text: str) -> int:
    """Parse an integer of at least 1, as the `type` of an option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def device_of(choice: str) -> torch.device:
    """Return the device that a value of `--device` means; raises `UsageError` if there is none."""
    import torch

    cuda = torch.cuda.is_available()
    if choice == "cuda" and not cuda:
        raise UsageError("--device cuda: PyTorch finds no CUDA device; use --device cpu")
    return torch.device("cuda" if cuda and choice != "cpu" else "cpu")


def load_model(path: str, option: str = "--model") -> Checkpoint:
    """Load a checkpoint; raises `UsageError` naming the option if it cannot be read."""
    from ..checkpoint import load_checkpoint

    with usage_errors(CheckpointError, f"{option} "):
        return load_checkpoint(path)


def training_names(path: str) -> list[str]:
    """Read a list of names to train on; raises `UsageError` if it cannot be read or is too short to split."""
    from ..names import read_names

    with usage_errors(NamesError):
        names = read_names(path)
    if len(names) < MIN_NAMES:
        raise UsageError(f"{path}: {len(names)} names are too few to split 80/10/10; give at least {MIN_NAMES}")
    return names


def check_output(output: str, *inputs: str) -> None:
    """Raise `UsageError` if `--output` cannot be a regular file, or is one of the files that are read."""
    path = Path(output)
    if (path.exists() and not path.is_file()) or not path.parent.is_dir():
        raise UsageError(f"--output {output}: not a regular file in an existing folder; give another path")
    if path.exists() and any(os.path.exists(file) and os.path.samefile(path, file) for file in inputs):
        raise UsageError(f"--output {output}: this file is being read; give another one")
