"""What `explain`, `next` and `complete` show on a terminal: the records of their `--json` as tables."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from io import StringIO
from math import isfinite
from typing import Any

from rich.bar import Bar
from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text


def explanation(records: list[dict[str, Any]], uniform: float) -> bytes:
    """Render records for standard output; `uniform` is the surprise of a uniform guess, in bits."""
    console, written = _console()
    every = (position["bits"] for record in records for position in record["positions"])
    longest, width = max(filter(isfinite, every), default=0.0), min(max(console.width - 40, 6), 40)  # of all bars
    for record in records:
        table = _table("char", ">prob", ">bits", "", "likeliest")
        for position in record["positions"]:
            bits, likeliest = position["bits"], position["likeliest"]
            color = "green" if bits < uniform / 2 else "yellow" if bits <= uniform else "red"
            bar = Bar(longest, 0, max(0.0, bits), width=width, color=color)  # empty for a NaN
            others = " ".join(f"{_shown(other['character'])} {other['probability']:>3.0%}" for other in likeliest)
            cells = _shown(position["character"]), f"{position['probability']:.1%}", f"{bits:.2f}", bar
            table.add_row(*cells, Text(others, no_wrap=True, overflow="ellipsis"))
        _print_heading(console, record["name"])
        summary = f"score {record['score']:.4f} nats, {record['bits_per_character']:.3f} bits per character"
        summary += f", percentile {record['percentile']:.1f}" * isfinite(record["percentile"])
        console.print(table, f"{summary}\n", _nodes(record["nodes"]), "", sep="\n")
    if len(records) > 1:
        console.print(Text("all names together", "bold"), _nodes(records[0]["nodes_together"]), sep="\n")
    return written()


def continuations(records: list[dict[str, Any]]) -> bytes:
    """Render the records of `next` or `complete` for standard output."""
    console, written = _console()
    width = min(max(console.width - 12, 6), 40)  # of a bar for a probability of 1
    for number, record in enumerate(records):
        if number:
            console.print()
        _print_heading(console, record["prefix"])
        if "next" in record:
            table = _table("char", ">prob", "")
            for character, probability in (row.values() for row in record["next"]):
                table.add_row(_shown(character), f"{probability:.1%}", Bar(1, 0, probability, width=width))
        else:
            table = _table(">score", "name")
            for name, score in (row.values() for row in record["names"]):
                table.add_row(f"{score:.4f}", Text(_escaped(name), no_wrap=True, overflow="ellipsis"))
        console.print(table)
    return written()


def _console() -> tuple[Console, Callable[[], bytes]]:
    """A console that renders as for standard output, and a function that returns what has been printed there."""
    # With no_color, rich would still write bold; without a color system it writes no escape codes.
    console = Console(color_system=None if os.environ.get("NO_COLOR") else "auto", highlight=False)
    # Not console.capture(), which writes an empty text to standard output; a full disk fails even that.
    encoding, text = console.encoding, StringIO()
    console.file = text
    return console, lambda: text.getvalue().encode(encoding, "replace")


def _print_heading(console: Console, name: str) -> None:
    console.print(Text(f'"{_escaped(name)}"', "bold"), no_wrap=True, overflow="ellipsis")


def _nodes(counts: dict[str, tuple[int, ...]]) -> Table:
    """A row per layer and one for all layers."""
    table = _table(">nodes of layer", *(">pass" if way == "convolution" else f">{way}" for way in counts))
    for layer, nodes in [*enumerate(zip(*counts.values()), 1), ("all", map(sum, counts.values()))]:
        table.add_row(str(layer), *(f"{count:,}" for count in nodes))
    return table


def _table(*headers: str) -> Table:
    """An empty table; a column is aligned to the right if its header starts with `>`."""
    columns = (Column(name.lstrip(">"), justify="right" if name[:1] == ">" else "left") for name in headers)
    return Table(*columns, box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")


def _shown(character: str | None) -> str:
    return "end" if character is None else '" "' if character == " " else _escaped(character)


def _escaped(text: str) -> str:
    """Write as inside a JSON string, with escapes for all that has no width or could steer a terminal."""
    return "".join(c if c.isprintable() and cell_len(c) and c not in '"\\' else json.dumps(c)[1:-1] for c in text)
