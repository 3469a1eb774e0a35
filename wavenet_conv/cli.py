"""The `wavenet-conv` command. Knows how to say things to a person; everything else is in the other modules."""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Sequence

from .errors import WaveNetConvError
from .lists import LECTURE_URL, download_lecture_names

CONNECTION_TIMEOUT = 30  # seconds without a byte


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 1 for a failed job. Wrong usage leaves with exit code 2."""
    parser = argparse.ArgumentParser(prog="wavenet-conv", description="The lecture's WaveNet, slid over whole names.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "lecture-names",
        help="download the lecture's list of names to the cache folder and print its path",
        description=f"Downloads {LECTURE_URL} to the user's cache folder, compares its SHA-256, and prints its path. "
        f"What is there already is verified and not downloaded again.",
    )
    parser.parse_args(arguments)
    try:
        socket.setdefaulttimeout(CONNECTION_TIMEOUT)
        print(download_lecture_names(LECTURE_URL))
    except WaveNetConvError as error:
        print(f"wavenet-conv: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
