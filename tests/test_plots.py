"""Plots: what is drawn where, whole files, no window system, and what is said where one cannot be drawn."""

import math
import subprocess
import sys

import pytest
import torch

from wavenet_conv import Vocabulary, plots
from wavenet_conv.errors import OutputError, ShapeError, UsageError

matplotlib = pytest.importorskip("matplotlib", reason="needs matplotlib: pip install matplotlib")

BEGINNINGS = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the figures that would be written."""
    figures = []
    monkeypatch.setattr(plots, "_write", lambda figure, path: figures.append(figure.axes))
    return figures


@pytest.mark.parametrize("suffix", BEGINNINGS)
def test_files_of_every_format(tmp_path, suffix):
    path = tmp_path / f"plot.{suffix}"
    plots.plot_losses(path, [3.0, 2.5, math.nan], [(2, 2.75)], torch.randn(4, 2), "abc")
    assert path.read_bytes().startswith(BEGINNINGS[suffix])
    plots.plot_rates(path, [0.001, 0.01, 0.1], [3.0, 2.5, math.inf], 0.01)
    plots.plot_trials(path, [("trial 0", [(2, 3.0)], [(2, 3.1)]), ("trial 1", [], [])])
    plots.plot_trials(path, [])
    assert path.read_bytes().startswith(BEGINNINGS[suffix])
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert "matplotlib.pyplot" not in sys.modules


def test_long_curves_are_smoothed_as_the_lecture_smooths_them(drawn):
    losses = torch.rand(200_000)
    plots.plot_losses("-", losses, [(1000, 0.5), (2000, 0.4)])
    training, validation = drawn[0][0].lines
    assert torch.allclose(torch.tensor(training.get_ydata()), losses.view(-1, 1000).double().mean(1))
    assert training.get_xdata()[0] == 500.5 and len(training.get_xdata()) == 200
    assert list(zip(*validation.get_data())) == [(1000, 0.5), (2000, 0.4)]


@pytest.mark.parametrize("steps, points", [(0, 0), (1, 1), (399, 399), (400, 200), (1500, 215), (300_500, 301)])
def test_about_two_hundred_points_and_at_most_a_thousand_steps_a_point(drawn, steps, points):
    plots.plot_losses("-", torch.rand(steps), [])
    assert len(drawn[0][0].lines[0].get_xdata()) == points


def test_means_of_groups():
    assert plots.means(torch.arange(5), 2).tolist() == [0.5, 2.5, 4]


def test_an_embedding_two_wide_is_drawn_with_its_characters(drawn):
    table = torch.randn(4, 2, requires_grad=True)
    plots.plot_losses("-", [torch.tensor(1.0)], [], table, "a$é")
    texts = drawn[0][1].texts
    assert [text.get_text() for text in texts] == [".", "a", "$", "é"]
    assert [text.get_position() for text in texts] == [tuple(row) for row in table.tolist()]
    plots.plot_losses("-", [1.0], [], torch.randn(4, 3), "abc")
    assert len(drawn[1]) == 1
    with pytest.raises(ShapeError, match="an embedding of 4 tokens for '.' and the characters 'ab'"):
        plots.plot_losses("-", [1.0], [], table, "ab")


def test_the_valley_is_seen_beside_the_explosion(drawn):
    plots.plot_rates("-", [0.001, 0.01, 0.1, 1.0], [3.0, 2.0, 50.0, math.nan], 0.01)
    axes = drawn[0][0]
    low, high = axes.get_ylim()
    assert 1.8 < low < 2 and 3 < high < 3.3 and axes.get_xscale() == "log"
    assert set(axes.lines[1].get_xdata()) == {0.01}


def test_the_best_trial_lies_on_top(drawn):
    curves = [("trial 0", [(1, 3.0)], [(1, 2.9)]), ("trial 1", [(1, 2.8)], [(1, 2.7)]), ("trial 2", [], [])]
    plots.plot_trials("-", curves)
    for axes, loss in zip(drawn[0], (2.8, 2.7)):
        best = axes.lines[-1]
        assert (best.get_label(), best.get_ydata()[0], best.get_color()) == ("best: trial 1", loss, "C0")


def test_what_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"a.gif: a plot is a .png, .svg, .pdf file"):
        plots.check_plot("a.gif")
    with pytest.raises(UsageError, match="--plot .*: not a file in a folder that is there"):
        plots.check_plot(tmp_path / "none" / "a.png")
    with pytest.raises(OutputError, match="a.png: No such file or directory; give another file"):
        plots.plot_rates(tmp_path / "none" / "a.png", [0.1], [1.0], 0.1)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match="pip install matplotlib"):
        plots.check_plot(tmp_path / "a.png")


def test_characters_that_the_font_lacks(tmp_path, recwarn):
    vocab = Vocabulary("ab\u4e00")
    plots.plot_losses(tmp_path / "a.png", [1.0], [], torch.randn(4, 2), vocab.characters)
    assert not recwarn.list


def test_the_package_imports_neither_matplotlib_nor_optuna():
    code = "import sys, wavenet_conv.cli; assert not {'matplotlib', 'optuna'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
