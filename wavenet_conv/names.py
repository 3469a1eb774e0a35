"""Lists of names on disk: reads one, and downloads the lecture's."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

from . import lines
from .errors import DownloadError, NamesError

LECTURE_URL = "https://raw.githubusercontent.com/karpathy/makemore/master/names.txt"
LECTURE_SHA256 = "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d"


def read_names(path: str | Path, end: str = ".") -> list[str]:
    """Reads a UTF-8 text file with one name per line; blank lines are skipped.

    A line ends with `\\n` or `\\r\\n`; a byte-order mark is skipped. `wavenet-conv score` reads lines by the same rule.
    Raises `NamesError`, with the file and the line, if the file is missing, holds no name, is not UTF-8, or if a name
    has the character `end` or a carriage return in it, or white space around it, which a model would learn.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise NamesError(f"{path}: {error.strerror or error}; give a text file with one name per line") from error
    names = lines.split_lines(lines.decoded(data.removeprefix(lines.BOM), path))
    for number, line in enumerate(names, start=1):
        if complaint := _complaint(line, end):
            character = end if end in line else None
            raise NamesError(f"{path}, line {number} ({line[:40]!r}): {complaint}", character=character)
    names = [name for name in names if name]
    if not names:
        raise NamesError(f"{path}: no names in it; give a text file with one name per line")
    return names


def _complaint(line: str, end: str) -> str:
    """Why a line cannot be a name to learn from; "" if it can."""
    if end in line:
        return f"{end!r} marks the end of a name; remove it"
    if "\r" in line:
        return "a carriage return alone does not end a line; use \\n or \\r\\n"
    return "" if line == line.strip() else "white space around the name; remove it"


def sha256_of(names: Sequence[str]) -> str:
    """What identifies a list in a checkpoint's notes."""
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogatepass")).hexdigest()


def lecture_names() -> Path | None:
    """The path of the lecture's list on this machine, or None where it is missing or not whole.

    `$WAVENET_CONV_LECTURE_NAMES` says where, else the user's cache folder. Its SHA-256 is checked each time.
    """
    given = os.environ.get("WAVENET_CONV_LECTURE_NAMES")
    path = Path(given) if given else _cached()
    return path if _is_lecture_list(path) else None


def download_lecture_names(url: str = LECTURE_URL) -> Path:
    """Downloads the lecture's list to the user's cache folder, unless `lecture_names` finds it; returns its path.

    Raises `DownloadError` if `$WAVENET_CONV_LECTURE_NAMES` names another file, and if the transfer fails or returns
    other data; a previous file in the cache then stays.
    """
    if (path := lecture_names()) is not None:
        return path
    if given := os.environ.get("WAVENET_CONV_LECTURE_NAMES"):
        raise DownloadError(f"WAVENET_CONV_LECTURE_NAMES={given}: is not the lecture's list; correct or unset it")
    path = _cached()
    import torch.hub  # takes seconds, so that reading a list does not wait for it

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # torch downloads beside the target, compares the hash, and only then renames.
        torch.hub.download_url_to_file(url, str(path), hash_prefix=LECTURE_SHA256, progress=False)
    except (OSError, RuntimeError, ValueError, HTTPException) as error:
        raise DownloadError(
            f"{url}: {error}; try again, or save the file yourself and set WAVENET_CONV_LECTURE_NAMES to its path"
        ) from error
    return path


def _cached() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "wavenet-conv" / "lecture-names.txt"


def _is_lecture_list(path: Path) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == LECTURE_SHA256
