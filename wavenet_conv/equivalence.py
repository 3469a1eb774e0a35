"""Compares a tree with a convolutional model at every position; both are functions from tokens to logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError, NamesError, ShapeError
from .notebook import as_function, left_as_found, logits_in
from .precision import exact_float32_on
from .vocabulary import Vocabulary, checked_names

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
TOKENS_AT_ONCE = 2**17  # tokens in all the windows of one call of the tree: bounds memory


@dataclass(frozen=True)
class Report:
    """The result of `verify`: true if the models are equal; `str` gives two lines of text.

    Attributes:
        equal: Whether every logit differs by at most `tolerance * max(1, |logit|)`.
        positions: How many outputs were compared.
        names: How many names were compared.
        max_abs_diff: The largest absolute difference of two logits; infinite if one is NaN or infinite.
        worst: The name and the position of that difference.
        argmax_differences: Positions where the models prefer different tokens and it is no tie within the tolerance.
        tolerance: 1e-12 in float64, 1e-5 in float32.
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
        return (
            f"{'equal' if self.equal else 'NOT EQUAL'}: {self.positions:,} positions of {self.names:,} names, "
            f"{str(self.dtype).removeprefix('torch.')}, tolerance {self.tolerance:g} (times the logit where that is "
            f"above 1)\n"
            f"largest difference {self.max_abs_diff:.3g} in {name!r:.40} at position {position}; "
            f"the likeliest token differs at {self.argmax_differences:,} positions"
        )


def verify(
    tree: Any, conv: Any, names: Iterable[str], vocab: Vocabulary, *, on_progress: Callable[[int], Any] | None = None
) -> Report:
    """Runs `tree` on every window of every name and `conv` on every whole name, and compares all logits.

    Both run in evaluation mode, without gradients and without TF32, and are afterwards what they were. Both are in
    float64 or in float32. A wrong vocabulary is not detected, since both models then read the same wrong tokens: if the
    notebook's numbers are not `.` as 0 and sorted characters as 1, 2, ..., give `Vocabulary.from_mapping(stoi)`.

    Args:
        tree: What `from_tree` takes: tokens int64 `(windows, context)` to logits `(windows, vocab)`, which may be in a
            tuple or a dict and have axes of 1; a list of layers is called in order.
        conv: A `ConvWaveNet` or a `FoldedWaveNet`.
        names: The names, at least one.
        vocab: The vocabulary of both models.
        on_progress: Called with the number of names in each chunk when it is done.

    Raises:
        ConfigError: The vocabulary has another number of tokens than the model.
        NamesError: There are no names, or a character is unknown.
        ShapeError: The logits have other shapes or dtypes, or the tree does not run.
    """
    if not callable(conv) or not hasattr(conv, "context"):
        found = type(conv).__name__
        raise ShapeError(f"the second model is a {found}; call verify(tree, conv, names, vocab) with a ConvWaveNet")
    if not isinstance(vocab, Vocabulary):
        raise ConfigError(f"the vocabulary is a {type(vocab).__name__}; take Vocabulary.from_mapping(stoi)")
    if hasattr(conv, "config"):
        vocab.check_size(conv.config.vocab_size)
    names = checked_names(names)
    if not names:
        raise NamesError("there are no names to compare; give at least one (the empty name '' has one position)")
    if not set(vocab.characters).issuperset("".join(names)):
        raise vocab.unknown_character_error(names)
    reports, function = [], as_function(tree)
    with left_as_found(tree), left_as_found(conv), exact_float32_on(_device(conv)):
        for chunk in _chunks(names, conv.context):
            reports.append(_compare(function, conv, chunk, vocab))
            if on_progress is not None:
                on_progress(len(chunk))
    return replace(
        max(reports, key=lambda report: report.max_abs_diff),
        equal=all(report.equal for report in reports),
        positions=sum(report.positions for report in reports),
        names=sum(report.names for report in reports),
        argmax_differences=sum(report.argmax_differences for report in reports),
    )


def _compare(tree: Callable[[Tensor], Any], conv: Any, names: list[str], vocab: Vocabulary) -> Report:
    """The report for some names, all in one batch."""
    tokens, lengths = (tensor.to(_device(conv)) for tensor in vocab.encode(names, context=conv.context))
    inside = torch.arange(tokens.shape[1] - conv.context + 1, device=tokens.device) <= lengths[:, None]
    found = conv(tokens)  # first: it rejects tokens outside its vocabulary
    windows = tokens.unfold(1, conv.context, 1)[inside]
    expected = torch.cat([_run(tree, part) for part in windows.split(max(1, TOKENS_AT_ONCE // conv.context))])
    if found.shape[:2] != inside.shape or expected.shape != (len(windows), found.shape[2]):
        raise ShapeError(
            f"logits of shape {tuple(expected.shape)} from the tree for {len(windows)} windows and "
            f"{tuple(found.shape)} from the convolutional model for {tuple(inside.shape)} outputs do not match"
        )
    if expected.dtype != found.dtype or expected.dtype not in TOLERANCE:
        both = f"the tree gives {expected.dtype} and the convolutional model {found.dtype}"
        raise ShapeError(f"{both}; use float64 or float32 for both")
    found, tolerance = found[inside], TOLERANCE[expected.dtype]
    difference = (expected - found).abs()
    largest = difference.amax(1).nan_to_num(nan=torch.inf, posinf=torch.inf)
    choices = torch.stack([expected.argmax(1), found.argmax(1)], dim=1)
    ours, others = expected.gather(1, choices).T, found.gather(1, choices).T
    margin = torch.maximum(ours[0] - ours[1], others[1] - others[0])  # the larger distance from a tie of both models
    name, position = inside.nonzero()[largest.argmax()].tolist()
    return Report(
        equal=bool((difference.isfinite() & (difference <= tolerance * expected.abs().clamp(min=1))).all()),
        positions=len(windows),
        names=len(names),
        max_abs_diff=float(largest.max()),
        worst=(names[name], position),
        argmax_differences=int((margin > tolerance * ours[0].abs().clamp(min=1)).sum()),
        tolerance=tolerance,
        dtype=expected.dtype,
    )


def _chunks(names: list[str], context: int) -> Iterator[list[str]]:
    """Chunks of names of similar length, so that there is little padding, and of bounded size."""
    chunk: list[str] = []
    for name in sorted(names, key=len):
        if chunk and (len(chunk) + 1) * (len(name) + context) * context > TOKENS_AT_ONCE:
            yield chunk
            chunk = []
        chunk.append(name)
    if chunk:
        yield chunk


def _run(tree: Callable[[Tensor], Any], windows: Tensor) -> Tensor:
    try:
        return logits_in(tree(windows), len(windows))
    except Exception as error:  # any kind, since it is the model's
        raise ShapeError(f"the tree cannot run windows of shape {tuple(windows.shape)}: {error}") from error


def _device(conv: Any) -> torch.device:
    """Where the model's weights are: a module's parameters, or the weights of a folded model."""
    first = next(conv.parameters(), None) if isinstance(conv, nn.Module) else conv.weights.embedding
    return torch.device("cpu") if first is None else first.device
