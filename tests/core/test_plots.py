"""Plots: what is drawn where, whole files, no window system, and errors that say how to get a plot."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from wavenet_conv import plots
from wavenet_conv.errors import OutputError, UsageError

figure = pytest.importorskip("matplotlib.figure", reason="needs matplotlib: pip install matplotlib")


@pytest.fixture
def drawn(monkeypatch):
    """The axes of each figure that is saved."""
    figures = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: figures.append(self.axes))
    return figures


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_files_of_each_format(tmp_path, recwarn, suffix, start):
    path = tmp_path / f"plot.{suffix}"
    plots.plot_losses(path, [3.0, 2.5, math.nan], [(2, 2.75)], torch.randn(4, 2), "ab\u4e00")
    assert path.read_bytes().startswith(start)
    plots.plot_rates(path, [0.001, 0.01, 0.1], [3.0, 2.5, math.inf], 0.01)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert "matplotlib.pyplot" not in sys.modules and not recwarn.list  # also for a character without a glyph


def test_long_curves_are_smoothed_as_in_the_lecture(drawn):
    losses = torch.rand(200_000)
    plots.plot_losses("a.png", losses, [(1000, 0.5), (2000, 0.4)])
    training, validation = drawn[0][0].lines
    assert torch.allclose(torch.tensor(training.get_ydata()), losses.view(-1, 1000).double().mean(1))
    assert training.get_xdata()[0] == 500.5 and len(training.get_xdata()) == 200
    assert list(zip(*validation.get_data())) == [(1000, 0.5), (2000, 0.4)]


def test_an_embedding_two_wide_is_drawn_with_its_characters(drawn):
    table = torch.randn(4, 2, requires_grad=True)
    plots.plot_losses("a.png", [torch.tensor(1.0)], [], table, "a$é")
    texts = drawn[0][1].texts
    assert [text.get_text() for text in texts] == [".", "a", "$", "é"]
    assert [text.get_position() for text in texts] == [tuple(row) for row in table.tolist()]


def test_the_valley_is_visible_beside_the_explosion(drawn):
    plots.plot_rates("a.png", [0.001, 0.01, 0.1, 1.0], [3.0, 2.0, 50.0, math.nan], 0.01)
    low, high = drawn[0][0].get_ylim()
    assert 1.8 < low < 2 and 3 < high < 3.3 and drawn[0][0].get_xscale() == "log"
    assert set(drawn[0][0].lines[1].get_xdata()) == {0.01}


def test_plots_that_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"a.gif: a plot is a .png, .svg, .pdf file"):
        plots.check_plot("a.gif")
    with pytest.raises(UsageError, match="--plot .*: not a file in an existing folder"):
        plots.check_plot(tmp_path / "none" / "a.png")
    with pytest.raises(OutputError, match="a.png: No such file or directory in the folder .*none'; give another file"):
        plots.plot_rates(tmp_path / "none" / "a.png", [0.1], [1.0], 0.1)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match="pip install matplotlib"):
        plots.check_plot("a.png")
