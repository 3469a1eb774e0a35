"""`wavenet-conv complete`: the likeliest whole names that begin with prefixes."""

from __future__ import annotations

import json
from typing import Any

from ..errors import ConfigError
from .options import add_command, add_model, add_prefixes, load_scorer, positive, unknown_characters, usage_errors
from .rows import write_output

DESCRIPTION = """\
Shows the likeliest whole names that begin with each prefix, with their natural-log likelihoods as `wavenet-conv score`
computes them. A beam search finds them: it keeps the --width likeliest beginnings at each step, and leaves out those
that cannot become one of the best any more. The names are as inside a JSON string.

With --json each prefix is one line.
"""


def add_parser(commands: Any) -> None:
    """Add `wavenet-conv complete`."""
    command = add_command(commands, complete, "show the likeliest names that begin with a prefix", DESCRIPTION)
    add_prefixes(command, "names")
    add_model(command)
    help = "beginnings of names that are kept at each step (64); more may find likelier names"
    command.add_argument("--width", type=positive, default=64, metavar="N", help=help)
    help = "leave out names with more characters (100)"
    command.add_argument("--max-length", type=positive, default=100, metavar="N", help=help)


def complete(prefixes: list[str], *, top: int, model: str, device: str, as_json: bool, **search: int) -> None:
    """Run the command; the arguments are its options, `search` those of `continuing.complete`."""
    from .. import continuing

    scorer = load_scorer(model, device)
    with usage_errors(ConfigError), unknown_characters("PREFIX", prefixes, scorer.vocab):
        found = continuing.complete(scorer, prefixes, top, **search)
    keys = ("name", "score")
    records = [{"prefix": p, "names": [dict(zip(keys, pair)) for pair in pairs]} for p, pairs in zip(prefixes, found)]
    if as_json:
        write_output("".join(f"{json.dumps(record)}\n" for record in records).encode())
        return
    from .explanation import continuations

    write_output(continuations(records))
