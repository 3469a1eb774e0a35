"""`wavenet-conv sample`: names that a model makes up, written as they come. Knows nothing of how one is drawn."""

from __future__ import annotations

import json
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import closing
from hashlib import sha256
from itertools import islice
from math import inf, log
from time import monotonic
from typing import Any

import torch

from .arguments import device_of
from .checkpoint import Checkpoint, load_checkpoint
from .errors import CheckpointError, ConfigError, NamesError, OutputError, UsageError, WaveNetConvError
from .names import LECTURE_SHA256, lecture_names, read_names
from .sampling import sample_stream
from .score_command import Meter, StandardOutput
from .scoring import Scorer

CHUNK_SECONDS = 0.1  # names drawn for this long are scored and written together; what is written does not depend on it
CHUNK_CHARACTERS = 2**20  # a chunk of longer names ends here, so that memory stays bounded
FIRST = 1024  # names that do not wait for a whole batch
GIVE_UP = 100_000  # draws one after another without a name to write

DESCRIPTION = f"""\
Draws names from a trained model and writes them to standard output as they come: UTF-8, one a line, any number of them,
in bounded memory (but for --unique). The same arguments write the same names, of which --count N are the first N.

In txt a line is the name as it is; the empty name is an empty line. In tsv and jsonl its natural-log likelihood and its
bits per character stand beside it, which `wavenet-conv score` gives it too: at temperature 1 whatever --temperature,
--top-k and --top-p are, with the characters of --prefix and with the end, also for a name that --max-length has cut. In
tsv a name is written as inside a JSON string, so a tab is \\t and a quote is \\".

--novel and --unique leave names out and draw on until N have been written; after {GIVE_UP:,} draws without one more
the job fails, and what has been written stays. --novel leaves out all names of the list that the checkpoint was trained
on, its held-out parts too. The list is read from --list FILE, else from where `wavenet-conv lecture-names` puts the
lecture's, and its SHA-256 must be the one in the checkpoint's notes.

Exit code 0 when done or when the reader of the names has closed the pipe, 1 for a failed job (no new name, a model
whose logits are NaN, a full disk), 2 for wrong usage, 130 for Ctrl-C.
"""


def add_parser(commands: Any) -> None:
    """The options of `wavenet-conv sample`."""
    command = commands.add_parser(
        "sample",
        help="draw names from a trained model",
        description=DESCRIPTION,
        formatter_class=RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--model", default="default", metavar="PATH", help="a checkpoint; 'default' is the one in the package")
    add("--count", type=int, default=20, metavar="N", help="names to write (20)")
    add("--prefix", default="", metavar="TEXT", help="what every name begins with, of any length up to --max-length")
    add(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="logits are divided by it (1); 0 always takes the likeliest character",
    )
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest characters")
    add("--top-p", type=float, metavar="P", help="draw from the fewest characters that have a share of P together")
    add("--max-length", type=int, default=100, metavar="N", help="characters after which a name is cut (100)")
    add("--seed", type=int, default=42, metavar="S", help="another seed draws other names (42)")
    add("--novel", action="store_true", help="leave out the names of the training list")
    add("--list", metavar="FILE", help="the training list, for --novel")
    add("--unique", action="store_true", help="leave out what has been written; keeps every written name in memory")
    add("--format", choices=("txt", "tsv", "jsonl"), default="txt", help="names only (txt), or their likelihoods too")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="where to compute (auto: cuda where it is)")
    add(
        "--batch",
        type=int,
        metavar="N",
        help="names drawn together, fewer where --max-length is large; the names do not depend on it",
    )


def sample(options: Namespace) -> None:
    """Runs `wavenet-conv sample`; raises `UsageError` for what cannot be begun, its relatives after that, `ClosedPipe`.

    Nothing is written before the first names are drawn.
    """
    if options.count < 1:
        raise UsageError(f"--count is {options.count}; it must be at least 1")
    if options.list and not options.novel:
        raise UsageError(f"--list {options.list}: it is read for --novel only; add --novel, or leave it out")
    if sys.stdout is None:
        raise OutputError("standard output is closed; redirect it to a file")
    device = device_of(options.device)
    try:
        checkpoint = load_checkpoint(options.model)
    except CheckpointError as error:
        raise UsageError(f"--model {error}") from error
    left_out = _training_list(options, checkpoint.notes) if options.novel else set()
    rows, sink, written = Rows(checkpoint, options.format, device), StandardOutput(), 0
    header = rows.header
    with closing(Meter(options.count, 0)) as meter:
        for names in _chunks(_drawn(checkpoint, options, device), options, left_out):
            sink.write(header + rows(names))
            header, written = b"", written + len(names)
            meter.update(written, written)


