"""Does the lecture's recipe give the losses that the lecture publishes, rung by rung?

Every rung is trained from scratch by `reference.train`, 200,000 minibatches of 32 windows, on the lecture's split of
the lecture's list; its validation loss stands beside the published one. A full run in which a rung is further than
0.015 nats from its published validation loss ends with exit code 1. Our presets stand below as rungs of their own.

- The seconds are of a machine with other work beside, and compare nothing. Those of `ours-wide` and `ours-gated` count
  the training of their three teachers.

The published run takes more than an hour on one core.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import reference
from benchmarks import harness
from benchmarks.harness import Benchmark, Results, Session, UsageError, positive
from benchmarks.methods import parameters
from benchmarks.tables import Row, Table, words
from wavenet_conv import Vocabulary, training
from wavenet_conv.names import LECTURE_SHA256, lecture_names

STEPS, QUICK_STEPS = 200_000, 2_000
BATCH_SIZE, LR = 32, 0.1
TOLERANCE = 0.015  # nats


class Rung(NamedTuple):
    """One line of the lecture's log."""

    name: str
    network: str | None = None  # of `reference.NETWORKS`; None counts bigrams
    published: float | None = None  # validation loss
    drop_at: int = 150_000  # the step, of 200,000, at which the rate becomes a tenth
    per_position: bool = False
    unscaled: bool = False  # parameters start as standard normals, as in part 2


# Parts 1, 2 and 3 of the lectures, then part 5's log; parts 2 and 3 drop the rate at half time.
LECTURE = (
    Rung("bigram", None, 2.454),  # part 1, of the whole list
    # The wild start leaves its mark to the end: seeds 42, 1 and 2147483647 give 2.158, 2.180 and 2.162.
    Rung("mlp-10-200-unscaled", "mlp-10-200", 2.168, drop_at=100_000, unscaled=True),
    Rung("mlp-10-200", "mlp-10-200", 2.107, drop_at=100_000),
    Rung("mlp-bn", "mlp-bn", 2.105),
    Rung("flat", "flat", 2.027),
    Rung("tree-68-bug", "tree-68", 2.029, per_position=True),
    Rung("tree-68", "tree-68", 2.022),
    Rung("wide", "wide", 1.993),
)
OURS = ("fast", "wide", "gated")  # of `training.PRESETS`: models with recipes of their own
RUNGS = {rung.name: rung for rung in (*LECTURE, *(Rung(f"ours-{name}") for name in OURS))}


class Parts(NamedTuple):
    """What rungs are trained and validated on, and how long."""

    train: list[str]
    validation: list[str]
    vocab: Vocabulary
    steps: int
    seed: int
    teachers: dict  # by preset and seed: several presets share them


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which rungs, and how long."""
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=list(RUNGS), metavar="RUNG")
    parser.add_argument("--steps", type=positive, help=f"per rung ({QUICK_STEPS}; --full: {STEPS})")


def lecture_list() -> str:
    """The path of the lecture's list; raises `UsageError` where it is not on this machine."""
    path = lecture_names()
    if path is None:
        fix = "run `wavenet-conv lecture-names`, name it in WAVENET_CONV_LECTURE_NAMES, or give another list by --names"
        raise UsageError(f"the published losses are of the lecture's list, which is not here: {fix}")
    return str(path)


@torch.enable_grad()
def run(session: Session) -> Iterator[Results]:
    """All results; each rung also goes to stderr as it ends."""
    args, rows, names = session.args, [], session.names
    if len(names) < 10:
        raise UsageError(f"--names {args.names}: {len(names)} names leave nothing to validate on; give at least 10")
    train, validation, _ = reference.split_names(names, args.seed)
    parts = Parts(train, validation, session.vocab, args.steps or session.pick(QUICK_STEPS, STEPS), args.seed, {})
    digest, caveat = hashlib.sha256(Path(args.names).read_bytes()).hexdigest(), None
    if parts.steps != STEPS:
        caveat = f"{parts.steps:,} steps per rung in place of {STEPS:,}: this shows that it runs and proves nothing."
    elif digest != LECTURE_SHA256:
        caveat = "Not the lecture's list: the published losses are of another, so these prove nothing about them."
    sizes = {"of": len(names), "train": len(train), "validation": len(validation)}
    recipe = {"steps": parts.steps, "batch": BATCH_SIZE, "lr": LR, "seed": args.seed}
    yield {"names": {"file": Path(args.names).name, "sha256": digest, **sizes}, "recipe": recipe, "caveat": caveat}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a minibatch of 32 is too little work to share
    for name in session.progress.track(args.rungs, description="rungs"):
        row = row_of(RUNGS[name], parts)
        losses = f"train {row['train_loss']:.4f}, validation {row['validation_loss']:.4f}"
        session.progress.console.print(f"{name}: {losses}, {row['seconds']:.0f} s", soft_wrap=True)
        rows.append(row)
        yield {"rungs": rows}
    torch.set_num_threads(threads)
    differences = [abs(row["difference"]) for row in rows if row["difference"] is not None]
    equal, worst = all(difference <= TOLERANCE for difference in differences), max(differences, default=None)
    yield {"equality": {"equal": equal, "max_abs_diff": worst, "tolerance": TOLERANCE}}


