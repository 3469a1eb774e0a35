"""How far do the lecture's networks, their rivals and our presets get, what do they take, and what do they draw?

Every rung is made from scratch on the lecture's split of the lecture's list, on one thread. A full run in which one of
the lecture's rungs is further than 0.015 nats from its published validation loss ends with exit code 1.

- The lecture's rungs are trained by `reference.train`: 200,000 minibatches of 32 windows. `kneser-ney-N` counts
  N-grams. The recurrent networks and transformers are those of `torch.nn`, with the optimizer, the schedule and the
  batches of our presets; `76k` and `230k` are their parameters. `ours-*` are presets of `wavenet-conv train`:
  `ours-plain` and `ours-gated-plain` learn from the list alone, as the rivals do; the others have teachers too.
- Seconds are what a rung takes until it can score: training with its validations, and the training of its teachers.
- Scoring starts at strings and ends at log-likelihoods, of the whole list. KenLM scores n-grams where it is installed,
  up to the order that it reads, and Python the longer ones. The trees score all windows with batch norm folded in, the
  networks batches of names, ours `Scorer`.
- Drawing ends at strings of at most 100 characters. Trees, recurrent networks and transformers compute a character of
  many names in a call. Python draws from n-grams, and keeps what it has computed for a context; `sample` draws from
  ours, and makes its tables in every call.

`--resume` continues a run from its JSON file. The published run takes two hours on one core. It was made in parts, with
other work on the other core, so its seconds and speeds are rough; score and choosing compare speeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

import reference
from benchmarks import harness, rivals
from benchmarks.choosing import loss_of
from benchmarks.counting import outputs
from benchmarks.drawing import facts_of
from benchmarks.harness import Benchmark, Results, Session, UsageError, positive, spread, time_calls
from benchmarks.machine import machine
from benchmarks.rungs import BATCH_SIZE, LR, RUNGS, Made, Names, Parts, make, recipe_of
from benchmarks.tables import Row, Table, text, words
from wavenet_conv.names import LECTURE_SHA256, lecture_names

STEPS, QUICK_STEPS = 200_000, 2_000
DRAWN, QUICK_DRAWN = 20_000, 200  # names per rung
CALLS = 5  # that are timed
TOLERANCE = 0.015  # nats
# What the rows that are kept must have, besides what says how they were made.
ROW = {"parameters", "seconds", "difference", "positions_per_second", "names_per_second", "drawn"}
ROW |= {"train_loss", "validation_loss", "test_loss"}
PARTS = 20  # that the weights of a mixture are multiples of 1 / PARTS
# The networks that are mixed with n-grams, by the name of the mixture, which is made after the first.
MIXTURES: dict[str, tuple[str, ...]] = {
    name: (name,) for name in RUNGS if name.startswith("ours-") or name.endswith("-230k")
}
MIXTURES["ours-gated + lstm-230k"] = ("ours-gated", "lstm-230k")
# What others say of this list, on splits of their own.
PUBLISHED = [
    {
        "model": "makemore's default transformer",
        "parameters": "about 200,000",
        "test_loss": 1.92,
        "split": "1,000 random names as test",
        "source": "README of github.com/karpathy/makemore",
    }
]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which rungs, how long, and whether to continue."""
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=list(RUNGS), metavar="RUNG")
    parser.add_argument("--steps", type=positive, help=f"of the lecture's rungs ({QUICK_STEPS}; --full: {STEPS})")
    parser.add_argument("--resume", action="store_true", help="keep the rungs that the file of --json already has")


def lecture_list() -> str:
    """The path of the lecture's list; raises `UsageError` where it is not on this machine."""
    path = lecture_names()
    if path is None:
        fix = "run `wavenet-conv lecture-names`, name it in WAVENET_CONV_LECTURE_NAMES, or give another list by --names"
        raise UsageError(f"the published losses are of the lecture's list, which is not here: {fix}")
    return str(path)


