"""What `wavenet-conv explain` shows on a terminal: the records of its `--json` as lines of text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from rich.cells import cell_len
from rich.text import Text

BARS = (4, 40)  # columns of the longest bar, at least and at most
HEADING = 40  # characters of a name that its heading shows
WIDE = 60  # columns from which there is room between cells
EIGHTHS = " ▏▎▍▌▋▊▉"

Record = dict[str, Any]


class Page:
    """The lines for some records.

    Args:
        records: What `--json` writes.
        width: Columns of the terminal.
        uniform: The surprise of a uniform guess, in bits.
        ascii_only: Whether other characters are written as escapes, and bars as `#`.
    """

    def __init__(self, records: Sequence[Record], width: int, uniform: float, *, ascii_only: bool):
        self.records, self.width, self.uniform, self.ascii_only = records, width, uniform, ascii_only
        self.gap, self.grouping = ("  ", ",") if width >= WIDE else (" ", "")

    def lines(self) -> Iterator[Text]:
        """All lines, name by name; then the nodes of several names together."""
        header, *rows = self._rows([position for record in self.records for position in record["positions"]])
        following = iter(rows)
        for record in self.records:
            name = record["name"]
            rest = f'"... ({len(name):,} characters)' if len(name) > HEADING else '"'
            yield Text(f'"{self._escaped(name[:HEADING])}{rest}', "bold")
            yield header
            yield from islice(following, len(name) + 1)
            yield Text(_summary(record))
            yield Text()
            yield from self._nodes(record["nodes"])
            yield Text()
        if len(self.records) > 1:
            together = self.records[0]["nodes_together"]
            single, union = sum(sum(record["nodes"]["distinct"]) for record in self.records), sum(together["distinct"])
            yield Text("all names together", "bold")
            yield Text(f"distinct nodes: {single:,} name by name, {union:,} together; names share {single - union:,}")
            yield from self._nodes(together)

    def _rows(self, positions: Sequence[Record]) -> Iterator[Text]:
        """A header, and a row per position, with as many of the likeliest characters as fit."""
        columns = [
            _aligned(["char", *map(self._character, positions)]),
            _aligned(["prob", *(_percent(position["probability"], 1) for position in positions)], ">"),
            _aligned(["bits", *(_fixed(position["bits"], 2) for position in positions)], ">"),
        ]
        left = [self.gap.join(cells) + self.gap for cells in zip(*columns)]
        likely = [[self._likely(other) for other in position["likeliest"]] for position in positions]
        ranks = [[self.gap + cell for cell in _aligned(["", *rank])] for rank in zip(*likely)]
        room, title, right = self.width - cell_len(left[0]), f"{self.gap}likeliest", 0
        while ranks and (right := max(len(title), sum(cell_len(rank[0]) for rank in ranks))) > room - BARS[0]:
            ranks.pop()
        bar = min(max(room - right if ranks else room, BARS[0]), BARS[1])
        surprise = "surprise" if bar >= len("surprise") else ""
        yield Text(f"{left[0]}{surprise:{bar}}{title if ranks else ''}".rstrip(), "dim")
        longest = max(position["bits"] or 0.0 for position in positions) or 1.0
        for start, position, *cells in zip(left[1:], positions, *(rank[1:] for rank in ranks)):
            bits = position["bits"] or 0.0
            color = "green" if bits < self.uniform / 2 else "yellow" if bits <= self.uniform else "red"
            yield Text.assemble(start, (self._bar(bar * bits / longest).ljust(bar), color), "".join(cells).rstrip())

    def _bar(self, columns: float) -> str:
        if self.ascii_only:
            return "#" * round(columns)
        eighths = round(8 * columns)
        return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()

    def _nodes(self, counts: dict[str, Sequence[int]]) -> Iterator[Text]:
        """What the pass saves, and a table with a row per layer and one for all layers."""
        loop, computed, reused, *_ = map(sum, counts.values())
        yield Text(f"nodes: the pass computes {computed:,} and reuses {reused:,} of the loop's {loop:,}")
        names = ["pass" if name == "convolution" else name for name in counts]
        columns = [["layer", *map(str, range(1, len(counts["loop"]) + 1)), "all"]]
        columns += [
            [name, *(f"{n:{self.grouping}}" for n in (*layers, sum(layers)))]
            for name, layers in zip(names, counts.values())
        ]
        header, *rows = (self.gap.join(cells) for cells in zip(*(_aligned(column, ">") for column in columns)))
        yield Text(header, "dim")
        yield from map(Text, rows)

    def _likely(self, other: Record) -> str:
        return f"{self._character(other)} {_percent(other['probability'], 0):>3}"

    def _character(self, position: Record) -> str:
        """A character; a space in quotes."""
        character = position["character"]
        return "end" if character is None else '" "' if character == " " else self._escaped(character)

    def _escaped(self, text: str) -> str:
        """As inside a JSON string, with escapes for all that has no place or no width on this terminal."""
        return "".join(c if self._is_shown(c) else json.dumps(c)[1:-1] for c in text)

    def _is_shown(self, character: str) -> bool:
        if character in '"\\' or (self.ascii_only and not character.isascii()):
            return False
        return character.isprintable() and cell_len(character) > 0


def _summary(record: Record) -> str:
    """The whole score in a sentence."""
    score, bits, percentile = record["score"], record["bits_per_character"], record["percentile"]
    text = f"score {_fixed(score, 4)} nats, {_fixed(bits, 3)} bits per character"
    return text if percentile is None else f"{text}, percentile {percentile:.1f}"


def _aligned(column: Sequence[str], side: str = "<") -> list[str]:
    """The cells of a column, padded to its width."""
    width = max(map(cell_len, column))
    spaces = (" " * (width - cell_len(cell)) for cell in column)
    return [space + cell if side == ">" else cell + space for space, cell in zip(spaces, column)]


def _fixed(number: float | None, digits: int) -> str:
    return "nan" if number is None else f"{number:.{digits}f}"


def _percent(probability: float | None, digits: int) -> str:
    """A probability in percent; one that would round to 0 is less than the smallest step."""
    if probability is None:
        return "nan"
    step = 10.0**-digits
    return f"<{step:.{digits}f}%" if 100 * probability < step / 2 else f"{probability:.{digits}%}"
