"""Does the lecture's recipe give the losses that the lecture publishes, rung by rung?

Every rung is trained from scratch by `reference.train`, 200,000 minibatches of 32 windows, on the lecture's split of
the lecture's list; its validation loss stands beside the published one. A full run in which a rung is further than
0.015 nats from its published validation loss ends with exit code 1. Our slid models stand below as rungs of their own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

import reference
from benchmarks import harness
from benchmarks.harness import UsageError
from benchmarks.slide import positive, table_of
from wavenet_conv import ConvWaveNet, Vocabulary, WaveNetConfig, WaveNetConvError, training
from wavenet_conv.names import LECTURE_SHA256, lecture_names, read_names

STEPS, QUICK_STEPS = 200_000, 2_000
BATCH, LR, SEED = 32, 0.1, 42
TOLERANCE = 0.015  # nats


class Rung(NamedTuple):
    """One line of the lecture's log.

    network: of `reference.NETWORKS`; None counts bigrams. train, validation: the published losses in nats a character;
    None where nothing is published. drop_at: the step, of 200,000, at which the rate becomes a tenth. unscaled: every
    weight and bias starts as a standard normal, as in part 2, not as `reference.build` starts them.
    """

    name: str
    network: str | None
    train: float | None
    validation: float | None
    drop_at: int = 150_000
    per_position: bool = False
    unscaled: bool = False


# Parts 1, 2 and 3 of the lectures, then part 5's log; parts 2 and 3 drop the rate at half time.
LECTURE = (
    Rung("bigram", None, 2.454, 2.454),  # part 1, of the whole list
    # The wild start leaves its mark to the end: seeds 42, 1 and 2147483647 give 2.158, 2.180 and 2.162.
    Rung("mlp-10-200-unscaled", "mlp-10-200", 2.125, 2.168, drop_at=100_000, unscaled=True),
    Rung("mlp-10-200", "mlp-10-200", 2.038, 2.107, drop_at=100_000),
    Rung("mlp-bn", "mlp-bn", 2.058, 2.105),
    Rung("flat", "flat", 1.918, 2.027),
    Rung("tree-68-bug", "tree-68", 1.941, 2.029, per_position=True),
    Rung("tree-68", "tree-68", 1.912, 2.022),
    Rung("wide", "wide", 1.769, 1.993),
)
OURS = ("fast", "wide", "gated")  # of `training.PRESETS`: slid models with recipes of their own
RUNGS = LECTURE + tuple(Rung(f"ours-{name}", None, None, None) for name in OURS)


class Job(NamedTuple):
    """What one process needs to train one rung; the parts are names."""

    rung: Rung
    train: list[str]
    validation: list[str]
    characters: str
    steps: int


class Outcome(NamedTuple):
    """Losses in nats a character, in evaluation mode, of the whole part."""

    parameters: int
    context: int
    steps: int
    train: float
    validation: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the ladder; returns the exit code: 1 where a full run misses a published loss, 2 for wrong usage."""
    args = parse(arguments)
    try:
        args.names = args.names or lecture_list()
        names = read_names(args.names)
        jobs = jobs_of(args, names)
        harness.check_writable(args.json)
        kept = kept_rows(args, settings(args, names, jobs))
    except WaveNetConvError as error:
        print(f"benchmarks.ladder: {error}", file=sys.stderr)
        return 2
    try:
        with harness.progress_bar() as progress:
            results = run(args, names, jobs, kept, progress)
    except WaveNetConvError as error:
        print(f"benchmarks.ladder: {error}", file=sys.stderr)
        return 1
    except BrokenProcessPool:
        print("benchmarks.ladder: a worker was killed; try again with fewer --workers", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    code = harness.report(results, args.json, print_tables)
    return 0 if results["caveat"] else code


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; argparse leaves with exit code 2 for what it cannot read."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ladder", description=__doc__.splitlines()[0])
    cores = os.cpu_count() or 1
    parser.add_argument("--names", metavar="FILE", help="one name a line (the lecture's list)")
    parser.add_argument(
        "--rungs", metavar="RUNG,...", type=rungs, default=RUNGS, help=f"all, or of {', '.join(r.name for r in RUNGS)}"
    )
    parser.add_argument("--steps", metavar="N", type=positive, help=f"a rung ({STEPS}; with --quick {QUICK_STEPS})")
    parser.add_argument("--workers", metavar="N", type=positive, default=cores, help=f"rungs at once ({cores})")
    parser.add_argument("--json", metavar="FILE|-", help="write the results as JSON; - prints it instead of the table")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rungs that --json's file has, and run the others"
    )
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it runs: under a minute")
    args = parser.parse_args(arguments)
    args.steps = args.steps or (QUICK_STEPS if args.quick else STEPS)
    return args