def run(session: Session) -> Iterator[Results]:
    """All results, each rung as it ends; it also goes to stderr."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a minibatch of 32 is too little work to share
    try:
        yield from sections(session)
    finally:
        torch.set_num_threads(threads)


def sections(session: Session) -> Iterator[Results]:
    """What is made from what, then all rungs so far, with their mixtures, after each rung."""
    args, names = session.args, session.names
    if len(names) < 10:
        raise UsageError(f"--names {args.names}: {len(names)} names leave nothing to validate on; give at least 10")
    steps = args.steps or session.pick(QUICK_STEPS, STEPS)
    parts = Parts(*reference.split_names(names, args.seed), session.vocab, steps, steps / STEPS, args.seed)
    first = run_facts(parts, session)
    rows, mixtures = kept(first, args) if args.resume else ({}, {})
    listed = lambda: {"rungs": in_order(rows, RUNGS), "mixtures": in_order(mixtures, MIXTURES)}
    networks: dict[str, Made] = {}  # that were made in this run
    yield first | {"references": reference_rows(parts, names)} | listed()
    few = len(parts.validation) < 2  # no half to choose weights on
    unmixed = {members[0]: name for name, members in MIXTURES.items() if name not in mixtures and not few}
    missing = [name for name in dict.fromkeys(args.rungs) if name not in rows or name in unmixed]
    for name in session.progress.track(missing, description="rungs"):
        if name not in rows:
            made = networks[name] = make(RUNGS[name], parts)
            rows[name] = row_of(name, made, parts, session)
        for mixture, members in MIXTURES.items() if not few else ():
            if members[0] == name and mixture not in mixtures:
                for one in members:  # those that an earlier run made are made again, to the same bits
                    if one not in networks:
                        session.progress.console.print(f"{one}: made again for the mixture {mixture}", soft_wrap=True)
                        networks[one] = make(RUNGS[one], parts)
                mixtures[mixture] = mixture_row(mixture, [networks[one] for one in members], parts)
        losses = ", ".join(f"{part} {rows[name][f'{part}_loss']:.4f}" for part in ("train", "validation", "test"))
        session.progress.console.print(f"{name}: {losses}, {rows[name]['seconds']:.0f} s", soft_wrap=True)
        yield listed()
    differences = [abs(row["difference"]) for row in rows.values() if row["difference"] is not None]
    equal, worst = all(difference <= TOLERANCE for difference in differences), max(differences, default=None)
    yield {"equality": {"equal": equal, "max_abs_diff": worst, "tolerance": TOLERANCE}}


def run_facts(parts: Parts, session: Session) -> Results:
    """What a run has to have in common with the one that it continues, and what is wrong with it as evidence."""
    path, caveat = Path(session.args.names), None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if parts.steps != STEPS:
        caveat = f"{parts.steps:,} steps per rung in place of {STEPS:,}: this shows that it runs and proves nothing."
    elif digest != LECTURE_SHA256:
        caveat = "Not the lecture's list: the published losses are of another, so these prove nothing about them."
    sizes: Row = {"of": len(session.names), "train": len(parts.train), "validation": len(parts.validation)}
    recipe = {"steps": parts.steps, "batch": BATCH_SIZE, "lr": LR, "seed": parts.seed}
    found: Row = {"device": machine(session.device), "torch": torch.__version__, "drawn": count_of(session)}
    return found | {"names": {"file": path.name, "sha256": digest, **sizes}, "recipe": recipe, "caveat": caveat}


def count_of(session: Session) -> int:
    """How many names each rung draws."""
    return session.pick(QUICK_DRAWN, DRAWN)


def kept(first: Results, args: argparse.Namespace) -> tuple[dict[str, Row], dict[str, Row]]:
    """The rungs and the mixtures in the file, by name; raises `UsageError` if they are not of such a run."""
    if args.json is None:
        raise UsageError("--resume: name the file to continue by --json FILE")
    file = Path(args.json)
    if not file.exists():
        return {}, {}
    try:
        found = json.loads(file.read_text())
        rows, mixtures = (
            {row["rung"]: row for row in found[key] if row["rung"] in known}
            for key, known in (("rungs", RUNGS), ("mixtures", MIXTURES))
        )
        before = {name: row["recipe"] for name, row in rows.items()}
        if any(not row.keys() >= ROW for row in rows.values()):
            raise LookupError("a row lacks what the tables show")
        there, here = settings(found), settings(first)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        fix = "name another file, or leave --resume out to replace it"
        raise UsageError(f"--resume: {file} has no results of this version of the ladder; {fix}") from error
    differing = [f"{key} {there.get(key)} (this run: {here.get(key)})" for key in here if there.get(key) != here[key]]
    differing += [f"another recipe of {name}" for name in before if before[name] != recipe_of(name, args.seed)]
    if differing:
        fix = "run it as it was, or leave --resume out to start again"
        raise UsageError(f"--resume: {file} is of a run with {', '.join(differing)}; {fix}")
    return rows, mixtures


def settings(results: Results) -> Row:
    """What must be the same, by name: names by their contents, not by their file."""
    names, alone = results["names"], ("device", "torch", "drawn")
    return {key: results[key] for key in alone} | results["recipe"] | {"names with SHA-256": names["sha256"]}


def in_order(rows: dict[str, Row], names: Iterable[str]) -> list[Row]:
    return [rows[name] for name in names if name in rows]


def reference_rows(parts: Parts, names: Names) -> list[Row]:
    """What names that no rung drew look like: those of the list, and those of its validation part."""
    whole, held_out = facts_of(names, (), ()), facts_of(parts.validation, parts.train, parts.test)
    whole |= dict.fromkeys(("in_training", "in_held_out"))
    return [{"rung": "the list", "drawn": whole}, {"rung": "its validation part", "drawn": held_out}]


def row_of(name: str, made: Made, parts: Parts, session: Session) -> Row:
    """Losses in nats per position, positions scored and names drawn per second, and what the drawn names show."""
    row: Row = {"rung": name, **made.facts}
    for part, names in (("train", parts.train), ("validation", parts.validation), ("test", parts.test)):
        row[f"{part}_loss"] = loss_of(made.score(names, made.score_sizes[0]), names)
    published, count = RUNGS[name].published, count_of(session)
    difference = None if published is None else row["validation_loss"] - published
    row |= {"published_validation_loss": published, "difference": difference}
    draw, held_out = partial(made.draw, count, parts.seed), {*parts.validation, *parts.test}
    row["drawn"] = facts_of(draw(made.draw_sizes[0]), parts.train, held_out)
    row |= speed("position", outputs(session.names), partial(made.score, session.names), made.score_sizes, session)
    return row | speed("name", count, draw, made.draw_sizes, session)


def speed(unit: str, amount: int, call: Callable[[int], Any], sizes: Sequence[int], session: Session) -> Row:
    """How much is done per second at the best of these batch sizes; each is tried once, and the first has warmed up."""
    timed = partial(time_calls, device=session.device, block=1)
    tried = timed({size: partial(call, size) for size in sizes}, 1)
    best = min(sizes, key=lambda size: tried[size])
    rates = [amount / us * 1e6 for us in timed({best: partial(call, best)}, CALLS)[best]]
    return {f"{unit}_batch": best if len(sizes) > 1 else None} | spread(f"{unit}s_per_second", rates)


def mixture_row(name: str, networks: Sequence[Made], parts: Parts) -> Row:
    """The weighted mean of the probabilities of networks and n-grams.

    Weights are chosen on the first half of the validation part; the other half shows what that is worth.
    """
    probs = {}
    for part, names in (("validation", parts.validation), ("test", parts.test)):
        members = [made.log_probs(names) for made in networks if made.log_probs]
        counted = [value for one in names for value in parts.ngrams.log_probs(one)]
        probs[part] = torch.stack([*members, torch.tensor(counted, dtype=torch.float64)]).exp()
    cut = outputs(parts.validation[: len(parts.validation) // 2])
    first, other = probs["validation"][:, :cut], probs["validation"][:, cut:]

    def loss(weights: Sequence[float], probs: torch.Tensor) -> float:
        return -float((torch.tensor(weights, dtype=torch.float64) @ probs).log().mean())

    weights = min(weightings(len(first)), key=lambda weights: loss(weights, first))
    row: Row = {"rung": name, "weights": weights, "other_half": loss(weights, other)}
    row |= {f"{which}alone": -float(other[index].log().mean()) for which, index in (("", 0), ("ngrams_", -1))}
    return row | {f"{part}_loss": loss(weights, both) for part, both in probs.items()}


def weightings(members: int) -> Iterator[list[float]]:
    """All weights of so many members that are multiples of 1 / PARTS and sum to 1."""
    for counts in product(range(PARTS + 1), repeat=members - 1):
        if sum(counts) <= PARTS:
            yield [count / PARTS for count in (*counts, PARTS - sum(counts))]


def tables(results: Results) -> Iterator[Table]:
    """What is printed."""
    rungs = results["rungs"]
    yield Table(
        f"Losses in nats per character; the lecture's rungs: {words(results['recipe'])}, then a tenth of the rate",
        "rung; parameters or n-grams=parameters ,; context; steps=steps ,; train=train_loss .3f; "
        "validation=validation_loss .3f; test=test_loss .3f; published validation=published_validation_loss .3f; "
        "difference=difference +.3f",
        rungs,
    )
    yield Table(
        "Seconds until a rung can score, and its speed, on one thread",
        "rung; seconds=seconds ,.1f; scored by=scored_by; batch=position_batch ,; positions/s=positions_per_second "
        ",.0f; quartiles=~positions_per_second ,.0f; drawn together=name_batch ,; names/s=names_per_second ,.0f; "
        "quartiles=~names_per_second ,.0f",
        rungs,
    )
    if drawn := results.get("drawn"):
        yield Table(
            f"{text(drawn, ',')} names that each rung draws",
            "rung; in the training part=drawn.in_training .1%; of the others, in validation and test="
            "drawn.in_held_out .1%; distinct=drawn.distinct .1%; mean length=drawn.mean_length .2f",
            [*results["references"], *rungs],
            "The list has some names more than once. Of its validation part, the others are looked up in test alone.",
        )
    if mixtures := results.get("mixtures"):
        yield Table(
            f"Mixed with kneser-ney-{rivals.ORDER}: the weighted mean of the probabilities",
            "rung; weights, of kneser-ney last=weights .2f; alone, second half of validation=alone .4f; "
            "kneser-ney there=ngrams_alone .4f; mixed there=other_half .4f; mixed, validation=validation_loss .4f; "
            "mixed, test=test_loss .4f",
            mixtures,
            "Weights are the best multiples of 0.05 on the first half of the validation part. "
            "Alone: the first network without the others.",
        )
    columns = "model; parameters; test=test_loss .2f; split; source"
    yield Table("Published elsewhere, on another split", columns, PUBLISHED, "Its test names are others than ours.")


main = partial(
    harness.main, Benchmark("ladder", __doc__, run, tables, add_options, devices=("cpu",), default_names=lecture_list)
)

if __name__ == "__main__":
    sys.exit(main())
