"""Draws the figures of the README and the docs as SVG: `python docs/figures.py` writes docs/figures/*.svg.

`tree.svg` counts the nodes of the model that ships. `growth.svg` and `sizes.svg` plot slide-cpu.json and score-cpu.json
of benchmarks/results.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from html import escape
from math import ceil, floor, log10, prod
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks are not installed

from benchmarks.output import RESULTS, published
from wavenet_conv import load_checkpoint
from wavenet_conv.errors import UsageError

ROOT = Path(__file__).parents[1]
NAME, TREES = "olivia", (2, 6)  # outputs whose trees are drawn: windows 4 apart share pairs and quads

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
    """Logarithmic axes of a picture, `powers` of ten the vertical one; `xs` are the first and the last of the other."""

    left, right, top, bottom = 84, 700, 74, 372

    def __init__(self, picture: Picture, xs: Sequence[int], powers: tuple[int, int], label: str):
        self.first, self.last, self.low, self.high = xs[0], xs[-1], *powers
        for power in range(self.low, self.high + 1):
            y = self.place(self.first, 10**power)[1]
            picture.line(self.left, y, self.right, y, "grid")
            picture.text(self.left - 12, y + 5, f"{10**power:,}", "soft end")
        for x in xs:
            picture.text(self.place(x, 1)[0], self.bottom + 24, f"{x:,}", "soft")
        picture.text((self.left + self.right) / 2, self.bottom + 50, label, "soft")

    def place(self, x: float, us: float) -> tuple[float, float]:
        across = log10(x / self.first) / log10(self.last / self.first)
        up = (log10(us) - self.low) / (self.high - self.low)
        return self.left + across * (self.right - self.left), self.bottom - up * (self.bottom - self.top)


class NodesOfName:
    """The nodes of one name: in how many windows each is, and where it is drawn."""

    def __init__(self) -> None:
        trained = load_checkpoint("default")
        model, vocab = trained.model, trained.vocab
        tokens, lengths = vocab.encode([NAME], context=model.context)
        self.sizes, self.context, self.characters = model.config.kernel_sizes, model.context, "." * model.context + NAME
        self.spans = [prod(self.sizes[: layer + 1]) for layer in range(len(self.sizes))]
        counts = model.multiplicities(tokens, lengths)[:-1]  # without the head's
        self.windows_with = [count[0, 0].int().tolist() for count in counts if count is not None]
        targets = torch.cat([tokens[0, model.context :], torch.tensor([vocab.end])])
        self.probabilities = model(tokens).softmax(-1)[0].gather(1, targets[:, None])[:, 0].tolist()

    def in_tree(self, t: int) -> list[tuple[int, int]]:
        """Layer and position of the nodes in the tree of output t."""
        return [(layer, t + p) for layer, span in enumerate(self.spans) for p in range(0, self.context, span)]

    def draw(self, picture: Picture, trees: Sequence[int], x0: float, y0: float, step: int, up: int) -> None:
        """Draws the nodes of some trees with bold edges; of all, with thin edges, if there are several trees."""

        def place(layer: int, p: int) -> tuple[float, float]:  # over the middle of a span; layer -1 is the tokens
            return x0 + (p + ([*self.spans, 1][layer] - 1) / 2) * step, y0 - (layer + 1) * up

        bold = {node for t in trees for node in self.in_tree(t)}
        every = {node for t in range(len(NAME) + 1) for node in self.in_tree(t)}
        nodes = sorted(bold if len(trees) == 1 else every)
        for layer, p in sorted(nodes, key=bold.__contains__):
            for child in range(p, p + self.spans[layer], self.spans[layer] // self.sizes[layer]):
                picture.line(*place(layer, p), *place(layer - 1, child), "tree" if (layer, p) in bold else "edge")
        for layer, p in nodes:
            count = self.windows_with[layer][p]
            picture.dot(*place(layer, p), 11, *(("shared", str(count)) if count > 1 else ("node", "")))
        tops = [p for layer, p in nodes if layer == len(self.spans) - 1]
        for p in range(min(tops), max(tops) + self.context):
            picture.token(*place(-1, p), self.characters[p])
        for t in tops:
            x, y = place(len(self.spans) - 1, t)
            picture.text(x, y - 36, [*NAME, "end"][t], "mono")
            picture.text(x, y - 18, f"{self.probabilities[t]:.0%}", "soft")


def tree_figure() -> str:
    """The lecture's tree over two windows of a name, and beside it the same nodes in one convolutional pass."""
    nodes, outputs = NodesOfName(), len(NAME) + 1
    per_tree, slid = len(nodes.in_tree(0)), [len(counts) for counts in nodes.windows_with]
    title = (
        f"Left: two of the lecture's trees, for the predictions after {NAME[: TREES[0]]!r} and {NAME[: TREES[1]]!r}, "
        f"each of {per_tree} nodes; {outputs} trees have {per_tree * outputs}. Right: one convolutional pass "
        f"computes the {sum(slid)} nodes of all {outputs} predictions; nodes in several trees have another colour."
    )
    picture = Picture(960, 520, title)
    picture.text(24, 36, "The lecture: a tree for each prediction", "title start")
    trees = f"{outputs} predictions × {per_tree} nodes = {per_tree * outputs} nodes; two of the trees:"
    picture.text(24, 58, trees, "soft start")
    picture.text(440, 36, "The convolution: every node once", "title start")
    picture.text(440, 58, f"{' + '.join(map(str, slid))} = {sum(slid)} nodes, and the same predictions", "soft start")
    for t, y in zip(TREES, (268, 482)):
        nodes.draw(picture, [t], 40 - 26 * TREES[0], y, step=26, up=46)
    picture.text(156, 92, "next character", "soft start")
    picture.text(156, 110, "probability", "soft start")
    nodes.draw(picture, TREES, 458, 400, step=36, up=84)
    picture.text(564, 112, "next character", "soft end")
    picture.text(564, 130, "probability", "soft end")
    picture.dot(451, 456, 11, "shared", "4")
    picture.text(472, 461, "the number of trees that use this node; computed once", "soft start")
    picture.dot(451, 483, 11, "node")
    picture.text(472, 488, "used by one tree", "soft start")
    picture.line(440, 506, 462, 506, "tree")
    picture.text(472, 511, "the two trees on the left", "soft start")
    return str(picture)


