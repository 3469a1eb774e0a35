"""How long until a model is as good as the lecture's: by its own recipe, and by training on shared nodes?

Same architecture (the lecture's last network), same list, same split, same machine, same run. Equality comes first:
where one training step differs from the tree's on all windows of the same names, in float64, the run ends with exit
code 1 and no timings. Seconds leave out every evaluation of the validation loss; ours count finding the node ids.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

import reference
import reference.training as lecture
from benchmarks import harness
from benchmarks.harness import Benchmark, Call, Results, Session, positive, spread, time_calls
from benchmarks.tables import Row, Table
from wavenet_conv import from_tree
from wavenet_conv.training import PRESETS, Corpus, Trainer, split_names, total_loss
from wavenet_conv.training import run as run_trainer

TARGET = 1.993  # nats: the validation loss that the lecture ends with
TOLERANCE = 1e-10  # of a float64 loss, gradient and statistic
LECTURE_STEPS, LECTURE_EVERY, OUR_EVERY = 200_000, 2_000, 25  # steps in all; between validations
BATCHES = (256, 1024)  # names per step, for the throughput


class Reached(Exception):
    """The validation loss is at the target."""


class TimedTrainer(Trainer):
    """A trainer that knows how many seconds its validations took."""

    waited = 0.0

    def validate(self) -> float:
        """Validates, off the clock."""
        begin = now(self.model.embedding.weight.device)
        loss = super().validate()
        self.waited += perf_counter() - begin
        return loss


def add_options(parser: argparse.ArgumentParser) -> None:
    """How many trainings, and until when."""
    parser.add_argument("--trainings", type=positive, help="of each kind, seeds 0, 1, ... (1; --full: 3)")
    parser.add_argument("--target", type=loss, help=f"validation loss to reach, in nats (2.4; --full: {TARGET})")


def loss(text: str) -> float:
    """A loss in nats."""
    if not 0 < float(text) < 100:
        raise argparse.ArgumentTypeError(f"{text} is not a loss in nats")
    return float(text)


def run(session: Session) -> Results:
    """All results; where a training step differs, nothing after the equality."""
    args, (train, valid, _) = session.args, split_names(session.names)
    args.target = args.target or session.pick(2.4, TARGET)
    results: Results = {
        "target": args.target,
        "parameters": sum(p.numel() for p in new_tree(0, session).parameters()),
        "names": {"train": len(train), "validation": len(valid), "windows": sum(len(name) + 1 for name in train)},
        "recipe": asdict(PRESETS["fast"][1]),
        "equality": equality(train[:256], session),
    }
    if not results["equality"]["equal"]:
        return results
    results["throughput"] = [row for size in BATCHES for row in throughput_rows(train[:size], session)]
    results["threads"] = {
        "lecture": 1,
        "ours": torch.get_num_threads(),
    }  # a minibatch of 32 windows is too small for two
    results["trainings"] = training_rows(train, valid, results["threads"], session)
    lecture_s, ours_s = (statistics.median(row[kind]["seconds"] for row in results["trainings"]) for kind in KINDS)
    reached = all(row["ours"]["reached"] for row in results["trainings"])
    results["times_faster"] = lecture_s / ours_s if reached else None
    return results


def new_tree(seed: int, session: Session, dtype: torch.dtype = torch.float32) -> reference.Sequential:
    """The lecture's last network, its weights drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    tree = reference.build(vocab_size=len(session.vocab), generator=generator)
    return tree.to(device=session.device, dtype=dtype)


def windows_of(names: Sequence[str], session: Session) -> tuple[Tensor, Tensor]:
    """Every window of `names` and what follows it, as the lecture's dataset has them."""
    X, Y = lecture.examples(names, session.vocab.characters, 8)
    return X.to(session.device), Y.to(session.device)


def equality(names: list[str], session: Session) -> Results:
    """One step in float64: loss, gradients and running statistics of shared nodes against the tree on all windows."""
    tree, (X, Y) = new_tree(0, session, torch.float64), windows_of(names, session)
    conv = from_tree(tree).train()
    expected = F.cross_entropy(tree.train()(X), Y)
    found = total_loss(conv, Corpus(names, session.vocab, conv).batch(torch.arange(len(names)).to(X))) / len(X)
    expected.backward()
    found.backward()
    gradients = new_tree(0, session, torch.float64)  # a tree whose weights are the gradients, to map them
    for target, parameter in zip(gradients.parameters(), tree.parameters()):
        target.data = torch.as_tensor(parameter.grad)
    pairs: list[tuple] = [(expected, found)]
    pairs += [(a, b.grad) for a, b in zip(from_tree(gradients).parameters(), conv.parameters())]
    after, state = from_tree(tree).state_dict(), conv.state_dict()
    pairs += [(after[name], state[name]) for name in state if "running" in name]
    largest = float(torch.stack([(a - b).detach().abs().max() for a, b in pairs]).max())
    return {"windows": len(X), "largest": largest, "tolerance": TOLERANCE, "equal": largest < TOLERANCE}


def throughput_rows(names: list[str], session: Session) -> list[Row]:
    """One whole training step, forward, backward and SGD, on the same names by every method."""
    calls, windows, rounds = step_calls(names, session), sum(len(name) + 1 for name in names), session.pick(2, 8)
    time_calls(calls, 1, session.device, block=1)
    tick = session.ticks(f"{len(names)} names", rounds)
    samples = time_calls(calls, rounds * 5, session.device, block=5, tick=tick)
    rows: list[Row] = []
    for method, times in samples.items():
        row = {"method": method, "names": len(names), "windows": windows} | spread("ms", [us / 1e3 for us in times])
        row |= {"names_per_second": len(names) / row["ms"] * 1e3, "windows_per_second": windows / row["ms"] * 1e3}
        rows.append(row | {"times_windows": (rows or [row])[0]["ms"] / row["ms"]})
    return rows