def _drawn(checkpoint: Checkpoint, options: Namespace, device: torch.device) -> Iterator[str]:
    """Names as the model draws them: `--count` of them, or without end where some are left out.

    The first ones are drawn apart, so that they need not wait for a large batch, in which they are drawn again.
    """
    few = min(options.count, FIRST)

    def stream(n: int | None) -> Iterator[str]:
        return sample_stream(
            checkpoint.model,
            checkpoint.vocab,
            n,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            prefix=options.prefix,
            max_length=options.max_length,
            seed=options.seed,
            batch=options.batch,
            device=device,
        )

    try:
        yield from stream(few)
        yield from islice(stream(None if options.novel or options.unique else options.count), few, None)
    except ConfigError as error:
        raise UsageError(str(error)) from error
    except NamesError as error:
        raise UsageError(f"--prefix: {error}") from error


def _chunks(drawn: Iterator[str], options: Namespace, left_out: set[str]) -> Iterator[list[str]]:
    """The names to write, as many at a time as are drawn in `CHUNK_SECONDS`; with --unique, `left_out` grows by them.

    Raises `WaveNetConvError` after `GIVE_UP` draws without one.
    """
    left, in_vain = options.count, 0
    while left and in_vain < GIVE_UP:
        names, characters, end = [], 0, monotonic() + CHUNK_SECONDS
        for name in drawn:
            if name in left_out:
                in_vain += 1
            else:
                in_vain, characters = 0, characters + len(name)
                names.append(name)
                if options.unique:
                    left_out.add(name)
            if len(names) == left or in_vain == GIVE_UP or characters >= CHUNK_CHARACTERS or monotonic() >= end:
                break
        left -= len(names)
        yield names
    if left:
        raise WaveNetConvError(
            f"no new name in {GIVE_UP:,} draws, after {options.count - left:,} of {options.count:,}; "
            f"ask for fewer with --count, or for other names with --temperature, --top-k, --top-p and --prefix"
        )


class Rows:
    """The lines of names, as bytes: called with a list of names. Numbers have as many digits as tell them apart."""

    def __init__(self, checkpoint: Checkpoint, format: str, device: torch.device):
        columns = ("name", "log_likelihood", "bits_per_character")
        self.format = format
        self.header = ("\t".join(columns) + "\n").encode() if format == "tsv" else b""
        if format == "txt":
            return
        self.scorer = Scorer(checkpoint.model, checkpoint.vocab, device=device, remember=True)
        self.digits = ".17g" if self.scorer.dtype == torch.float64 else ".9g"
        self.object = "{{" + ", ".join(f'"{column}": {{}}' for column in columns) + "}}\n"

    def __call__(self, names: list[str]) -> bytes:
        if self.format == "txt":
            return "".join(f"{name}\n" for name in names).encode()
        scores = self.scorer.score(names)
        bits = scores / (-log(2) * (torch.tensor([len(name) for name in names]) + 1))
        quoted = (json.dumps(name, ensure_ascii=False) for name in names)
        columns = self._numbers(scores), self._numbers(bits)
        if self.format == "tsv":
            return "".join(map("{}\t{}\t{}\n".format, (name[1:-1] for name in quoted), *columns)).encode()
        return "".join(map(self.object.format, quoted, *columns)).encode()

    def _numbers(self, values: torch.Tensor) -> Iterator[str]:
        # JSON has no infinity, which half precision soon comes to.
        for value in values.tolist():
            yield format(value, self.digits) if self.format == "tsv" or abs(value) < inf else "null"


def _training_list(options: Namespace, notes: dict[str, Any]) -> set[str]:
    """The names that the model was trained on, as its notes tell; raises `UsageError` where they cannot be had."""
    trained_on = notes.get("names_sha256") or notes.get("list_sha256")
    if not trained_on:
        raise UsageError(
            f"--novel: the notes of --model {options.model} do not say which list it was trained on; "
            f"take a checkpoint that wavenet-conv train wrote"
        )
    which, mend = "a list", "give that list with --list FILE"
    if trained_on == LECTURE_SHA256:
        which, mend = "the lecture's list", f"{mend}, or run wavenet-conv lecture-names once"
    size = f" of {notes['names']:,} names" if isinstance(notes.get("names"), int) else ""
    wanted = f"--novel: --model {options.model} was trained on {which}{size} with SHA-256 {trained_on}"
    path = options.list or lecture_names()
    if path is None:
        raise UsageError(f"{wanted}, which is not here; {mend}")
    try:
        names = read_names(path)
    except NamesError as error:
        raise UsageError(f"--list {error}") from error
    found = sha256("\n".join(names).encode("utf-8", "surrogatepass")).hexdigest()  # as `wavenet-conv train` notes it
    if found != trained_on:
        raise UsageError(f"{wanted}; {path} is another, with SHA-256 {found}; {mend}")
    return set(names)
