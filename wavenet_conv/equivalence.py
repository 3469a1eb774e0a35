"""The per-position comparison of a tree and a slid model. Knows both only as functions from tokens to logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ModeError, NamesError, ShapeError
from .model import ConvWaveNet
from .vocabulary import Vocabulary, checked_names

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
TOKENS_AT_ONCE = 2**17  # tokens in all the windows of one call of the tree: bounds memory


@dataclass(frozen=True)
class Report:
    """What `verify` saw. `print(report)` says it in two lines; it is true where the models are equal.

    equal: every logit differs by at most `tolerance * max(1, |logit|)`. positions: outputs compared, each of
    vocabulary-many logits. max_abs_diff: the largest difference of two logits. worst: the name and the position of it.
    argmax_differences: positions where the models prefer different tokens, and to one of them the two are no tie within
    the tolerance.
    """

    equal: bool
    positions: int
    names: int
    max_abs_diff: float
    worst: tuple[str, int]
    argmax_differences: int
    tolerance: float
    dtype: torch.dtype

    def __bool__(self) -> bool:
        return self.equal

    def __str__(self) -> str:
        name, position = self.worst
        name = name if len(name) <= 40 else f"{name[:37]}..."
        return (
            f"{'equal' if self.equal else 'NOT EQUAL'}: {self.positions:,} positions of {self.names:,} names, "
            f"{str(self.dtype).removeprefix('torch.')}, tolerance {self.tolerance:g} (of a logit's size above 1)\n"
            f"largest difference {self.max_abs_diff:.3g} in {name!r} at position {position}; "
            f"{self.argmax_differences:,} positions with another argmax"
        )


@torch.no_grad()
def verify(
    tree: Any,
    conv: ConvWaveNet,
    names: Iterable[str],
    vocab: Vocabulary,
    *,
    on_progress: Callable[[int], Any] | None = None,
) -> Report:
    """Runs `tree` on every window of every name and `conv` on every whole name, and compares all logits.

    tree: tokens `(windows, context)` to logits `(windows, vocab)`. conv: tokens `(batch, time)` to logits
    `(batch, time - context + 1, vocab)`, with `.context`. Both in float64 (tolerance 1e-12) or float32 (1e-5); a
    float32 comparison on CUDA belongs inside `exact_float32()`. `on_progress` is called with a number of names done.
    Raises `ModeError` where either is in training mode, `NamesError` for no names or unknown characters, `ShapeError`
    where the logits have no such shapes or another dtype, or the tree does not run at all.
    """
    if not isinstance(conv, nn.Module) or not hasattr(conv, "context"):
        raise ShapeError(
            f"the second model is a {type(conv).__name__}; verify(tree, conv, names, vocab) takes a slid one"
        )
    _refuse_training(tree, "tree")
    _refuse_training(conv, "conv")
    device = next(conv.parameters()).device
    totals, worst = [], None
    for chunk in _chunks(names, conv.context):
        tokens, lengths = vocab.encode(chunk, context=conv.context)
        outputs = torch.arange(int(lengths.max()) + 1)
        inside = outputs <= lengths[:, None]
        which, where = inside.nonzero(as_tuple=True)
        windows = tokens.unfold(1, conv.context, 1)[inside].to(device)
        found = conv(tokens.to(device))  # first: it refuses tokens outside its vocabulary
        expected = torch.cat([_run(tree, part) for part in windows.split(max(1, TOKENS_AT_ONCE // conv.context))])
        if found.shape[:2] != inside.shape or expected.shape != (len(windows), found.shape[2]):
            raise ShapeError(
                f"logits of shape {tuple(expected.shape)} from the tree for {len(windows)} windows and "
                f"{tuple(found.shape)} from the slid model for {tuple(inside.shape)} outputs do not match"
            )
        difference, place, equal, others = _compare(expected, found[inside.to(device)])
        if worst is None or not difference <= worst[0]:
            worst = (difference, chunk[int(which[place])], int(where[place]))
        totals.append((len(chunk), len(windows), equal, others))
        if on_progress is not None:
            on_progress(len(chunk))
    if worst is None:
        raise NamesError("there are no names to compare; give at least one (the empty name '' has one position)")
    count, positions, equal, others = zip(*totals)
    return Report(
        equal=all(equal),
        positions=sum(positions),
        names=sum(count),
        max_abs_diff=worst[0],
        worst=worst[1:],
        argmax_differences=sum(others),
        tolerance=_tolerance(expected.dtype, found.dtype),
        dtype=expected.dtype,
    )


def _compare(expected: Tensor, found: Tensor) -> tuple[float, int, bool, int]:
    """Largest difference, its row, whether all are within the tolerance, and rows with another argmax: `(n, vocab)`."""
    tolerance = _tolerance(expected.dtype, found.dtype)
    difference = (expected - found).abs()
    per_row = difference.amax(1).nan_to_num(nan=torch.inf, posinf=torch.inf)
    equal = bool((difference.isfinite() & (difference <= tolerance * expected.abs().clamp(min=1))).all())
    choices = torch.stack([expected.argmax(1), found.argmax(1)], dim=1)
    tree, slid = expected.gather(1, choices).T, found.gather(1, choices).T
    margin = torch.maximum(tree[0] - tree[1], slid[1] - slid[0])  # how far from a tie either model has the two
    apart = margin > tolerance * tree[0].abs().clamp(min=1)
    return float(per_row.max()), int(per_row.argmax()), equal, int(apart.sum())


def _tolerance(expected: torch.dtype, found: torch.dtype) -> float:
    if expected != found or expected not in TOLERANCE:
        raise ShapeError(f"the tree gives {expected} and the slid model {found}; compare both in float64 or float32")
    return TOLERANCE[expected]


def _chunks(names: Iterable[str], context: int) -> Iterator[list[str]]:
    """Names of like length together, so that little is padding, in chunks of bounded size."""
    chunk: list[str] = []
    for name in sorted(checked_names(names), key=len):
        if chunk and (len(chunk) + 1) * (len(name) + context) * context > TOKENS_AT_ONCE:
            yield chunk
            chunk = []
        chunk.append(name)
    if chunk:
        yield chunk


def _run(tree: Any, windows: Tensor) -> Tensor:
    """The tree's logits; a list of layers is run in order."""
    try:
        return tree(windows) if callable(tree) else reduce(lambda x, layer: layer(x), tree, windows)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ShapeError(f"the tree cannot run windows of shape {tuple(windows.shape)}: {error}") from error


def _refuse_training(model: Any, what: str) -> None:
    for part in _parts(model):
        if getattr(part, "training", False):
            raise ModeError(
                f"{what} is in training mode ({type(part).__name__}.training is true), where logits depend on the "
                f"batch; call .eval(), or set layer.training = False on every layer"
            )


def _parts(model: Any) -> Iterator[Any]:
    """The model and everything inside it that could be in training mode, modules and plain layers alike."""
    yield model
    inside = list(model.children()) if isinstance(model, nn.Module) else []
    layers = model if isinstance(model, (list, tuple)) else getattr(model, "layers", ())
    for part in [*inside, *(layers if isinstance(layers, (list, tuple)) else ())]:
        yield from _parts(part)
