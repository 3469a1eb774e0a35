"""`wavenet-conv score`: lines of text in, rows of scores out, in bounded memory."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from math import inf
from typing import TYPE_CHECKING, Any

from ..errors import NamesError
from .options import add_command, add_device, add_model, check_output, device_of, load_model, positive
from .progress import Progress
from .rows import Rows, bits_per_character, open_output

if TYPE_CHECKING:
    from torch import Tensor

    from ..lines import Lines
    from ..scoring import Scorer

DESCRIPTION = """\
Scores a list of names, or of any short strings, one per line: UTF-8, of any length, from a file or standard input.
Writes a row per line: the name, its natural-log likelihood, and bits per character (higher is less plausible). Only
line ends are removed; an empty line is the empty name. In tsv a name is written as inside a JSON string, so a tab is
\\t and a quote is \\"; NaN is nan in tsv and null in jsonl.

With --output FILE the rows are written to a temporary file beside FILE, which replaces FILE when all rows are there.
A run that fails or is interrupted leaves FILE as it was. --sort takes about 40 bytes of memory per line, reads the
input twice, and copies standard input to a temporary file.

Exit code 0 when done or when the reader closed the pipe, 1 for a failed job (a bad line, a full disk), 2 for wrong
usage, 130 for Ctrl-C.
"""


def add_parser(commands: Any) -> None:
    """Add `wavenet-conv score`."""
    command = add_command(commands, score, "score a list of names with a trained model", DESCRIPTION)
    add = command.add_argument
    add("file", nargs="?", default="-", metavar="FILE", help="one name per line; - or nothing is standard input")
    add_model(command)
    add_device(command)
    add("--output", metavar="FILE", help="write the rows to a file instead of standard output")
    add("--format", choices=("tsv", "jsonl"), default="tsv", help="tab-separated with a header, or JSON lines")
    add("--per-position", action="store_true", help="add the log-probability of each character and of the end")
    add("--unknown", choices=("error", "nan"), default="error", help="how to score a character that the model lacks")
    add("--sort", action="store_true", help="least plausible first, nan last")
    add("--limit", type=positive, metavar="N", help="stop after N lines; with --sort: after the first N rows")


def score(
    file: str,
    *,
    model: str,
    device: str,
    output: str | None,
    format: str,
    per_position: bool,
    unknown: str,
    sort: bool,
    limit: int | None,
) -> None:
    """Write a row of scores per line of `file`; the arguments are the command's options.

    Raises:
        UsageError: If the job cannot begin.
        NamesError: For a line that cannot be scored.
        OutputError: If the rows cannot be written.
    """
    from ..lines import Lines
    from ..scoring import Scorer

    if output is not None:
        check_output(output, file, model)
    columns = ("name", "score", "bits_per_character", *(["positions"] if per_position else []))
    rows, chunks = Rows(format, *columns), _sorted_chunks if sort else _chunks
    with Lines(file) as lines:
        checkpoint = load_model(model)
        scorer = Scorer(checkpoint.model, checkpoint.vocab, device=device_of(device), remember=True)
        if sort:
            lines.make_seekable()
        with open_output(output) as write, Progress(lines.size, rows=output is None) as progress:
            write(rows.header)
            for names, scores in chunks(lines, scorer, unknown, sys.maxsize if limit is None else limit, progress):
                positions = [scorer.position_log_probs(names, unknown=unknown)] if per_position else []
                write(rows(names, scores, bits_per_character(names, scores), *positions))


Chunks = Iterator[tuple[list[str], "Tensor"]]  # of names and their scores


def _chunks(lines: Lines, scorer: Scorer, unknown: str, limit: int, progress: Progress) -> Chunks:
    """The lines in order, at most `limit`."""
    while names := lines.read(limit - lines.count):
        yield names, _scores(lines, scorer, unknown, names)
        progress.update_lines(lines.count, lines.offset)


def _sorted_chunks(lines: Lines, scorer: Scorer, unknown: str, limit: int, progress: Progress) -> Chunks:
    """The `limit` lines with the most bits per character, first these.

    Keeps a key and an offset per line in memory; then reads the lines again and scores them again.
    """
    import torch

    bits, starts = array("d"), array("q")
    for names, scores in _chunks(lines, scorer, unknown, sys.maxsize, progress):
        bits.extend(bits_per_character(names, scores).tolist())
        starts.extend(lines.starts)
    if bits:
        ascending = -torch.frombuffer(bits, dtype=torch.float64)
        order = ascending.masked_fill_(ascending.isnan(), inf).argsort(stable=True)[:limit]
        for names in lines.read_at(torch.frombuffer(starts, dtype=torch.int64)[order].numpy()):
            yield names, scorer.score(names, unknown=unknown)


def _scores(lines: Lines, scorer: Scorer, unknown: str, names: list[str]) -> Tensor:
    """The scores of the chunk of lines that was read last; raises `NamesError` naming file and line."""
    try:
        return scorer.score(names, unknown=unknown)
    except NamesError as error:
        bad = scorer.vocab.unknown_character_error(names)
        line, name = lines.count - len(names) + (bad.index or 0) + 1, names[bad.index or 0]
        raise NamesError(
            f"{lines.label}, line {line} ({name[:40]!r}): character {bad.character!r} at position {bad.position} is "
            f"not in the vocabulary {scorer.vocab.characters!r}; use --unknown nan to score such names nan"
        ) from error
