"""The `wavenet-conv` command: a thin parser, one module per command, and exit codes.

PyTorch is imported inside the functions that run a command, so that help and usage errors come fast.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from ..errors import UsageError, WaveNetConvError
from .rows import write_output

DESCRIPTION = """The lecture's WaveNet, slid over whole names. Exit code 0 when done or when the reader closed the pipe,
1 for a failed job, 2 for wrong usage, 130 for Ctrl-C, 143 for SIGTERM."""
COMMANDS = ["score", "explain", "next", "complete", "page", "export", "sample", "train", "sweep", "find_lr"]
COMMANDS += ["lecture_names"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, by default the process's; returns its exit code.

    Options that cannot be parsed, `--help` and `--version` raise `SystemExit` instead.
    """
    options = vars(new_parser().parse_args(arguments))
    run, hint = options.pop("run"), options.pop("hint", "")
    try:
        run(**options)
        write_output()  # of what was printed
    except BrokenPipeError:
        return 0
    except WaveNetConvError as error:
        print(f"wavenet-conv: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print(f"wavenet-conv: interrupted{hint}", file=sys.stderr)
        return 130  # what a shell reports for Ctrl-C
    return 0


def new_parser() -> argparse.ArgumentParser:
    """The parser of the command line, with all commands."""
    parser = argparse.ArgumentParser(prog="wavenet-conv", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS:
        import_module(f".{name}", __name__).add_parser(commands)
    return parser
