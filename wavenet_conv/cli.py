"""The `wavenet-conv` command. Knows how to say things to a person; everything else is in the other modules."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Sequence

from . import find_lr_command, sample_command, sweep_command, train_command
from .errors import UsageError, WaveNetConvError
from .names import LECTURE_URL, download_lecture_names
from .score_command import CHUNK_LINES, ClosedPipe, score

CONNECTION_TIMEOUT = 30  # seconds without a byte
INTERRUPTED = 130  # what a shell reports for Ctrl-C

SCORE = """\
Scores a list of names, or of any short strings, one a line: UTF-8, of any length, from a file or standard input.
Writes a row a line to standard output: the name, its natural-log likelihood, and bits per character (higher is less
plausible). Only line ends are taken away; an empty line is the empty name. In tsv a name is written as inside a JSON
string, so a tab is \\t and a quote is \\"; NaN is nan in tsv and null in jsonl.

With --output FILE the run is resumable: killed at any moment and started again with the same arguments it goes on
from FILE.partial and FILE.progress, and FILE appears when it is whole. (With --sort it starts over, to the same bytes.)

Exit code 0 when done or when the reader of the rows has closed the pipe, 1 for a failed job (a bad line, a full disk),
2 for wrong usage, 130 for Ctrl-C.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, 1 for a failed job, 2 for what could not be begun, 130 for Ctrl-C.

    Arguments that cannot be read leave with exit code 2.
    """
    options = _parser().parse_args(arguments)
    try:
        if options.command == "score":
            score(options)
        elif options.command == "train":
            train_command.train(options)
        elif options.command == "find-lr":
            find_lr_command.find_lr(options)
        elif options.command == "sweep":
            sweep_command.sweep(options)
        elif options.command == "sample":
            sample_command.sample(options)
        else:
            socket.setdefaulttimeout(CONNECTION_TIMEOUT)
            print(download_lecture_names(LECTURE_URL))
        if sys.stdout is not None:
            sys.stdout.flush()
    except ClosedPipe:
        return 0
    except BrokenPipeError:  # the reader of a table has read enough; what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except WaveNetConvError as error:
        print(f"wavenet-conv: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        resumable = getattr(options, "output", None) or options.command == "sweep"
        more = " and --resume" if options.command == "train" and not options.resume else ""
        resume = f"; start again with the same arguments{more} to go on" if resumable else ""
        print(f"wavenet-conv: interrupted{resume}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wavenet-conv", description="The lecture's WaveNet, slid over whole names.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "lecture-names",
        help="download the lecture's list of names to the cache folder and print its path",
        description=f"Downloads {LECTURE_URL} to the user's cache folder, compares its SHA-256, and prints its path. "
        f"What is there already is verified and not downloaded again.",
    )
    train_command.add_parser(commands)
    find_lr_command.add_parser(commands)
    sweep_command.add_parser(commands)
    sample_command.add_parser(commands)
    command = commands.add_parser(
        "score",
        help="score a list of names with a trained model",
        description=SCORE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("file", nargs="?", default="-", metavar="FILE", help="one name a line; - or nothing is standard input")
    add("--model", default="default", metavar="PATH", help="a checkpoint; 'default' is the one in the package")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to compute (auto: cuda where it is)")
    add("--output", metavar="FILE", help="write the rows to a file, resumable, in place of standard output")
    add(
        "--format", choices=("tsv", "jsonl"), default="tsv", help="tab-separated with a header, or a JSON object a line"
    )
    add("--per-position", action="store_true", help="add the log-probability of every character and of the end")
    add("--unknown", choices=("error", "nan"), default="error", help="what a character outside the vocabulary is")
    add(
        "--sort",
        action="store_true",
        help="least plausible first, nan last; takes about 40 bytes of memory a line, reads the input twice, and "
        "copies standard input to a temporary file",
    )
    add("--limit", type=_positive, metavar="N", help="stop after N lines; with --sort: after the first N rows")
    add("--chunk", type=_positive, default=CHUNK_LINES, help=argparse.SUPPRESS)
    return parser


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