def growth_figure() -> str:
    """Microseconds per position against the context, both axes logarithmic."""
    results = published(RESULTS / "slide-cpu.json")
    rows: list[dict[str, Any]] = results["growth"]
    end, factor = rows[-1], rows[-1]["time_ratio"]
    title = (
        f"Microseconds per prediction against the context: at {end['context']:,} tokens the tree takes "
        f"{end['methods'][0]['us_per_position']:.0f} and the convolution {end['methods'][1]['us_per_position']:.1f}"
    )
    picture = Picture(960, 440, title)
    picture.text(24, 36, "Microseconds per prediction, by context", "title start")
    picture.text(24, 58, f"{results['device']}; a text of 4,096 tokens; both axes logarithmic", "soft start")
    axes = Axes(picture, [row["context"] for row in rows], (0, 3), "context (tokens that one prediction sees)")
    place, right = axes.place, axes.right
    labels = {"windows": "tree, all windows as one batch", "slid": "convolutional pass"}
    for index, (kind, label) in enumerate(labels.items()):
        picture.curve([place(row["context"], row["methods"][index]["us_per_position"]) for row in rows], kind)
        x, y = place(end["context"], end["methods"][index]["us_per_position"])
        picture.text(x + 16, y - 4, f"{end['methods'][index]['us_per_position']:.3g} µs", "start")
        picture.text(x + 16, y + 15, label, "soft start")
    middle = (place(1, end["methods"][0]["us_per_position"])[1] + place(1, end["methods"][1]["us_per_position"])[1]) / 2
    picture.text(right + 16, middle + 2, f"{factor:.3g} times as fast", "title start")
    picture.text(right + 16, middle + 22, f"at a context of {end['context']:,}", "soft start")
    return str(picture)


def sizes_figure() -> str:
    """Microseconds per name against the number of names in a call, both axes logarithmic, a curve per method."""
    results = published(RESULTS / "score-cpu.json")
    rows: list[dict[str, Any]] = results["sizes"]
    ways = {
        "loop": ("loop", "the lecture's loop"),
        "windows": ("windows", "tree on all windows"),
        "convolutional pass": ("slid", "convolutional pass"),
        "Kneser-Ney 6, KenLM": ("ngrams", "KenLM's 6-grams"),
        "shared": ("scorer", "Scorer"),
    }
    curves = {name: [(row["names"], row[name]["us"]) for row in rows if name in row] for name in ways}
    found = [us for curve in curves.values() for _, us in curve]
    texts = [f"{curve[-1][1]:.3g} for {label}" for (_, label), curve in zip(ways.values(), curves.values())]
    size = rows[-1]["names"]
    picture = Picture(960, 440, f"Microseconds per name, for {size:,} in a call: {', '.join(texts[1:])}")
    picture.text(24, 36, "Microseconds per name, by the number of names in a call", "title start")
    device = f"{results['device']}; from strings to log-likelihoods; both axes logarithmic"
    picture.text(24, 58, device, "soft start")
    powers = floor(log10(min(found))), ceil(log10(max(found)))
    axes = Axes(picture, [10**power for power in range(round(log10(size)) + 1)], powers, "names in a call")
    ends = {name: axes.place(*curve[-1]) for name, curve in curves.items()}
    below = 0.0  # where the next label may stand
    for name in sorted(ways, key=lambda name: ends[name][1]):
        kind, label = ways[name]
        picture.curve([axes.place(*point) for point in curves[name]], kind)
        x, y = ends[name]
        y = max(y + 5, below)
        below = y + 20
        picture.text(x + 16, y, f"{curves[name][-1][1]:.3g} µs", "start")
        picture.text(x + 88, y, label, "soft start")
    return str(picture)


FIGURES = {"tree.svg": tree_figure, "growth.svg": growth_figure, "sizes.svg": sizes_figure}


def main() -> None:
    """Writes every figure, and none if a file of results must not be shown."""
    try:
        drawn = {name: figure() for name, figure in FIGURES.items()}
    except UsageError as error:
        sys.exit(f"docs/figures.py: {error}")
    for name, text in drawn.items():
        (ROOT / "docs" / "figures" / name).write_text(text)


if __name__ == "__main__":
    with torch.no_grad():
        main()
