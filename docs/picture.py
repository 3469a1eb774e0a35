"""SVG pictures on a light and a dark page, and axes with labels that do not overlap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from itertools import product
from math import ceil, floor, log10

Box = tuple[float, float, float, float]  # left, top, right and bottom

STYLE = """
svg { font: 14px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif }
text { text-anchor: middle; fill: var(--text) }
.start { text-anchor: start } .end { text-anchor: end } .title { font-size: 17px; font-weight: 600 }
.soft { fill: var(--soft) } .card { fill: var(--card) } .mono { font: 15px ui-monospace, Menlo, Consolas, monospace }
.token { fill: var(--card); stroke: var(--soft) } .node { fill: var(--node) } .shared { fill: var(--shared) }
.in { fill: var(--in); font-size: 12px; font-weight: 600 } .edge { stroke: var(--soft); opacity: 0.45 }
.tree { stroke: var(--soft); stroke-width: 2 } .grid { stroke: var(--line) } path { fill: none; stroke-width: 3 }
path.loop, path.windows { stroke: var(--soft) } path.slid { stroke: var(--node) } path.ngrams { stroke: var(--ngrams) }
path.loop { stroke-dasharray: 3 6 } path.scorer { stroke: var(--shared) } circle.scorer { fill: var(--shared) }
circle.loop, circle.windows { fill: var(--soft) } circle.slid { fill: var(--node) }
circle.ngrams { fill: var(--ngrams) }
svg { --card: #fff; --text: #1f2328; --soft: #636c76; --line: #d1d9e0; --node: #4577a8; --shared: #c2570c; --in: #fff }
svg { --ngrams: #2f7d4f }
@media (prefers-color-scheme: dark) {
  svg { --card: #161b22; --text: #e6edf3; --soft: #9198a1; --line: #3d444d; --node: #79b0e8; --shared: #f5a05a }
  svg { --in: #111; --ngrams: #6fc48f }
}
"""


class Picture:
    """An SVG with a background of its own, so that it can be read on a light and on a dark page."""

    def __init__(self, width: int, height: int, title: str):
        size = f'width="{width}" height="{height}"'
        self.lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {size} role="img">',
            f"<title>{escape(title)}</title><style>{STYLE}</style>",
            f'<rect class="card" {size} rx="10"/>',
        ]

    def text(self, x: float, y: float, text: str, kind: str = "") -> None:
        self.lines.append(f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(text)}</text>')

    def line(self, x: float, y: float, to_x: float, to_y: float, kind: str) -> None:
        self.lines.append(f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" class="{kind}"/>')

    def dot(self, x: float, y: float, radius: float, kind: str, label: str = "") -> None:
        self.lines.append(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" class="{kind}"/>')
        if label:
            self.text(x, y + 4.5, label, "in")

    def token(self, x: float, y: float, character: str) -> None:
        self.lines.append(f'<rect x="{x - 11:g}" y="{y - 12:g}" width="22" height="24" rx="4" class="token"/>')
        self.text(x, y + 5, character, "mono")

    def curve(self, points: list[tuple[float, float]], kind: str) -> None:
        self.lines.append(f'<path d="M{" L".join(f"{x:.1f},{y:.1f}" for x, y in points)}" class="{kind}"/>')
        for x, y in points:
            self.dot(round(x, 1), round(y, 1), 4.5, kind)

    def __str__(self) -> str:
        return "\n".join([*self.lines, "</svg>", ""])


class Axes:
    """Axes of a picture, the horizontal one logarithmic, the vertical one by `up`.

    `xs` and `ys` are marked; the first and the last of each are the ends of its axis.
    """

    top = 74

    def __init__(
        self,
        picture: Picture,
        xs: Sequence[float],
        ys: Sequence[float],
        label: str,
        up: Callable[[float], float] = log10,
        sides: tuple[int, int, int] = (84, 700, 372),
    ):
        self.picture, self.up, (self.left, self.right, self.bottom) = picture, up, sides
        self.first, self.last, self.low, self.high = xs[0], xs[-1], up(ys[0]), up(ys[-1])
        for mark in ys:
            y = self.place(self.first, mark)[1]
            picture.line(self.left, y, self.right, y, "grid")
            picture.text(self.left - 12, y + 5, f"{mark:,}", "soft end")
        for x in xs:
            picture.text(self.place(x, ys[0])[0], self.bottom + 24, f"{x:,}", "soft")
        picture.text((self.left + self.right) / 2, self.bottom + 50, label, "soft")

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = log10(x / self.first) / log10(self.last / self.first)
        up = (self.up(y) - self.low) / (self.high - self.low)
        return self.left + across * (self.right - self.left), self.bottom - up * (self.bottom - self.top)

    def label(self, x: float, y: float, text: str, taken: list[Box]) -> None:
        """Writes a text near a place, with a line to it, where it overlaps no box of `taken`, which it joins."""
        width = 7.5 * len(text)
        for away, down, side in product(range(0, 200, 4), (-1, 1), (1, -1)):
            near, far, middle = x + 10 * side, x + (10 + width) * side, y + away * down
            box = (min(near, far), middle - 9, max(near, far), middle + 9)
            inside = self.left <= box[0] and box[2] <= self.right and self.top <= box[1] and box[3] <= self.bottom
            if inside and not any(overlap(box, other) for other in taken):
                taken.append(box)
                self.picture.line(round(x, 1), round(y, 1), round(near - side, 1), round(middle, 1), "edge")
                self.picture.text(round(near, 1), round(middle + 5, 1), text, "start" if side > 0 else "end")
                return


def overlap(one: Box, other: Box) -> bool:
    """Whether two boxes have a point in common."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def powers_of_ten(low: float, high: float) -> list[float]:
    """Those from the last that is not above the first number to the first that is not below the second."""
    return [10**power for power in range(floor(log10(low)), ceil(log10(high)) + 1)]
