"""`wavenet-conv sample`: names that a model makes up, written as they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from itertools import islice
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, NamesError, UsageError, WaveNetConvError
from .options import add_command, add_device, add_model, device_of, load_model, usage_errors
from .progress import Progress
from .rows import Rows, bits_per_character, write_output

if TYPE_CHECKING:
    import torch

    from ..checkpoint import Checkpoint

CHUNK_SECONDS = 0.1  # names drawn in this time are scored and written together; what is written does not depend on it
CHUNK_CHARACTERS = 2**20  # a chunk of longer names ends here, so that memory is bounded
FIRST_NAMES = 1024  # names that do not wait for a whole batch
GIVE_UP_DRAWS = 100_000  # consecutive draws without a name to write

DESCRIPTION = f"""\
Draws names from a trained model and writes them to standard output as they are drawn: UTF-8, one per line, any number
of them, in bounded memory (except with --unique). The same arguments write the same names; --count N writes the first
N of them.

In txt a line is the name; the empty name is an empty line. In tsv and jsonl its natural-log likelihood and its bits per
character follow, as `wavenet-conv score` computes them: at temperature 1 whatever --temperature, --top-k and --top-p
are, with the characters of --prefix and with the end, also for a name that --max-length has cut. In tsv a name is
written as inside a JSON string, so a tab is \\t and a quote is \\".

--novel and --unique skip names and draw on until N names are written; after {GIVE_UP_DRAWS:,} draws without a new one
the job fails, and what has been written stays. --novel skips all names of the list that the checkpoint was trained on,
also those of its validation and test parts. The list is read from --list FILE, or else from where `wavenet-conv
lecture-names` puts the lecture's, and its SHA-256 must be the one in the checkpoint's notes.