def rungs(text: str) -> tuple[Rung, ...]:
    """Rungs by their names, such as mlp-bn,wide, in the ladder's order."""
    wanted, known = text.split(","), [rung.name for rung in RUNGS]
    for name in wanted:
        if name not in known:
            raise argparse.ArgumentTypeError(f"no rung is called {name!r}; there are {', '.join(known)}")
    return tuple(rung for rung in RUNGS if rung.name in wanted)


def lecture_list() -> str:
    """The path of the lecture's list; raises `UsageError` where it is not on this machine."""
    path = lecture_names()
    if path is None:
        raise UsageError(
            "the published losses are of the lecture's list, which is not here: run `wavenet-conv lecture-names`, "
            "name it in WAVENET_CONV_LECTURE_NAMES, or give another list with --names"
        )
    return str(path)


def jobs_of(args: argparse.Namespace, names: list[str]) -> list[Job]:
    """One job a rung; raises `UsageError` for a list too short to split."""
    train, validation, _ = reference.split_names(names, SEED)
    if not train or not validation:
        raise UsageError(f"--names {args.names}: {len(names)} names leave nothing to validate on; give at least 10")
    characters = Vocabulary.from_names(names).characters
    return [Job(rung, train, validation, characters, args.steps) for rung in args.rungs]


def run(
    args: argparse.Namespace, names: list[str], jobs: list[Job], kept: dict[str, dict[str, Any]], progress: Progress
) -> dict[str, Any]:
    """All results, as they stand in the JSON; each rung goes to stderr, and to the JSON's file, as it ends."""
    rows = dict(kept)
    for row in rows_as_they_end([job for job in jobs if job.rung.name not in rows], args.workers, progress):
        rows[row["rung"]] = row
        progress.console.print(summary(row), soft_wrap=True)
        if args.json not in (None, "-"):
            harness.write_json(results_of(args, names, jobs, rows), args.json)
    return results_of(args, names, jobs, rows)


