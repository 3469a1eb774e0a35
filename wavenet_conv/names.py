"""Lists of names on disk: reads one, and downloads the lecture's."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

from .errors import DownloadError, NamesError

LECTURE_URL = "https://raw.githubusercontent.com/karpathy/makemore/master/names.txt"
LECTURE_SHA256 = "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d"


def read_names(path: str | Path, end: str = ".") -> list[str]:
    """Reads a UTF-8 text file with one name per line; white space around names and blank lines are skipped.

    A byte-order mark and CRLF or CR line ends are accepted. Raises `NamesError`, with the file and the line, if the
    file is missing, holds no name, is not UTF-8, or has the character `end` in a name.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise NamesError(f"{path}: {error.strerror or error}; give a text file with one name per line") from error
    except UnicodeDecodeError as error:
        number, byte = error.object.count(b"\n", 0, error.start) + 1, error.object[error.start]
        raise NamesError(f"{path}, line {number}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from error
    lines = [line.strip() for line in re.split("\r\n|\r|\n", text)]
    for number, line in enumerate(lines, start=1):
        if end in line:
            raise NamesError(f"{path}, line {number} ({line[:40]!r}): {end!r} marks the end of a name; remove it")
    names = [line for line in lines if line]
    if not names:
        raise NamesError(f"{path}: no names in it; give a text file with one name per line")
    return names


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
    """Downloads the lecture's list to the user's cache folder, unless it is there and whole; returns its path.

    Raises `DownloadError` if the transfer fails or returns other data; a previous file in the cache then stays.
    """
    import torch.hub  # takes seconds, so that reading a list does not wait for it

    path = _cached()
    if _is_lecture_list(path):
        return path
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
