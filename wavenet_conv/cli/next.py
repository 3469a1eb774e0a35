"""`wavenet-conv next`: the likeliest next characters after prefixes."""

from __future__ import annotations

import json
from typing import Any

from .options import add_command, add_model, add_prefixes, load_scorer, unknown_characters
from .rows import write_output

DESCRIPTION = """\
Shows what most likely comes after each prefix: characters, or the end of the name, with their probabilities.
Characters are as in a JSON string.

With --json each prefix is one line; null is the end.
"""


def add_parser(commands: Any) -> None:
    """Add `wavenet-conv next`."""
    command = add_command(commands, next, "show the likeliest next characters after a prefix", DESCRIPTION)
    add_prefixes(command, "characters")
    add_model(command)


def next(prefixes: list[str], *, top: int, model: str, device: str, as_json: bool) -> None:
    """Run the command; the arguments are its options."""
    from ..continuing import next_characters

    scorer = load_scorer(model, device)
    with unknown_characters("PREFIX", prefixes, scorer.vocab):
        found = next_characters(scorer, prefixes, top)
    keys = ("character", "probability")
    records = [{"prefix": p, "next": [dict(zip(keys, pair)) for pair in pairs]} for p, pairs in zip(prefixes, found)]
    if as_json:
        write_output("".join(f"{json.dumps(record)}\n" for record in records).encode())
        return
    from .explanation import continuations

    write_output(continuations(records))