def row_of(rung: Rung, parts: Parts) -> Row:
    """Trains and evaluates a rung; losses in nats per character, in evaluation mode, of all names."""
    begin = time.perf_counter()
    by = train_ours if rung.name.startswith("ours-") else train_tree if rung.network else count_bigrams
    row: Row = dict(zip(("parameters", "context", "steps", "train_loss", "validation_loss"), by(rung, parts)))
    difference = None if rung.published is None else row["validation_loss"] - rung.published
    row |= {"published_validation_loss": rung.published, "difference": difference}
    return {"rung": rung.name, **row, "seconds": time.perf_counter() - begin}


Outcome = tuple[int, int, int, float, float]  # parameters, context, steps, losses


def count_bigrams(rung: Rung, parts: Parts) -> Outcome:
    """The floor: how often each token follows each other in the training part, every count raised by one."""
    vocab_size, characters = len(parts.vocab), parts.vocab.characters
    (X, Y), held_out = (reference.examples(names, characters, 1) for names in (parts.train, parts.validation))
    counts = torch.bincount(X[:, 0] * vocab_size + Y, minlength=vocab_size**2).view(vocab_size, vocab_size) + 1
    log_probs = (counts.double() / counts.sum(1, keepdim=True)).log()
    train, validation = (float(-log_probs[X[:, 0], Y].mean()) for X, Y in ((X, Y), held_out))
    return counts.numel(), 1, 0, train, validation


def train_tree(rung: Rung, parts: Parts) -> Outcome:
    """One of the lecture's networks by the lecture's recipe; weights and minibatches come from one generator."""
    generator = torch.Generator().manual_seed(parts.seed)
    sizes: dict[str, Any] = {**reference.NETWORKS[rung.network or ""][0], "vocab_size": len(parts.vocab)}
    tree = reference.build(**sizes, per_position=rung.per_position, generator=generator)
    for parameter in tree.parameters() if rung.unscaled else ():
        parameter.data.normal_(generator=generator)
    context, drop_at = reference.context_of(tree), rung.drop_at * parts.steps // STEPS
    X, Y = reference.examples(parts.train, parts.vocab.characters, context)
    options: dict[str, Any] = {"batch_size": BATCH_SIZE, "lr": LR, "drop_at": drop_at, "generator": generator}
    reference.train(tree, X, Y, steps=parts.steps, **options)
    held_out = reference.examples(parts.validation, parts.vocab.characters, context)
    losses = reference.evaluate(tree, X, Y), reference.evaluate(tree, *held_out)
    return parameters(tree), context, parts.steps, *losses


def train_ours(rung: Rung, parts: Parts) -> Outcome:
    """One of our presets by its own recipe on the same parts, shortened as the ladder is: the best weights."""
    preset, share, lists = rung.name.removeprefix("ours-"), parts.steps / STEPS, (parts.train, parts.validation)
    trainer = training.fit_preset(preset, parts.vocab, *lists, seed=parts.seed, steps=share, trained=parts.teachers)
    train = training.evaluate(trainer.model, trainer.train_corpus)
    return parameters(trainer.model), trainer.model.context, trainer.step, train, trainer.best_loss


def tables(results: Results) -> Iterator[Table]:
    """What is printed."""
    yield Table(
        f"Losses in nats per character; {words(results['recipe'])}, then a tenth of the rate",
        "rung; parameters=parameters ,; context; steps=steps ,; train=train_loss .3f; validation=validation_loss .3f; "
        "published validation=published_validation_loss .3f; difference=difference +.3f; seconds=seconds ,.0f",
        results["rungs"],
        results["caveat"] or "",
    )


main = partial(
    harness.main, Benchmark("ladder", __doc__, run, tables, add_options, devices=("cpu",), default_names=lecture_list)
)

if __name__ == "__main__":
    sys.exit(main())
