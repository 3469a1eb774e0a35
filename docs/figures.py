"""Draws the figures of the README and the docs as SVG: `python docs/figures.py` writes docs/figures/*.svg.

`tree.svg` counts the nodes of the model that ships. `growth.svg`, `sizes.svg` and `ladder.svg` plot slide-cpu.json,
score-cpu.json and ladder-cpu.json of benchmarks/results.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import floor, prod
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks are not installed
sys.path.insert(0, str(Path(__file__).parent))

from picture import Axes, Picture, powers_of_ten

from benchmarks.output import RESULTS, published
from benchmarks.rungs import LECTURE, NGRAMS, OURS, RIVALS
from wavenet_conv import load_checkpoint
from wavenet_conv.errors import UsageError

ROOT = Path(__file__).parents[1]
NAME, TREES = "olivia", (2, 6)  # outputs whose trees are drawn: windows 4 apart share pairs and quads


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
    contexts, label = [row["context"] for row in rows], "context (tokens that one prediction sees)"
    axes = Axes(picture, contexts, powers_of_ten(1, 1000), label)
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
    axes = Axes(picture, powers_of_ten(1, size), powers_of_ten(min(found), max(found)), "names in a call")
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


def ladder_figure() -> str:
    """Validation loss against parameters and against seconds of training, a point per rung, coloured by family."""
    results = published(RESULTS / "ladder-cpu.json")
    rows: dict[str, dict[str, Any]] = {row["rung"]: row for row in results["rungs"]}
    found = {kind: [rows[rung.name] for rung in rungs if rung.name in rows] for kind, (_, rungs) in FAMILIES.items()}
    loss = lambda row: row["validation_loss"]
    presets = [row for row in found["shared"] if not row["rung"].endswith("plain")]  # not those of the teachers
    best = sorted([*presets, *(min(members, key=loss) for members in found.values() if members)], key=loss)
    texts = {row["rung"]: f"{row['rung']} {loss(row):.3f}" for row in best}
    low = floor(10 * min(map(loss, rows.values()))) / 10
    ys = [round(low + step / 20, 2) for step in range(7)]  # higher losses are at the upper edge, with a label
    texts |= {name: f"{name} {loss(row):.3f} ↑" for name, row in rows.items() if loss(row) > ys[-1]}
    title = f"Validation loss against parameters and seconds of training: {', '.join(texts.values())}"
    picture = Picture(960, 640, title)
    picture.text(24, 36, "Validation loss, by parameters and by seconds of training", "title start")
    picture.text(24, 58, f"{results['device']}; nats per character; horizontal axes logarithmic", "soft start")
    for x, (kind, (family, _)) in zip(range(540, 960, 108), FAMILIES.items()):
        picture.dot(x, 53, 5, kind)
        picture.text(x + 12, 58, family, "soft start")
    for key, label, left in (("parameters", "parameters, or n-grams", 64), ("seconds", "seconds of training", 534)):
        values = [row[key] for row in rows.values()]
        axes = Axes(picture, powers_of_ten(min(values), max(values)), ys, label, float, (left, left + 390, 570))
        points = {name: axes.place(row[key], min(loss(row), ys[-1])) for name, row in rows.items()}
        for kind, members in found.items():
            for row in members:
                picture.dot(*points[row["rung"]], 5, kind)
        taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in points.values()]
        for name, text in texts.items():
            axes.label(*points[name], text, taken)
    return str(picture)


# Of the ladder: by colour, the name of a family and its rungs.
FAMILIES = {
    "soft": ("the lecture", LECTURE),
    "ngrams": ("n-grams", NGRAMS),
    "node": ("torch.nn", RIVALS),
    "shared": ("ours", OURS),
}
FIGURES = {"tree.svg": tree_figure, "growth.svg": growth_figure, "sizes.svg": sizes_figure, "ladder.svg": ladder_figure}


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
