"""Lists of any size, from strings to log-likelihoods: the loop, windows, the convolutional pass, KenLM and `Scorer`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
LOOP_UP_TO = {"cpu": 1024, "cuda": 64}  # names; after it, as long for each
WINDOWS = {"cpu": 1024, "cuda": 65536}  # of one batch
NAMES = {"cpu": 256, "cuda": 8192}

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


def by_windows(models: Models, names: Names, batch: int | None = None) -> Tensor:
    """The tree with batch norm folded in, on all windows: `(names,)` on the CPU."""
    tokens, lengths = (part.to(models.device) for part in models.vocab.encode(names, context=models.context))
    inside = torch.arange(tokens.shape[1] - models.context + 1, device=models.device) <= lengths[:, None]
    windows = reference.windows(tokens, models.context)[inside]
    logits = torch.cat([models.folded_tree(part) for part in windows.split(batch or WINDOWS[models.device.type])])
    found = -F.cross_entropy(logits, F.pad(tokens[:, models.context :], (0, 1))[inside], reduction="none")
    return torch.segment_reduce(found, "sum", lengths=lengths + 1, unsafe=True).cpu()


def by_pass(models: Models, names: Names) -> Tensor:
    """The folded convolutional pass, on names sorted by their lengths: `(names,)` on the CPU."""
    order = sorted(range(len(names)), key=lambda i: len(names[i])) if len(names) > 1 else [0]
    batch, parts = NAMES[models.device.type], []
    for start in range(0, len(order), batch):
        part = [names[i] for i in order[start : start + batch]]
        tokens, lengths = (part.to(models.device) for part in models.vocab.encode(part, context=models.context))
        targets = F.pad(tokens[:, models.context :], (0, 1))
        found = -F.cross_entropy(models.folded(tokens).flatten(0, 1), targets.flatten(), reduction="none")
        inside = torch.arange(targets.shape[1], device=models.device) <= lengths[:, None]
        parts.append((found.view_as(targets) * inside).sum(1))
    scores = torch.empty(len(names))
    scores[torch.tensor(order)] = torch.cat(parts).cpu()
    return scores


def size_rows(methods: dict[str, Score], names: Names, session: Session) -> Iterator[list[Row]]:
    """For each size up to the names that there are, the microseconds per name of each method, all in turn.

    By the host's clock, until the scores are on the host. Yields all rows after each size.
    """
    rows, sizes, device = list[Row](), [size for size in SIZES if size <= len(names)], session.device
    tick = session.ticks("sizes", len(sizes))
    for size, calls in zip(sizes, CALLS):
        used = {name: score for name, score in methods.items() if name != "loop" or size <= LOOP_UP_TO[device.type]}

        def next_list(score: Score, following: Any, size: int = size) -> Any:
            return score(list(islice(following, size)))

        turns: dict[Any, Any] = {name: partial(next_list, score, cycle(names)) for name, score in used.items()}
        time_calls(turns, 1, device, block=1)  # to warm up
        times = time_calls(turns, session.pick(-(-calls // 10), calls), device, block=min(calls, 5), by_host=True)
        rows.append({"names": size} | {name: spread("us", [us / size for us in times[name]]) for name in used})
        tick()
        yield rows
