"""Plots of training: losses, embeddings, learning rates. matplotlib is imported when one is drawn."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import OutputError, UsageError
from .files import write_whole
from .vocabulary import END

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
POINTS = 200  # at least, of a smoothed curve
LONGEST_MEAN = 1000  # steps per point, as in the lecture

Losses = Sequence[float] | Sequence[Tensor] | Tensor
Points = Sequence[tuple[int, float]]


def check_plot(path: str | Path) -> None:
    """Raises `UsageError` where no plot can be written to `path`; for a command to call before its work."""
    _format(path)
    if Path(path).is_dir() or not Path(path).parent.is_dir():
        raise UsageError(f"--plot {path}: not a file in an existing folder; give another path")
    _figure(1)


def plot_losses(
    path: str | Path, losses: Losses, validations: Points, embedding: Tensor | None = None, characters: str = ""
) -> None:
    """Plots the losses of one training, in nats: each step's, as means of groups, and `(step, loss)` of validations.

    An embedding `(vocab, 2)` is drawn beside them as in the lecture, with the vocabulary's `characters`.
    """
    figure, (axes, *other) = _figure(1 if embedding is None else 2)
    curve = _curve(losses)
    size = min(LONGEST_MEAN, max(1, len(curve) // POINTS))
    steps = _means(torch.arange(1, len(curve) + 1), size)
    axes.plot(steps, _means(curve, size), linewidth=1, label="training" + (f", means of {size:,}" if size > 1 else ""))
    if validations:
        axes.plot(*zip(*validations), "o", markersize=4, label="validation")
    axes.set(xlabel="step", ylabel="loss (nats)")
    axes.legend()
    if embedding is not None:
        points: list[tuple[float, float]] = embedding.tolist()
        other[0].scatter([x for x, _ in points], [y for _, y in points], s=200)
        for (x, y), character in zip(points, END + characters):
            other[0].text(x, y, character, ha="center", va="center", color="white", parse_math=False)
        other[0].set(title="embedding")
        other[0].grid(True, which="both", linewidth=0.3)
    _write(figure, path)


def plot_rates(path: str | Path, rates: Sequence[float], losses: Losses, suggestion: float) -> None:
    """Plots the losses of a `find-lr` against its learning rates, one per step, and marks the suggested rate."""
    figure, (axes,) = _figure(1)
    curve, size = _curve(losses), max(1, len(losses) // (POINTS // 2))
    axes.plot(10 ** _means(torch.tensor(rates).log10(), size), _means(curve, size))
    axes.axvline(suggestion, color="C1", linestyle="--", label=f"suggestion: {suggestion:.2g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss (nats)")
    finite = curve[curve.isfinite()]
    if len(finite):  # show the valley, not the explosion
        low, first = float(finite.min()), float(finite[0])
        axes.set_ylim(low - 0.05 * (first - low) - 0.01, first + 0.1 * (first - low) + 0.01)
    axes.legend()
    _write(figure, path)


def _means(values: Tensor, size: int) -> Tensor:
    """The means of consecutive groups of `size` values, of which the last may be smaller."""
    return torch.stack([group.mean(dtype=torch.float64) for group in values.split(size)]) if len(values) else values


def _curve(losses: Losses) -> Tensor:
    return torch.tensor([float(loss) for loss in losses], dtype=torch.float64)


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side, without pyplot, which would keep it and choose a window system."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UsageError(f"a plot needs {error.name}: pip install matplotlib") from error
    figure = Figure(figsize=(7 * panels, 5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _write(figure: Figure, path: str | Path) -> None:
    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a character that is not in the font is drawn as a box
        figure.savefig(data, format=_format(path), dpi=120)
    try:
        write_whole(path, data.getvalue())
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or error}; give another file") from error


def _format(path: str | Path) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise UsageError(f"{path}: a plot is a {', '.join(FORMATS)} file; give a name that ends in one of them")
    return suffix.removeprefix(".")