def results_of(
    args: argparse.Namespace, names: list[str], jobs: list[Job], rows: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The JSON with the rungs that have ended, in the ladder's order."""
    differences = [abs(row["difference"]) for row in rows.values() if row["difference"] is not None]
    return {
        "device": harness.machine(torch.device("cpu")).rpartition(", ")[0],
        **settings(args, names, jobs),
        "workers": min(args.workers, len(jobs)),
        "caveat": caveat(args),
        "equality": {
            "equal": all(difference <= TOLERANCE for difference in differences),
            "max_abs_diff": max(differences, default=None),
            "tolerance": TOLERANCE,
        },
        "rungs": [rows[rung.name] for rung in RUNGS if rung.name in rows],
    }


def settings(args: argparse.Namespace, names: list[str], jobs: list[Job]) -> dict[str, Any]:
    """What rungs of two runs must have in common to stand in one table."""
    return {
        "torch": torch.__version__,
        "dtype": "float32",
        "names": {
            "file": Path(args.names).name,
            "sha256": hashlib.sha256(Path(args.names).read_bytes()).hexdigest(),
            "of": len(names),
            "train": len(jobs[0].train),
            "validation": len(jobs[0].validation),
        },
        "recipe": {"steps": args.steps, "batch": BATCH, "lr": LR, "seed": SEED},
    }


def kept_rows(args: argparse.Namespace, now: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rungs that `--resume` finds in the JSON's file; raises `UsageError` where they are of another run."""
    if not args.resume or args.json in (None, "-") or not Path(args.json).exists():
        return {}
    try:
        found = json.loads(Path(args.json).read_text())
        rows, then = {row["rung"]: row for row in found["rungs"]}, {name: found[name] for name in now}
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--resume: {args.json} is no ladder's JSON ({error}); give another file") from error
    if then != now:
        raise UsageError(f"--resume: {args.json} is of a run with other settings; give another file")
    return rows


def caveat(args: argparse.Namespace) -> str | None:
    """Why the published losses say nothing about this run, where they do not."""
    if args.steps != STEPS:
        return f"{args.steps:,} steps a rung in place of {STEPS:,}: this shows that it runs and proves nothing."
    if hashlib.sha256(Path(args.names).read_bytes()).hexdigest() != LECTURE_SHA256:
        return "Not the lecture's list: the published losses are of another, so these prove nothing about them."
    return None


def summary(row: dict[str, Any]) -> str:
    """A rung in one line, for whoever is waiting."""
    published = row["published_validation_loss"]
    beside = "" if published is None else f" (published {published:.3f})"
    return (
        f"{row['rung']}: train {row['train_loss']:.4f}, validation {row['validation_loss']:.4f}{beside}, "
        f"{row['seconds']:.0f} s"
    )


def rows_as_they_end(jobs: list[Job], workers: int, progress: Progress) -> Iterator[dict[str, Any]]:
    """A row a rung as it ends: one after another in this process, or several at once in processes of their own."""
    tasks = [progress.add_task(job.rung.name, total=job.steps) for job in jobs]
    if workers == 1 or len(jobs) <= 1:
        for job, task in zip(jobs, tasks):
            yield row_of(job, lambda done, task=task: progress.update(task, completed=done))
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process in which PyTorch has run may hang
    steps_done = context.Array("q", len(jobs), lock=False)
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, share_steps, (steps_done,))
    try:
        # The slow rungs stand last: started first, they do not run on alone at the end.
        waiting = {pool.submit(row_in_worker, index, jobs[index]) for index in reversed(range(len(jobs)))}
        while waiting:
            ended, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            for task, done in zip(tasks, steps_done):
                progress.update(task, completed=done)
            yield from (future.result() for future in ended)
    finally:
        pool.shutdown(cancel_futures=True)


def share_steps(steps_done: Any) -> None:
    """Gives a worker the array in which it counts the steps of each job."""
    global STEPS_DONE
    STEPS_DONE = steps_done


def row_in_worker(index: int, job: Job) -> dict[str, Any]:
    """`row_of` in a worker."""

    def tick(done: int) -> None:
        STEPS_DONE[index] = done

    return row_of(job, tick)


def row_of(job: Job, tick: Callable[[int], None]) -> dict[str, Any]:
    """Trains and evaluates one rung on one thread: its row in the JSON. `tick` gets the steps done."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a minibatch of 32 is too little work to share
    start = time.perf_counter()
    try:
        if job.rung.name.startswith("ours-"):
            outcome = train_ours(job, tick)
        else:
            outcome = count_bigrams(job) if job.rung.network is None else train_tree(job, tick)
    finally:
        torch.set_num_threads(threads)
    tick(job.steps)
    published = job.rung.validation
    return {
        "rung": job.rung.name,
        "parameters": outcome.parameters,
        "context": outcome.context,
        "steps": outcome.steps,
        "train_loss": outcome.train,
        "published_train_loss": job.rung.train,
        "validation_loss": outcome.validation,
        "published_validation_loss": published,
        "difference": None if published is None else outcome.validation - published,
        "seconds": time.perf_counter() - start,
    }


def count_bigrams(job: Job) -> Outcome:
    """The floor: how often each token follows each other in the training part, every count raised by one."""
    vocab_size = len(job.characters) + 1
    parts = [reference.examples(names, job.characters, 1) for names in (job.train, job.validation)]
    X, Y = parts[0]
    counts = torch.bincount(X[:, 0] * vocab_size + Y, minlength=vocab_size**2).view(vocab_size, vocab_size) + 1
    log_probs = (counts.double() / counts.sum(1, keepdim=True)).log()
    train, validation = (float(-log_probs[X[:, 0], Y].mean()) for X, Y in parts)
    return Outcome(counts.numel(), 1, 0, train, validation)


def train_tree(job: Job, tick: Callable[[int], None]) -> Outcome:
    """One of the lecture's networks by the lecture's recipe; weights and minibatches come from one generator."""
    rung, generator = job.rung, torch.Generator().manual_seed(SEED)
    sizes, _ = reference.NETWORKS[rung.network]
    tree = reference.build(
        **sizes, vocab_size=len(job.characters) + 1, per_position=rung.per_position, generator=generator
    )
    if rung.unscaled:
        with torch.no_grad():
            for parameter in tree.parameters():
                parameter.normal_(generator=generator)
    context = reference.context_of(tree)
    X, Y = reference.examples(job.train, job.characters, context)

    def on_step(done: int, loss: Tensor) -> None:
        if done % 100 == 0:
            tick(done)

    drop_at = rung.drop_at * job.steps // STEPS
    reference.train(
        tree, X, Y, steps=job.steps, batch=BATCH, lr=LR, drop_at=drop_at, generator=generator, on_step=on_step
    )
    validation = reference.evaluate(tree, *reference.examples(job.validation, job.characters, context))
    parameters = sum(parameter.numel() for parameter in tree.parameters())
    return Outcome(parameters, context, job.steps, reference.evaluate(tree, X, Y), validation)


def train_ours(job: Job, tick: Callable[[int], None]) -> Outcome:
    """One of our presets of the slid model, by its own recipe on the same parts: the weights that validated best.

    Where the ladder is shortened, its steps are so in proportion.
    """
    preset = job.rung.name.removeprefix("ours-")
    trainer = trained(job, preset, training.PRESETS[preset][1].seed, tick)
    model = best_of(trainer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    train = training.evaluate(model, trainer.train)
    return Outcome(parameters, model.context, trainer.step, train, trainer.best_loss)


def trained(job: Job, preset: str, seed: int, tick: Callable[[int], None]) -> training.Trainer:
    """A preset's training at its end, its teachers' before it, as `wavenet-conv train` has them."""
    sizes, recipe = training.PRESETS[preset]
    recipe = replace(recipe, steps=max(1, recipe.steps * job.steps // STEPS), seed=seed)
    teachers = [taught_by(job, name, seed + 1 + at, tick) for at, name in enumerate(training.TEACHERS.get(preset, ()))]
    vocab = Vocabulary(job.characters)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ConvWaveNet(WaveNetConfig(vocab_size=len(vocab), **sizes))
    trainer = training.Trainer(model, vocab, job.train, job.validation, recipe, teachers)
    while not trainer.finished:
        trainer.advance()
        if trainer.step % recipe.every == 0 or trainer.step == recipe.steps:
            trainer.validate()
        tick(trainer.step * job.steps // recipe.steps)
    return trainer


TAUGHT_BY: dict[tuple, ConvWaveNet] = {}  # this process's teachers, which several presets share


def taught_by(job: Job, preset: str, seed: int, tick: Callable[[int], None]) -> ConvWaveNet:
    """A teacher; one that has been trained before is not trained again."""
    key = (preset, seed, job.steps, *job.train)
    if key not in TAUGHT_BY:
        TAUGHT_BY[key] = best_of(trained(job, preset, seed, tick))
    return TAUGHT_BY[key]


def best_of(trainer: training.Trainer) -> ConvWaveNet:
    """The model with the lowest validation loss."""
    trainer.kept.load_state_dict(trainer.best_weights)
    return trainer.kept.eval()


def print_tables(results: dict[str, Any]) -> None:
    """The results on stdout, as a table that is Markdown too."""
    console = Console(width=200, highlight=False, soft_wrap=True)  # a table that wraps is no Markdown
    names, recipe, equality = results["names"], results["recipe"], results["equality"]
    table = table_of(
        *("rung", "parameters", "context", "steps", "train", "validation", "published validation", "difference"),
        "seconds",
    )
    for row in results["rungs"]:
        table.add_row(
            row["rung"],
            f"{row['parameters']:,}",
            str(row["context"]),
            f"{row['steps']:,}",
            loss_cell(row["train_loss"]),
            loss_cell(row["validation_loss"]),
            loss_cell(row["published_validation_loss"]),
            "" if row["difference"] is None else f"{row['difference']:+.3f}",
            f"{row['seconds']:,.0f}",
        )
    if equality["max_abs_diff"] is None:
        verdict = "Nothing is published for these rungs."
    else:
        verdict = (
            f"{'Every rung is' if equality['equal'] else 'NOT every rung is'} within {equality['tolerance']} nats of "
            f"its published validation loss; the furthest is {equality['max_abs_diff']:.3f} away."
        )
    console.print(
        f"{results['device']}, PyTorch {results['torch']}, {results['dtype']}; rungs at once: {results['workers']}, "
        f"one thread each. The lecture's recipe: minibatches of {recipe['batch']} windows, learning rate "
        f"{recipe['lr']}, then a tenth of it.",
        f"{names['train']:,} names to train on, {names['validation']:,} to validate on, of {names['of']:,}. Losses in "
        f"nats a character.",
        "",
        table,
        results["caveat"] or verdict,
        sep="\n",
    )


def loss_cell(loss: float | None) -> str:
    """A loss to three digits, as the lecture publishes it."""
    return "" if loss is None else f"{loss:.3f}"


if __name__ == "__main__":
    sys.exit(main())
