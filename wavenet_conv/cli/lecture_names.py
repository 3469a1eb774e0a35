"""`wavenet-conv lecture-names`: download the lecture's list of names."""

from __future__ import annotations

from typing import Any

CONNECTION_TIMEOUT = 30.0  # seconds without a byte

DESCRIPTION = """\
Downloads makemore's names.txt to the user's cache folder, checks its SHA-256, and prints its path. A list that is
already there is checked and not downloaded again.
"""


def add_parser(commands: Any) -> None:
    """Add `wavenet-conv lecture-names`."""
    command = commands.add_parser("lecture-names", help="download the lecture's list of names", description=DESCRIPTION)
    command.set_defaults(run=lecture_names)


def lecture_names() -> None:
    """Download the lecture's list to the cache folder if it is not there, and print its path."""
    import socket

    from ..lists import LECTURE_URL, download_lecture_names

    socket.setdefaulttimeout(CONNECTION_TIMEOUT)
    print(download_lecture_names(LECTURE_URL))
