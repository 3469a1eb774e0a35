"""Lists of any size, from strings to log-likelihoods: the loop, windows, the convolutional pass, KenLM and `Scorer`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import reference
from benchmarks import rivals
from benchmarks.harness import Session, spread, time_calls
from benchmarks.methods import Models
from benchmarks.tables import Row
from wavenet_conv import Scorer

SIZES = (1, 4, 16, 64, 256, 1024, 8192, 131_072, 1_000_000)
CALLS = (200, 200, 200, 100, 60, 40, 15, 9, 5)
LOOP_UP_TO = 1024  # names; after it, as long for each

Names = Sequence[str]
Score = Callable[[Names], Any]


def make_methods(models: Models, session: Session) -> dict[str, Score]:
    """All ways to score, by name; KenLM where it is installed, with 6-grams of the session's list."""
    scorer = Scorer(models.conv, models.vocab)
    methods: dict[str, Score] = {
        "loop": partial(by_loop, models),
        "windows": partial(by_windows, models),
        "convolutional pass": partial(by_pass, models),
        "shared": scorer.score,
    }
    if rivals.kenlm is not None:
        ngrams = rivals.count(session)
        methods[rivals.NGRAMS] = lambda names: ngrams.score(names, 1)
    return methods


def by_loop(models: Models, names: Names) -> Tensor:
    """The lecture's loop: a window at a time."""
    return torch.cat([by_windows(models, [name], batch=1) for name in names])


def by_windows(models: Models, names: Names, batch: int = 1024) -> Tensor:
    """The tree with batch norm folded in, on all windows."""
    tokens, lengths = models.vocab.encode(names, context=models.context)
    inside = torch.arange(tokens.shape[1] - models.context + 1) <= lengths[:, None]
    windows = reference.windows(tokens, models.context)[inside]
    logits = torch.cat([models.folded_tree(part) for part in windows.split(batch)])
    found = -F.cross_entropy(logits, F.pad(tokens[:, models.context :], (0, 1))[inside], reduction="none")
    return torch.segment_reduce(found, "sum", lengths=lengths + 1, unsafe=True)


def by_pass(models: Models, names: Names, batch: int = 256) -> Tensor:
    """The folded convolutional pass, on names sorted by their lengths."""
    order = sorted(range(len(names)), key=lambda i: len(names[i])) if len(names) > 1 else [0]
    scores = torch.empty(len(names))
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        tokens, lengths = models.vocab.encode([names[i] for i in part], context=models.context)
        targets = F.pad(tokens[:, models.context :], (0, 1))
        found = -F.cross_entropy(models.folded(tokens).flatten(0, 1), targets.flatten(), reduction="none")
        inside = torch.arange(targets.shape[1]) <= lengths[:, None]
        scores[part] = (found.view_as(targets) * inside).sum(1)
    return scores


def size_rows(methods: dict[str, Score], names: Names, session: Session) -> list[Row]:
    """For each size up to the names that there are, the microseconds per name of each method, all in turn."""
    rows, sizes = [], [size for size in SIZES if size <= len(names)]
    tick = session.ticks("sizes", len(sizes))
    for size, calls in zip(sizes, CALLS):
        used = {name: score for name, score in methods.items() if name != "loop" or size <= LOOP_UP_TO}

        def next_list(score: Score, following: Any, size: int = size) -> Any:
            return score(list(islice(following, size)))

        turns: dict[Any, Any] = {name: partial(next_list, score, cycle(names)) for name, score in used.items()}
        time_calls(turns, 1, session.device, block=1)  # to warm up
        times = time_calls(turns, session.pick(-(-calls // 10), calls), session.device, block=min(calls, 5))
        rows.append({"names": size} | {name: spread("us", [us / size for us in times[name]]) for name in used})
        tick()
    return rows
