"""The figure of the ladder: a point per rung in each panel, and labels that can be read."""

import json
import random
import re
import runpy
from itertools import combinations

import pytest
from helpers import ROOT

from benchmarks import output, rungs
from benchmarks.rungs import RUNGS


@pytest.fixture
def figure(tmp_path, monkeypatch):
    """The figure of made-up results."""
    draw = random.Random(4)
    kinds = {"rung": list(RUNGS), "parameters": (700, 300_000), "seconds": (0.05, 4000), "validation_loss": (1.91, 2.4)}
    rows = [{key: draw.uniform(*kinds[key]) for key in list(kinds)[1:]} | {"rung": name} for name in RUNGS]
    results = {"device": "a machine", "rungs": rows}
    (tmp_path / "ladder-cpu.json").write_text(json.dumps(results))
    monkeypatch.setattr(output, "RESULTS", tmp_path)
    drawn = runpy.run_path(str(ROOT / "docs" / "figures.py"))["FIGURES"]["ladder.svg"]()
    return drawn, {row["rung"]: row["validation_loss"] for row in rows}


def test_the_figure_has_a_point_per_rung_and_panel_and_its_labels_do_not_overlap(figure):
    drawn, losses = figure
    dots = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="5" class="(\w+)"/>', drawn)
    sizes = {
        "soft": len(rungs.LECTURE),
        "ngrams": len(rungs.NGRAMS),
        "node": len(rungs.RIVALS),
        "shared": len(rungs.OURS),
    }
    for kind, count in sizes.items():
        assert sum(dot[2] == kind for dot in dots) == 2 * count + 1  # and one beside the family's name
    labels = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" class="(start|end)">([\w-]+ \d\.\d{3})( ↑)?</text>', drawn)
    named = {label[3].split()[0] for label in labels}
    assert named >= {"ours-fast", "ours-wide", "ours-gated"} and len(labels) == 2 * len(named)
    for family in (rungs.LECTURE, rungs.NGRAMS, rungs.RIVALS):
        assert min((rung.name for rung in family), key=losses.get) in named
    for _, _, _, text, above in labels:
        assert text == f"{text.split()[0]} {losses[text.split()[0]]:.3f}" and bool(above) == (float(text[-5:]) > 2.2)
    boxes = []
    for x, y, side, text, above in labels:
        width = 7.4 * len(text + above) * (1 if side == "start" else -1)
        boxes.append((*sorted((float(x), float(x) + width)), float(y) - 13, float(y) + 3))
    boxes += [(float(x) - 5, float(x) + 5, float(y) - 5, float(y) + 5) for x, y, _ in dots if y != "53"]
    texts = len(labels)
    for (i, one), (_, other) in combinations(enumerate(boxes), 2):
        if i < texts:
            assert one[1] <= other[0] or other[1] <= one[0] or one[3] <= other[2] or other[3] <= one[2]
