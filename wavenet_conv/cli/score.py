"""`wavenet-conv score`: names of a file in, rows of scores out, in bounded memory."""

from __future__ import annotations

import gc
import sys
from array import array
from collections.abc import Iterator, Sequence
from itertools import compress
from math import inf
from typing import TYPE_CHECKING, Any

from ..errors import NamesError, UsageError
from .cleaning import Cleaner
from .options import add_command, add_model, check_output, device_of, load_model, number, positive
from .progress import Progress
from .reading import Name, Source, open_source
from .rows import FORMATS, Column, bits_per_character, format_of, open_rows

if TYPE_CHECKING:
    from torch import Tensor

    from ..scoring import Scorer

    Chunk = tuple[Sequence[Name], dict[str, Column]]

DESCRIPTION = """\
Scores a list of names, or of any short strings. Writes a row per name: the name, its natural-log likelihood, and bits
per character (higher is less plausible).

FILE is CSV, TSV or Parquet if its name ends with .csv, .tsv or .parquet, else text. All but Parquet are in UTF-8, and
may be compressed (.gz after the ending). Standard input is text, or CSV with --column. CSV and TSV need a header. Rows
are written as soon as a pipe or a terminal pauses.

In a text each line is a name. Only its end is removed, \\n or \\r\\n: white space belongs to the name, and a blank line
is the empty name, as an empty field is in CSV. `wavenet-conv train` reads lines by the same rule, skips blank ones, and
rejects white space around a name.

--normalize, --lower and --strip, in this order, change what is scored. The name is written as it was read, in tsv as
inside a JSON string (\\t, \\"). NaN is null in jsonl. A missing value of Parquet is null, or empty in tsv and csv. If
scores are NaN, a last line on standard error counts them and lists the unknown characters.

--output FILE replaces FILE when all rows are written; a run that fails or is interrupted leaves FILE as it was. --sort
takes about 40 bytes of memory per name and copies the names to a temporary file.
"""


def add_parser(commands: Any) -> None:
    """Add `wavenet-conv score`."""
    command = add_command(commands, score, "score a list of names with a trained model", DESCRIPTION)
    add = command.add_argument
    add("file", nargs="?", default="-", metavar="FILE", help="text, CSV, TSV or Parquet; - or nothing: standard input")
    help = "which column has the names; required unless it is the only one, of strings in Parquet"
    add("--column", metavar="NAME", help=help)
    add_model(command)
    add("--output", metavar="FILE", help="write the rows to a file instead of standard output")
    help = "tab-separated or CSV with a header, JSON lines, or Parquet (by the ending of --output, else tsv)"
    add("--format", choices=FORMATS, help=help)
    add("--percentile", action="store_true", help="add the percent of the training list that is more plausible")
    add("--per-position", dest="positions", action="store_true", help="add each character's log-probability")
    add("--unknown", choices=("error", "nan"), default="error", help="how to score unknown characters, missing values")
    add("--normalize", choices=("NFC", "NFKC"), help="score names in this Unicode normal form")
    add("--lower", action="store_true", help="score names in lower case")
    add("--strip", action="store_true", help="score names without the white space around them")
    add("--above", type=number, metavar="BITS", help="only rows with more bits per character than this, or with NaN")
    add("--sort", action="store_true", help="NaN first, then the most bits per character")
    add("--limit", type=positive, default=sys.maxsize, metavar="N", help="stop after N names (--sort: after N rows)")


def score(
    file: str,
    *,
    column: str | None,
    model: str,
    device: str,
    output: str | None,
    format: str | None,
    normalize: str | None,
    lower: bool,
    strip: bool,
    sort: bool,
    limit: int,
    **options: Any,
) -> None:
    """Run the command; the arguments are its options, `options` those of `Table`."""
    from torch import zeros

    from ..scoring import Scorer

    format = format_of(format, output)
    if output is not None:
        check_output(output, file, model)
    with open_source(file, column) as source:
        checkpoint, place = load_model(model), device_of(device)
        vocab, quantiles = checkpoint.vocab, checkpoint.quantiles
        if options["percentile"] and quantiles is None:
            raise UsageError(f"--percentile: --model {model} has no quantiles of its training list; omit --percentile")
        scorer = Scorer(checkpoint.model, vocab, device=place, quantiles=quantiles, remember=True)
        gc.freeze()  # the garbage collector need not read all that the imports made, again and again
        chosen = [f"--normalize {normalize}", "--lower" * lower, "--strip" * strip]
        table = Table(source, scorer, Cleaner(vocab, chosen), **options)
        header = table.columns([], zeros(0, dtype=scorer.dtype))
        with open_rows(output, format, header) as write, Progress(source.size, rows=output is None) as progress:
            for names, columns in table.sorted(progress, limit) if sort else table.chunks(progress, limit):
                write(names, columns)
            if summary := table.cleaner.summary():
                progress.say(f"wavenet-conv: {summary}")


