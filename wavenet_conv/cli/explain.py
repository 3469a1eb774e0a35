"""`wavenet-conv explain`: names as a model sees them, character by character, and the nodes that they take."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import islice
from math import isfinite, log, log2, nan
from typing import TYPE_CHECKING, Any

from ..errors import NamesError, UsageError
from .options import add_command, add_model, device_of, load_model
from .rows import write_output

if TYPE_CHECKING:
    from ..config import WaveNetConfig
    from ..scoring import Scorer

LIKELIEST = 3  # characters that are shown for every position

Record = dict[str, Any]

DESCRIPTION = """\
Shows each character of a name, and then its end, in a row: the probability that the model gives it, its surprise in
bits as a number and as a bar, and the likeliest characters there. All bars have one scale. A bar is red if a uniform
guess would be less surprised, yellow from half of that on, and green below. Then follow the natural-log likelihood of
the name, bits per character, and, if the checkpoint has quantiles of its training list, the percent of that list that
need fewer bits. Characters are written as inside a JSON string.

The last table counts the nodes of each layer. loop: the whole tree of every window. pass: the convolutional pass, one
node at every position. reused: nodes of the loop that the pass takes from an earlier window. stream: one new node per
row. distinct: nodes that cover different characters; `wavenet-conv score` shares equal ones, also across names.

With --json each name is one line. Numbers have all their digits; null is a NaN, or as a character the end.
"""


def add_parser(commands: Any) -> None:
    """Add `wavenet-conv explain`."""
    command = add_command(commands, explain, "show what a model expects at each character of a name", DESCRIPTION)
    help = "any short string; '' is the empty name; write -- before a name that starts with -"
    command.add_argument("names", nargs="+", metavar="NAME", help=help)
    add_model(command)
    command.add_argument("--json", dest="as_json", action="store_true", help="JSON lines, one object per name")


def explain(names: list[str], *, model: str, device: str, as_json: bool) -> None:
    """Run the command; the arguments are its options."""
    from ..scoring import Scorer

    checkpoint = load_model(model)
    vocab, quantiles = checkpoint.vocab, checkpoint.quantiles
    scorer = Scorer(checkpoint.model, vocab, device=device_of(device), quantiles=quantiles, remember=True)
    try:
        records = _records(names, scorer, checkpoint.model.config)
    except NamesError as error:
        raise UsageError(
            f"NAME {names[error.index or 0][:40]!r}: character {error.character!r} at position {error.position} is not "
            f"in the vocabulary {vocab.characters!r}; remove it, or give another model with --model"
        ) from error
    if as_json:
        write_output("".join(f"{json.dumps(record)}\n" for record in records).encode())
        return
    from rich.console import Console

    from .explanation import Page

    # With no_color, rich would still write bold; without a color system it writes no escape codes.
    colors: Any = None if os.environ.get("NO_COLOR") else "auto"
    console = Console(color_system=colors, highlight=False, markup=False, emoji=False)
    page = Page(records, console.width, log2(len(vocab)), ascii_only=console.options.ascii_only)
    with console.capture() as captured:
        for line in page.lines():
            console.print(line)
    write_output(captured.get().encode(console.encoding))


def _records(names: list[str], scorer: Scorer, config: WaveNetConfig) -> list[Record]:
    """What `--json` writes."""
    from ..counts import count_nodes

    positions, together = _positions(names, scorer), count_nodes(names, config)._asdict()
    scores, bits = scorer.score(names).tolist(), scorer.bits_per_character(names).tolist()
    percentiles = [nan] * len(names) if scorer.quantiles is None else scorer.percentile(names).tolist()
    return [
        {
            "name": name,
            "score": _number(score),
            "bits_per_character": _number(per_character),
            "percentile": _number(percentile),
            "positions": list(islice(positions, len(name) + 1)),
            "nodes": count_nodes([name], config)._asdict(),
            "nodes_together": together,
        }
        for name, score, per_character, percentile in zip(names, scores, bits, percentiles)
    ]


def _positions(names: list[str], scorer: Scorer) -> Iterator[Record]:
    """All characters and ends, name after name."""
    values = scorer.position_log_probs(names)[0].double()
    falling, tokens = scorer.logits(names)[0].double().log_softmax(1).sort(dim=1, descending=True, stable=True)
    characters, end = scorer.vocab.characters, scorer.vocab.end
    of_tokens, read = [*characters[:end], None, *characters[end:]], (c for name in names for c in (*name, None))
    numbers = (values, values.exp(), values / -log(2), falling.exp()[:, :LIKELIEST], tokens[:, :LIKELIEST])
    for character, value, probability, bits, others, order in zip(read, *(part.tolist() for part in numbers)):
        yield {
            "character": character,
            "log_probability": _number(value),
            "probability": _number(probability),
            "bits": _number(bits),
            "likeliest": [{"character": of_tokens[t], "probability": _number(p)} for t, p in zip(order, others)],
        }


def _number(value: float) -> float | None:
    """The number; None for what JSON does not have."""
    return value if isfinite(value) else None
