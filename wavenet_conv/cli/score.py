"""`wavenet-conv score`: lines of text in, rows of scores out, in bounded memory."""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from array import array
from collections.abc import Iterator
from math import inf
from typing import TYPE_CHECKING, Any

from ..errors import NamesError
from .options import add_device, add_model, check_output, device_of, load_model, positive

if TYPE_CHECKING:
    from torch import Tensor

    from ..scoring import Scorer
    from .lines import Lines
    from .progress import Progress

DESCRIPTION = """\
Scores a list of names, or of any short strings, one per line: UTF-8, of any length, from a file or standard input.
Writes a row per line: the name, its natural-log likelihood, and bits per character (higher is less plausible). Only
line ends are removed; an empty line is the empty name. In tsv a name is written as inside a JSON string, so a tab is
\\t and a quote is \\"; NaN is nan in tsv and null in jsonl.

With --output FILE the rows are written to a temporary file beside FILE, which replaces FILE when all rows are there.
A run that fails or is interrupted leaves FILE as it was.

Exit code 0 when done or when the reader closed the pipe, 1 for a failed job (a bad line, a full disk), 2 for wrong
usage, 130 for Ctrl-C.
"""


def add_parser(commands: Any) -> None:
    """Add `wavenet-conv score`."""
    command = commands.add_parser(
        "score",
        help="score a list of names with a trained model",
        description=DESCRIPTION,
        formatter_class=RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("file", nargs="?", default="-", metavar="FILE", help="one name per line; - or nothing is standard input")
    add_model(command)
    add_device(command)
    add("--output", metavar="FILE", help="write the rows to a file instead of standard output")
    add("--format", choices=("tsv", "jsonl"), default="tsv", help="tab-separated with a header, or JSON lines")
    add("--per-position", action="store_true", help="add the log-probability of each character and of the end")
    add("--unknown", choices=("error", "nan"), default="error", help="how to score a character that the model lacks")
    add(
        "--sort",
        action="store_true",
        help="least plausible first, nan last; takes about 40 bytes of memory per line, reads the input twice, and "
        "copies standard input to a temporary file",
    )
    add("--limit", type=positive, metavar="N", help="stop after N lines; with --sort: after the first N rows")
    command.set_defaults(run=score)


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
    """Write a row of scores per line of a file.

    Args:
        file: A file with one name per line, or "-" for standard input.
        model: A checkpoint, or "default".
        device: "auto", "cuda" or "cpu".
        output: The file to write; None for standard output.
        format: "tsv" or "jsonl".
        per_position: Whether rows have the log-probability of each character.
        unknown: "error" or "nan", for names with characters outside the vocabulary.
        sort: Whether the least plausible names come first.
        limit: The number of lines to read, or of rows to write with `sort`; None for all.

    Raises:
        UsageError: If the job cannot begin.
        NamesError: For a line that cannot be scored.
        OutputError: If the rows cannot be written.
    """
    from ..scoring import Scorer
    from .lines import Lines
    from .output import open_output, shares_terminal
    from .progress import Progress
    from .rows import Rows, bits_per_character

    if output is not None:
        check_output(output, file, model)
    with Lines(file) as lines:
        loaded = load_model(model)
        scorer = Scorer(loaded.model, loaded.vocab, device=device_of(device), remember=True)
        columns = ("name", "score", "bits_per_character", *(["positions"] if per_position else []))
        rows = Rows(format, columns)
        if sort:
            lines.make_seekable()
        with open_output(output) as write, Progress(lines.size, bar=not shares_terminal(output)) as progress:
            write(rows.header)
            chunks = (_sorted_chunks if sort else _chunks)(lines, scorer, unknown, limit, progress)
            for names, scores in chunks:
                positions = [scorer.position_log_probs(names, unknown=unknown)] if per_position else []
                write(rows(names, scores, bits_per_character(names, scores), *positions))


def _chunks(
    lines: Lines, scorer: Scorer, unknown: str, limit: int | None, progress: Progress
) -> Iterator[tuple[list[str], Tensor]]:
    """Names and their scores in the order of the lines."""
    while raw := lines.read(None if limit is None else limit - lines.count):
        names = lines.decode(raw)
        yield names, _scores(lines, scorer, names, unknown)
        progress.update_lines(lines.count, lines.offset)


def _sorted_chunks(
    lines: Lines, scorer: Scorer, unknown: str, limit: int | None, progress: Progress
) -> Iterator[tuple[list[str], Tensor]]:
    """Names and their scores, most bits per character first.

    Keeps a key and an offset per line in memory; then reads the lines again and scores them again.
    """
    import torch

    from .lines import CHUNK_LINES, gather
    from .rows import bits_per_character

    keys, starts = array("d"), array("q")
    while raw := lines.read():
        starts.extend(lines.starts(raw))
        names = lines.decode(raw)
        keys.extend(bits_per_character(names, _scores(lines, scorer, names, unknown)).tolist())
        progress.update_lines(lines.count, lines.offset)
    if not keys:
        return
    ascending = -torch.frombuffer(keys, dtype=torch.float64)
    ascending.masked_fill_(ascending.isnan(), inf)
    order = ascending.argsort(stable=True)[:limit]
    ordered = lines.read_at(starts[index] for part in order.split(CHUNK_LINES) for index in part.tolist())
    while raw := gather(ordered, CHUNK_LINES):
        names = lines.decode(raw)
        yield names, scorer.score(names, unknown=unknown)


def _scores(lines: Lines, scorer: Scorer, names: list[str], unknown: str) -> Tensor:
    """The scores of a chunk of lines; raises `NamesError` naming file and line."""
    try:
        return scorer.score(names, unknown=unknown)
    except NamesError as error:
        found = scorer.vocab.unknown_character_error(names)
        name = names[found.index]
        shown = name if len(name) <= 40 else f"{name[:37]}..."
        raise NamesError(
            f"{lines.label}, line {lines.first + found.index} ({shown!r}): character {found.character!r} at position "
            f"{found.position} is not in the vocabulary {scorer.vocab.characters!r}; use --unknown nan to score such "
            f"names nan",
            index=found.index,
            position=found.position,
            character=found.character,
        ) from error
