"""What commands that train ask of their arguments: a list of names, a device, an output. Knows nothing of training."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from .errors import NamesError, UsageError
from .names import read_names

FEWEST = 10  # names; with fewer, a part of the split is empty


def training_names(path: str) -> list[str]:
    """The names at `path`; raises `UsageError` where they cannot be read or are too few to split."""
    try:
        names = read_names(path)
    except NamesError as error:
        raise UsageError(str(error)) from error
    if len(names) < FEWEST:
        raise UsageError(f"{path}: {len(names)} names are too few to split 80/10/10; give at least {FEWEST}")
    return names


def device_of(choice: str) -> torch.device:
    """The device that `--device auto`, `cuda` or `cpu` means; raises `UsageError` where it is not there."""
    cuda = torch.cuda.is_available()
    if choice == "cuda" and not cuda:
        raise UsageError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    return torch.device("cuda" if cuda and choice != "cpu" else "cpu")


def check_output(output: str, *read: str) -> None:
    """Raises `UsageError` where `--output` cannot be a file, or is one of those that are read."""
    path = Path(output)
    if (path.exists() and not path.is_file()) or not path.parent.is_dir():
        raise UsageError(f"--output {output}: not a file in a folder that is there; give another path")
    if path.exists() and any(os.path.exists(file) and os.path.samefile(path, file) for file in read):
        raise UsageError(f"--output {output}: this file is being read; give another one")
