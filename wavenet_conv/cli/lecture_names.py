"""`wavenet-conv lecture-names`: download the lecture's list of names."""

from __future__ import annotations

import socket
from typing import Any

from .options import add_command


def add_parser(commands: Any) -> None:
    """Add `wavenet-conv lecture-names`."""
    description = (
        "Downloads makemore's names.txt to the user's cache folder, checks its SHA-256, and prints its path. Asks no "
        "server if the file is there, or where WAVENET_CONV_LECTURE_NAMES says."
    )
    add_command(commands, lecture_names, "download the lecture's list of names", description)


def lecture_names() -> None:
    """Download the lecture's list to the cache folder if this machine does not have it, and print its path."""
    from ..names import LECTURE_URL, download_lecture_names

    socket.setdefaulttimeout(30.0)  # seconds without a byte
    print(download_lecture_names(LECTURE_URL))
