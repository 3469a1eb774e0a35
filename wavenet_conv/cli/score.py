"""`wavenet-conv score`: lines of text in, rows of scores out, in bounded memory."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator
from math import inf
from typing import TYPE_CHECKING, Any

from ..errors import NamesError
from .options import add_command, add_model, check_output, device_of, load_model, positive
from .progress import Progress
from .rows import Rows, bits_per_character, open_output

if TYPE_CHECKING:
    from torch import Tensor

    from ..lines import Lines
    from ..scoring import Scorer

    Chunks = Iterator[tuple[list[str], Tensor]]  # names and their scores

DESCRIPTION = """\
Scores a list of names, or of any short strings, one per line, in UTF-8. Writes a row per line: the name, its
natural-log likelihood, and bits per character (higher is less plausible). Only line ends are removed; an empty line is
the empty name. In tsv a name is written as inside a JSON string (\\t, \\"); NaN is nan in tsv and null in jsonl.

--output FILE replaces FILE when all rows are written; a run that fails or is interrupted leaves FILE as it was. --sort
takes about 40 bytes of memory per line, reads the input twice, and copies standard input to a temporary file.
"""


def add_parser(commands: Any) -> None:
    """Add `wavenet-conv score`."""
    command = add_command(commands, score, "score a list of names with a trained model", DESCRIPTION)
    add = command.add_argument
    add("file", nargs="?", default="-", metavar="FILE", help="one name per line; - or nothing is standard input")
    add_model(command)
    add("--output", metavar="FILE", help="write the rows to a file instead of standard output")
    add("--format", choices=("tsv", "jsonl"), default="tsv", help="tab-separated with a header, or JSON lines")
    add("--per-position", dest="positions", action="store_true", help="add each character's log-probability")
    add("--unknown", choices=("error", "nan"), default="error", help="how to score a character that the model lacks")
    add("--sort", action="store_true", help="the most bits per character first, nan last")
    add("--limit", type=positive, default=sys.maxsize, metavar="N", help="stop after N lines (--sort: after N rows)")


def score(
    file: str, *, model: str, device: str, output: str | None, format: str, positions: bool, sort: bool, **reading: Any
) -> None:
    """Run the command; the arguments are its options, `reading` those of `_chunks`."""
    from ..lines import Lines
    from ..scoring import Scorer

    if output is not None:
        check_output(output, file, model)
    rows = Rows(format, "name", "score", "bits_per_character", *(["positions"] if positions else []))
    with Lines(file) as lines:
        checkpoint = load_model(model)
        scorer = Scorer(checkpoint.model, checkpoint.vocab, device=device_of(device), remember=True)
        if sort:
            lines.make_seekable()
        with open_output(output) as write, Progress(lines.size, rows=output is None) as progress:
            write(rows.header)
            chunks = _sorted_chunks if sort else _chunks
            for names, scores in chunks(lines, scorer, progress, **reading):
                more = [scorer.position_log_probs(names, unknown="nan")] if positions else []
                write(rows(names, scores, bits_per_character(names, scores), *more))


def _chunks(lines: Lines, scorer: Scorer, progress: Progress, unknown: str, limit: int) -> Chunks:
    """The lines in order, at most `limit`; raises `NamesError` naming file and line."""
    while names := lines.read(limit - lines.count):
        try:
            scores = scorer.score(names, unknown=unknown)
        except NamesError as error:
            bad = scorer.vocab.unknown_character_error(names)
            line, name = lines.count - len(names) + (bad.index or 0) + 1, names[bad.index or 0]
            raise NamesError(
                f"{lines.label}, line {line} ({name[:40]!r}): character {bad.character!r} at position {bad.position} "
                f"is not in the vocabulary {scorer.vocab.characters!r}; use --unknown nan to score such names nan"
            ) from error
        yield names, scores
        progress.update_lines(lines.count, lines.offset)


def _sorted_chunks(lines: Lines, scorer: Scorer, progress: Progress, unknown: str, limit: int) -> Chunks:
    """The `limit` lines with the most bits per character, read and scored again in that order."""
    import torch

    bits, starts = array("d"), array("q")
    for names, scores in _chunks(lines, scorer, progress, unknown, sys.maxsize):
        bits.extend(bits_per_character(names, scores).tolist())
        starts.extend(lines.starts)
    if bits:
        ascending = -torch.frombuffer(bits, dtype=torch.float64)
        order = ascending.masked_fill_(ascending.isnan(), inf).argsort(stable=True)[:limit]
        for names in lines.read_at(torch.frombuffer(starts, dtype=torch.int64)[order].numpy()):
            yield names, scorer.score(names, unknown="nan")
