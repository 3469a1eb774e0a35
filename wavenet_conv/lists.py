"""Lists of names on disk: reading one, and fetching the lecture's. Knows nothing of tokens or models."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
from contextlib import suppress
from pathlib import Path

import torch

from .errors import DownloadError, NamesError

LECTURE_URL = "https://raw.githubusercontent.com/karpathy/makemore/master/names.txt"
LECTURE_SHA256 = "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d"


def read_names(path: str | Path) -> list[str]:
    """The names in a UTF-8 file, one a line; a byte-order mark and CRLF line ends are read.

    White space around a name is not part of it, and blank lines are skipped.

    Raises `NamesError` naming the file, and the line where there is one: a file that is missing, that holds no name,
    that is not UTF-8, or that has a `.` in a name.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise NamesError(f"{path}: {error.strerror or error}; give a text file with one name a line") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise NamesError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from error
    lines = [line.strip() for line in re.split("\r\n|\r|\n", text)]
    for number, line in enumerate(lines, start=1):
        if "." in line:
            raise NamesError(f"{path}, line {number} ({line[:40]!r}): '.' marks the end of a name; remove it")
    names = [line for line in lines if line]
    if not names:
        raise NamesError(f"{path}: no names in it; give a text file with one name a line")
    return names


def lecture_names() -> Path | None:
    """The lecture's list where it is on this machine and whole, else None.

    Looked for at `$WAVENET_CONV_LECTURE_NAMES`, then in the user's cache folder; the SHA-256 is computed every time.
    """
    given = os.environ.get("WAVENET_CONV_LECTURE_NAMES")
    path = Path(given) if given else _cached()
    return path if _is_lecture_list(path) else None


def download_lecture_names(url: str = LECTURE_URL) -> Path:
    """The lecture's list from the user's cache folder; where it is not there or not whole, from makemore's repository.

    Raises `DownloadError` where the transfer breaks off or brings other bytes; nothing of it is left behind, and what
    was in the cache before stays.
    """
    path = _cached()
    if _is_lecture_list(path):
        return path
    made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # torch downloads beside the target, compares the hash, and only then renames.
        torch.hub.download_url_to_file(url, str(path), hash_prefix=LECTURE_SHA256, progress=False)
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
        raise DownloadError(
            f"{url}: {error}; try again, or put the file there yourself and name it in WAVENET_CONV_LECTURE_NAMES"
        ) from error
    finally:
        for folder in made:
            with suppress(OSError):  # what holds the list is not empty and stays
                folder.rmdir()
    return path


def _cached() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "wavenet-conv" / "lecture-names.txt"


def _is_lecture_list(path: Path) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == LECTURE_SHA256
