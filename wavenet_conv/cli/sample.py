"""`wavenet-conv sample`: names that a model makes up, written as they are drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, NamesError, UsageError, WaveNetConvError
from .options import add_command, add_model, device_of, load_model, positive, usage_errors
from .progress import Progress
from .rows import Rows, bits_per_character, write_output

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint

CHUNK_SECONDS = 0.1  # names drawn in this time are scored and written together; what is written does not depend on it
GIVE_UP_DRAWS = 100_000  # consecutive draws without a name to write

DESCRIPTION = f"""\
Draws names from a trained model and writes them to standard output as they are drawn: UTF-8, one per line, any number
of them, in bounded memory (except with --unique). The same arguments write the same names. In tsv and jsonl a name's
natural-log likelihood and bits per character follow, as `wavenet-conv score` computes them, at temperature 1.

--novel and --unique skip names and draw on until N are written, or fail after {GIVE_UP_DRAWS:,} draws without a new
one. The list for --novel is the checkpoint's training list (by SHA-256), from --list FILE or `wavenet-conv
lecture-names`.
"""


def add_parser(commands: Any) -> None:
    """Add `wavenet-conv sample`."""
    command = add_command(commands, sample, "draw names from a trained model", DESCRIPTION)
    add = command.add_argument
    add_model(command)
    add("--count", type=positive, default=20, metavar="N", help="names to write (20)")
    add("--prefix", default="", metavar="TEXT", help="what each name begins with, of any length up to --max-length")
    add("--temperature", type=float, default=1.0, metavar="T", help="what logits are divided by (1); 0 is the argmax")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest characters")
    add("--top-p", type=float, metavar="P", help="draw from the fewest characters that together have probability P")
    add("--max-length", type=int, default=100, metavar="N", help="characters after which a name is cut (100)")
    add("--seed", type=int, default=42, metavar="S", help="another seed draws other names (42)")
    add("--novel", action="store_true", help="skip the names of the training list")
    add("--list", dest="listed", metavar="FILE", help="the training list, for --novel")
    add("--unique", action="store_true", help="skip what has been written; keeps every written name in memory")
    add("--format", choices=("txt", "tsv", "jsonl"), default="txt", help="names only (txt), or their likelihoods too")
    add("--batch-size", type=int, metavar="N", help="names drawn together; the names do not depend on it")


def sample(
    *, model: str, device: str, count: int, novel: bool, listed: str | None, unique: bool, format: str, **drawing: Any
) -> None:
    """Run the command; the arguments are its options, `drawing` those of `sample_stream`."""
    from ..sampling import sample_stream
    from ..scoring import Scorer

    if listed and not novel:
        raise UsageError(f"--list {listed}: it is read only with --novel; add --novel, or omit --list")
    place, checkpoint = device_of(device), load_model(model)
    line_ends = [character for character in "\n\r" if character in checkpoint.vocab.characters]
    if format == "txt" and line_ends:
        found = f"--model {model} has the character {line_ends[0]!r}, which ends a line inside a name"
        raise UsageError(f"--format txt: {found}; use --format tsv or --format jsonl, which write it as an escape")
    skipped = _training_names(model, checkpoint, listed) if novel else set()
    with usage_errors(ConfigError), usage_errors(NamesError, "--prefix: "):
        draws = None if novel or unique else count
        drawn = sample_stream(checkpoint.model, checkpoint.vocab, draws, device=place, **drawing)
    scorer = Scorer(checkpoint.model, checkpoint.vocab, device=place, remember=True)
    rows, written = Rows(format, "name", "log_likelihood", "bits_per_character"), 0
    with Progress(count, rows=True) as progress:
        write_output(rows.header)
        for names in _chunks(islice(_new(drawn, skipped, unique), count)):
            if format == "txt":
                write_output("".join(f"{name}\n" for name in names).encode())
            else:
                scores = scorer.score(names)
                write_output(rows(names, scores, bits_per_character(names, scores)))
            written += len(names)
            progress.update_lines(written, written)
    if written < count:
        found = f"no new name in {GIVE_UP_DRAWS:,} draws, after {written:,} of {count:,}"
        raise WaveNetConvError(f"{found}; ask for fewer with --count, or draw others with --temperature or --prefix")


def _new(drawn: Iterable[str], skipped: set[str], unique: bool) -> Iterator[str]:
    """Drawn names that are not skipped, until `GIVE_UP_DRAWS` are one after the other; `unique` then skips them too."""
    last = 0
    for number, name in enumerate(drawn, start=1):
        if name not in skipped:
            last = number
            if unique:
                skipped.add(name)
            yield name
        elif number - last == GIVE_UP_DRAWS:
            return


def _chunks(names: Iterable[str]) -> Iterator[list[str]]:
    """The names, as many at a time as come in `CHUNK_SECONDS`."""
    chunk, end = list[str](), monotonic() + CHUNK_SECONDS
    for name in names:
        chunk.append(name)
        if monotonic() >= end:
            yield chunk
            chunk, end = [], monotonic() + CHUNK_SECONDS
    yield chunk


def _training_names(model: str, checkpoint: Checkpoint, path: str | None) -> set[str]:
    """The names that a model was trained on, according to its notes; raises `UsageError` if they are not available."""
    from ..names import LECTURE_SHA256, lecture_names, read_names, sha256_of

    trained_on = checkpoint.notes.get("names_sha256") or checkpoint.notes.get("list_sha256")
    if not trained_on:
        fix = "write it with save_checkpoint(path, model, vocab, names=training_names)"
        raise UsageError(f"--novel: --model {model} does not name its list; {fix}")
    file = path or lecture_names()
    with usage_errors(NamesError, "--list "):
        names = read_names(file, checkpoint.vocab.padding) if file else []
    if trained_on not in (sha256_of(names), sha256_of(sorted(names))):
        fix = ", or run wavenet-conv lecture-names once" if trained_on == LECTURE_SHA256 else ""
        what = f"--model {model} was trained on a list with SHA-256 {trained_on}"
        raise UsageError(f"--novel: {what}, which is not {file or 'on this machine'}; give it with --list FILE{fix}")
    return set(names)