def step_calls(names: list[str], session: Session) -> dict[str, Call]:
    """A training step on all windows of `names`: the tree's, the convolutional pass's and that of shared nodes."""
    tree = new_tree(0, session).train()
    slid, shared = from_tree(tree).train(), from_tree(tree).train()
    X, Y = windows_of(names, session)
    tokens, lengths = (part.to(session.device) for part in session.vocab.encode(names, context=slid.context))
    inside = torch.arange(tokens.shape[1] - slid.context + 1, device=tokens.device) <= lengths[:, None]
    following = torch.cat([tokens[:, slid.context :], tokens.new_zeros(len(tokens), 1)], 1)[inside]
    corpus, rows = Corpus(names, session.vocab, shared), torch.arange(len(names), device=tokens.device)

    def stepping(parameters: Iterable[Tensor], loss: Callable[[], Tensor]) -> Call:
        optimizer = torch.optim.SGD(list(parameters), lr=0.01)

        def step() -> None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        return step

    return {
        "windows": stepping(tree.parameters(), lambda: F.cross_entropy(tree(X), Y)),
        "slid": stepping(slid.parameters(), lambda: F.cross_entropy(slid(tokens, lengths)[inside], following)),
        "shared": stepping(shared.parameters(), lambda: total_loss(shared, corpus.batch(rows)) / len(X)),
    }


def training_rows(train: list[str], valid: list[str], threads: dict[str, int], session: Session) -> list[Row]:
    """Seconds until the validation loss first reaches the target, by the lecture's recipe and by ours, seed by seed."""
    rows, before, count = [], torch.get_num_threads(), session.args.trainings or session.pick(1, 3)
    tick = session.ticks("trainings", 2 * count)
    for seed in range(count):
        row: Row = {"seed": seed}
        for kind, training in KINDS.items():
            torch.set_num_threads(threads[kind])
            begin = now(session.device)
            curve, waited = training(seed, train, valid, session)
            seconds, (step, validation_loss) = now(session.device) - begin - waited, curve[-1]
            row[kind] = {"seconds": seconds, "steps": step, "validation_loss": validation_loss, "curve": curve}
            row[kind]["reached"] = validation_loss <= session.args.target
            tick()
        rows.append(row)
    torch.set_num_threads(before)
    return rows


Curve = list[tuple[int, float]]


def lecture_training(seed: int, train: list[str], valid: list[str], session: Session) -> tuple[Curve, float]:
    """The lecture's recipe, until the target or its last step; returns the validations and the seconds they took."""
    tree, held_out, curve, waited = new_tree(seed, session), windows_of(valid, session), [], 0.0

    def validate(step: int, _: Tensor) -> None:
        nonlocal waited
        if step % LECTURE_EVERY == 0:
            begin = now(session.device)
            curve.append((step, lecture.evaluate(tree, *held_out)))
            waited += now(session.device) - begin
            if curve[-1][1] <= session.args.target:
                raise Reached

    X, Y = windows_of(train, session)
    generator = torch.Generator(session.device).manual_seed(seed)
    with suppress(Reached):
        lecture.train(tree, X, Y, steps=LECTURE_STEPS, generator=generator, on_step=validate)
    return curve, waited


def our_training(seed: int, train: list[str], valid: list[str], session: Session) -> tuple[Curve, float]:
    """The preset "fast" on the same architecture, until the target or its last step."""
    trainer = new_trainer(seed, train, valid, session)
    run_trainer(trainer, on_validation=lambda trainer: trainer.validations[-1][1] <= session.args.target)
    return trainer.validations, trainer.waited


def new_trainer(seed: int, train: list[str], valid: list[str], session: Session) -> TimedTrainer:
    """The lecture's network, as it starts with this seed, and the preset's recipe."""
    recipe = replace(PRESETS["fast"][1], seed=seed, eval_every=OUR_EVERY)
    return TimedTrainer(from_tree(new_tree(seed, session)), session.vocab, train, valid, recipe)


KINDS = {"lecture": lecture_training, "ours": our_training}


def now(device: torch.device) -> float:
    """Seconds on the clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


def tables(results: Results) -> Iterator[Table]:
    """What is printed."""
    yield Table(
        "One training step: forward, backward and SGD on the same names",
        "method; names=names ,; windows=windows ,; ms per step=ms .2f; quartiles=~ms .2f; "
        "names/s=names_per_second ,.0f; windows/s=windows_per_second ,.0f; x windows=times_windows .2f",
        results["throughput"],
        "windows: the tree on all windows as one batch; slid: the convolutions; shared: each distinct node once.",
    )
    times, rows = results["times_faster"], []
    for row in results["trainings"]:
        seconds = {kind: f"{'' if row[kind]['reached'] else '>'}{row[kind]['seconds']:.1f}" for kind in KINDS}
        rows.append(row | {"s": seconds, "faster": row["lecture"]["seconds"] / row["ours"]["seconds"]})
    threads = ", ".join(f"{kind} with {count} threads" for kind, count in results["threads"].items())
    yield Table(
        f"Seconds until the validation loss first is {results['target']:g} nats",
        "seed"
        + "".join(f"; {k}, s=s.{k}; steps={k}.steps ,; validation={k}.validation_loss .4f" for k in KINDS)
        + "; times faster=faster .1f",
        rows,
        f"{'Ours did not reach it.' if times is None else f'Median seconds: {times:.1f} times faster.'} "
        f"The {threads}. > marks a training that ended above the target.",
    )


main = partial(harness.main, Benchmark("train", __doc__, run, tables, add_options, gradients=True))

if __name__ == "__main__":
    sys.exit(main())