Exit code 0 when done or when the reader closed the pipe, 1 for a failed job (no new name, a model whose logits are NaN,
a full disk), 2 for wrong usage, 130 for Ctrl-C.
"""


def add_parser(commands: Any) -> None:
    """Add `wavenet-conv sample`."""
    command = add_command(commands, sample, "draw names from a trained model", DESCRIPTION)
    add = command.add_argument
    add_model(command)
    add_device(command)
    add("--count", type=int, default=20, metavar="N", help="names to write (20)")
    add("--prefix", default="", metavar="TEXT", help="what each name begins with, of any length up to --max-length")
    add("--temperature", type=float, default=1.0, metavar="T", help="what logits are divided by (1); 0 is the argmax")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest characters")
    add("--top-p", type=float, metavar="P", help="draw from the fewest characters that together have probability P")
    add("--max-length", type=int, default=100, metavar="N", help="characters after which a name is cut (100)")
    add("--seed", type=int, default=42, metavar="S", help="another seed draws other names (42)")
    add("--novel", action="store_true", help="skip the names of the training list")
    add("--list", dest="training_list", metavar="FILE", help="the training list, for --novel")
    add("--unique", action="store_true", help="skip what has been written; keeps every written name in memory")
    add("--format", choices=("txt", "tsv", "jsonl"), default="txt", help="names only (txt), or their likelihoods too")
    add("--batch-size", type=int, metavar="N", help="names drawn together; the names do not depend on it")


def sample(
    *,
    model: str,
    device: str,
    count: int,
    prefix: str,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    max_length: int,
    seed: int,
    novel: bool,
    training_list: str | None,
    unique: bool,
    format: str,
    batch_size: int | None,
) -> None:
    """Write names that a model draws; the arguments are the command's options.

    Raises:
        UsageError: If the job cannot begin.
        SamplingError: If the model's logits are NaN.
        OutputError: If the names cannot be written.
    """
    from ..sampling import sample_stream

    if count < 1:
        raise UsageError(f"--count is {count}; it must be at least 1")
    if training_list and not novel:
        raise UsageError(f"--list {training_list}: it is read only with --novel; add --novel, or omit --list")
    place, checkpoint = device_of(device), load_model(model)
    skipped = _training_names(model, checkpoint.notes, training_list) if novel else set()
    draw = partial(
        sample_stream,
        checkpoint.model,
        checkpoint.vocab,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        prefix=prefix,
        max_length=max_length,
        seed=seed,
        batch_size=batch_size,
        device=place,
    )
    chunks = _chunks(_drawn(draw, count, novel or unique), count, unique, skipped)
    with Progress(count, rows=True) as progress:
        written = 0
        for names, data in _rows(chunks, format, checkpoint, place):
            write_output(data)
            written += names
            progress.update_lines(written, written)


def _drawn(draw: Callable[[int | None], Iterator[str]], count: int, endless: bool) -> Iterator[str]:
    """Names in the order in which they are drawn; the first, apart, so that they do not wait for a large batch."""
    first = min(count, FIRST_NAMES)
    with usage_errors(ConfigError), usage_errors(NamesError, "--prefix: "):
        yield from draw(first)
        yield from islice(draw(None if endless else count), first, None)


def _chunks(drawn: Iterator[str], count: int, unique: bool, skipped: set[str]) -> Iterator[list[str]]:
    """The names to write, as many at a time as are drawn in `CHUNK_SECONDS`.

    With `unique`, `skipped` grows by them. Raises `WaveNetConvError` after `GIVE_UP_DRAWS` draws without one.
    """
    left, in_vain = count, 0
    while left and in_vain < GIVE_UP_DRAWS:
        names, characters, end = [], 0, monotonic() + CHUNK_SECONDS
        for name in drawn:
            if name in skipped:
                in_vain += 1
            else:
                in_vain, characters = 0, characters + len(name)
                names.append(name)
                if unique:
                    skipped.add(name)
            if len(names) == left or in_vain == GIVE_UP_DRAWS or characters >= CHUNK_CHARACTERS or monotonic() >= end:
                break
        left -= len(names)
        yield names
    if left:
        raise WaveNetConvError(
            f"no new name in {GIVE_UP_DRAWS:,} draws, after {count - left:,} of {count:,}; "
            f"ask for fewer with --count, or for other names with --temperature, --top-k, --top-p and --prefix"
        )


def _rows(
    chunks: Iterator[list[str]], format: str, checkpoint: Checkpoint, device: torch.device
) -> Iterator[tuple[int, bytes]]:
    """Chunks of names as numbers of names and bytes to write."""
    if format == "txt":
        for names in chunks:
            yield len(names), "".join(f"{name}\n" for name in names).encode()
        return
    from ..scoring import Scorer

    scorer = Scorer(checkpoint.model, checkpoint.vocab, device=device, remember=True)
    rows = Rows(format, "name", "log_likelihood", "bits_per_character")
    header = rows.header
    for names in chunks:
        scores = scorer.score(names)
        yield len(names), header + rows(names, scores, bits_per_character(names, scores))
        header = b""


def _training_names(model: str, notes: dict[str, Any], path: str | None) -> set[str]:
    """The names that a model was trained on, according to its notes; raises `UsageError` if they are not available."""
    from ..names import LECTURE_SHA256, lecture_names, read_names

    trained_on = notes.get("names_sha256") or notes.get("list_sha256")
    if not trained_on:
        raise UsageError(
            f"--novel: the notes of --model {model} do not say which list it was trained on; "
            f"use a checkpoint that wavenet-conv train wrote"
        )
    label, fix = "a list", "give that list with --list FILE"
    if trained_on == LECTURE_SHA256:
        label, fix = "the lecture's list", f"{fix}, or run wavenet-conv lecture-names once"
    size = f" of {notes['names']:,} names" if isinstance(notes.get("names"), int) else ""
    wanted = f"--novel: --model {model} was trained on {label}{size} with SHA-256 {trained_on}"
    file = path or lecture_names()
    if file is None:
        raise UsageError(f"{wanted}, which is not on this machine; {fix}")
    with usage_errors(NamesError, "--list "):
        names = read_names(file)
    found = sha256("\n".join(names).encode("utf-8", "surrogatepass")).hexdigest()  # as `wavenet-conv train` notes it
    if found != trained_on:
        raise UsageError(f"{wanted}; {file} is another list, with SHA-256 {found}; {fix}")
    return set(names)