class Table:
    """The names of a source and the columns of their rows; the options are those of the command."""

    def __init__(
        self,
        source: Source,
        scorer: Scorer,
        cleaner: Cleaner,
        *,
        percentile: bool,
        positions: bool,
        unknown: str,
        above: float | None,
    ):
        self.source, self.scorer, self.cleaner = source, scorer, cleaner
        self._percentile, self._positions, self._unknown, self._above = percentile, positions, unknown, above

    def columns(self, texts: Sequence[str], scores: Tensor) -> dict[str, Column]:
        """The columns of texts with these scores, by name."""
        from ..scoring import percentile_of

        bits = bits_per_character(texts, scores)
        columns: dict[str, Column] = {"score": scores, "bits_per_character": bits}
        if self._percentile and self.scorer.quantiles is not None:
            columns["percentile"] = percentile_of(bits, self.scorer.quantiles)
        if self._positions:
            columns["positions"] = self.scorer.position_log_probs(texts, unknown="nan")
        return columns

    def chunks(self, progress: Progress, limit: int) -> Iterator[Chunk]:
        """The rows in order, of at most `limit` names."""
        for names, texts, scores in self._scored(progress, limit):
            yield names, self.columns(texts, scores)

    def sorted(self, progress: Progress, limit: int) -> Iterator[Chunk]:
        """The `limit` rows with NaN or the most bits per character; their names are scored again in that order."""
        import numpy as np

        from .spool import Spool

        ascending = array("d")
        with Spool() as spool:
            for names, texts, scores in self._scored(progress, sys.maxsize):
                bits = bits_per_character(texts, scores)
                ascending.extend((-bits).masked_fill_(bits.isnan(), -inf).tolist())
                spool.extend(names)
            order = np.asarray(ascending).argsort(kind="stable")[:limit]
            for names in spool.read(order):
                texts = self.cleaner(names)
                yield names, self.columns(texts, self.scorer.score(texts, unknown="nan"))

    def _scored(self, progress: Progress, limit: int) -> Iterator[tuple[Sequence[Name], Sequence[str], Tensor]]:
        """Names, what is scored for them, and scores, without the rows that `--above` drops."""
        while names := self.source.read(limit - self.source.count):
            texts = self.cleaner(names)
            try:
                scores = self.scorer.score(texts, unknown=self._unknown)
            except NamesError as error:
                raise self._unknown_error(names, texts) from error
            self.cleaner.count(names, texts, scores)
            if self._above is not None:
                keep = ~(bits_per_character(texts, scores) <= self._above)
                names, texts = list(compress(names, keep.tolist())), list(compress(texts, keep.tolist()))
                scores = scores[keep]
            yield names, texts, scores
            progress.update_lines(self.source.count, self.source.position())

    def _unknown_error(self, names: Sequence[Name], texts: Sequence[str]) -> NamesError:
        """The error, to be raised, for the first name that has no score, with its place in the file."""
        vocab = self.scorer.vocab
        bad = vocab.unknown_character_error(texts)
        index = bad.index or 0
        name, place, fix = names[index], self.source.place(index), "--unknown nan to score such names nan"
        if name is None:
            return NamesError(f"{place}: a missing value; use {fix}")
        hint = "".join(f"{option}, or " for option in self.cleaner.hints([texts[index]]))
        return NamesError(
            f"{place} ({name[:40]!r}): character {bad.character!r} at position {bad.position} "
            f"is not in the vocabulary {vocab.characters!r}; use {hint}{fix}"
        )
