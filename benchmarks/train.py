"""How long until a model is as good as the lecture's: by its own recipe, and by training on shared nodes?

Same architecture (the lecture's last network), same list, same split, same machine, same run. Equality comes first:
where one training step differs from the tree's on all windows of the same names, in float64, the run ends with exit
code 1 and no timings. Seconds leave out every evaluation of the validation loss; ours count finding the node ids and
counting n-grams.

- One step: with more names per step, more windows share their nodes, and sharing is worth more.
- Until the loss is reached: both the faster step and another recipe (AdamW, one-cycle, larger batches, n-grams as
  teachers) count.
- Why the convolutional pass (slid) gains little at 1,024 names: a batch is padded to its longest name, so half of its
  outputs are behind the end of a name, and it does a third more multiply-adds than the tree on all windows. Its
  convolutions take as long as the tree's matrix products. Its weighted sums in batch norm read the padding too, and
  take as long as the tree's variances.
- Where a step's time goes: PyTorch's profiler, after all else has been timed; an operator's time without that of the
  operators that it calls.

The published run reads the lecture's list (`--names FILE`) and takes more than ten minutes on two cores.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import reference
import reference.training as lecture
from benchmarks import harness
from benchmarks.counting import counting
from benchmarks.harness import Benchmark, Call, Results, Session, call_rows, now
from benchmarks.tables import Row, Table
from wavenet_conv import ConvWaveNet, WaveNetConfig, from_tree
from wavenet_conv.training import PRESETS, Corpus, Trainer, split_names, total_loss

TARGET, QUICK_TARGET = 1.993, 2.4  # nats: the validation loss that the lecture ends with, and without --full
TOLERANCE = 1e-10  # of a float64 loss, gradient and statistic
LECTURE_STEPS, LECTURE_EVERY, OUR_EVERY = 200_000, 2_000, 25  # steps in all; between validations
BATCHES = (256, 1024)  # names per step, for the throughput; the largest is profiled
PROFILED, TOP = ("windows", "slid"), 8  # methods; operators of each
THREADS = {"lecture": 1, "ours": torch.get_num_threads()}  # a minibatch of 32 windows is too small for two


class Reached(Exception):
    """The validation loss is at the target."""


@torch.enable_grad()
def run(session: Session) -> Iterator[Results]:
    """All results; where a training step differs, nothing after the equality."""
    target, (train, valid, _) = session.pick(QUICK_TARGET, TARGET), split_names(session.names)
    used = {"file": Path(session.args.names).name, "of": len(session.names), "train": len(train)}
    used |= {"validation": len(valid), "windows": sum(len(name) + 1 for name in train)}
    found = equality(train[:256], session)
    yield {"target": target, "recipe": asdict(PRESETS["fast"][1]), "names": used, "equality": found}
    if not found["equal"]:
        return
    yield {"throughput": [row for size in BATCHES for row in throughput_rows(train[:size], session)]}
    rows = list[Row]()
    for seed in session.progress.track(range(session.pick(1, 3)), description="trainings"):
        rows.append({"seed": seed} | {kind: training_row(kind, seed, target, session) for kind in KINDS})
        yield {"threads": THREADS, "trainings": rows}
    lecture_s, ours_s = (statistics.median(row[kind]["seconds"] for row in rows) for kind in KINDS)
    reached = all(row["ours"]["reached"] for row in rows)
    yield {"times_faster": lecture_s / ours_s if reached else None}
    if session.device.type == "cpu":  # last: profiling must not change what is timed after it
        yield {"operators": operators(train[: max(BATCHES)], session)}


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
    largest = worst(from_the_tree(shared_loss, names, session).values())
    windows = sum(len(name) + 1 for name in names)
    return {"windows": windows, "largest": largest, "tolerance": TOLERANCE, "equal": largest < TOLERANCE}


def shared_loss(conv: ConvWaveNet, names: list[str], session: Session) -> Tensor:
    """The mean loss of `names`, each distinct node computed once."""
    batch = Corpus(names, session.vocab, conv).batch(torch.arange(len(names)).to(session.device))
    return total_loss(conv, batch) / batch.positions


def from_the_tree(
    loss: Callable[[ConvWaveNet, list[str], Session], Tensor],
    names: list[str],
    session: Session,
    kind: Callable[[WaveNetConfig], ConvWaveNet] = ConvWaveNet,
) -> dict[str, float]:
    """How far the mean loss of `names`, its gradients and the running statistics are from those of the tree.

    The largest differences after one step in float64; the tree runs on all windows. `kind` makes the model.
    """
    tree, (X, Y) = new_tree(0, session, torch.float64), windows_of(names, session)
    conv = mapped(tree, kind).train()
    expected, found = F.cross_entropy(tree.train()(X), Y), loss(conv, names, session)
    expected.backward()
    found.backward()
    gradients = new_tree(0, session, torch.float64)  # a tree whose weights are the gradients, to map them
    for target, parameter in zip(gradients.parameters(), tree.parameters()):
        target.data = torch.as_tensor(parameter.grad)
    after, state = from_tree(tree).state_dict(), conv.state_dict()
    pairs: dict[str, list[tuple]] = {
        "loss": [(expected, found)],
        "gradients": [(a, b.grad) for a, b in zip(from_tree(gradients).parameters(), conv.parameters())],
        "statistics": [(after[name], state[name]) for name in state if "running" in name],
    }
    return {name: worst(float((a - b).detach().abs().max()) for a, b in parts) for name, parts in pairs.items()}


def worst(differences: Iterable[float]) -> float:
    """The largest; NaN where there is one, which Python's `max` may miss."""
    return float(torch.tensor(list(differences), dtype=torch.float64).max())


def mapped(tree: reference.Sequential, kind: Callable[[WaveNetConfig], ConvWaveNet]) -> ConvWaveNet:
    """The tree's weights in a model of this kind."""
    conv = from_tree(tree)
    model = kind(conv.config).to(conv.embedding.weight)
    model.load_state_dict(conv.state_dict())
    return model


class Step:
    """A whole training step: forward, backward and SGD. A call is one step."""

    def __init__(self, parameters: Iterable[Tensor], loss: Callable[[], Tensor]):
        self.optimizer, self.loss = torch.optim.SGD(parameters, lr=0.1), loss

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()


def make_steps(names: list[str], session: Session) -> dict[str, Step]:
    """A step on the windows of `names` by each method: by the tree, slid and shared."""
    tree = new_tree(0, session).train()
    slid, shared = from_tree(tree).train(), from_tree(tree).train()
    X, Y = windows_of(names, session)
    tokens, lengths = (part.to(session.device) for part in session.vocab.encode(names, context=slid.context))
    inside = torch.arange(tokens.shape[1] - slid.context + 1, device=tokens.device) <= lengths[:, None]
    following = F.pad(tokens[:, slid.context :], (0, 1))[inside]
    corpus, chosen = Corpus(names, session.vocab, shared), torch.arange(len(names)).to(tokens)
    return {
        "windows": Step(tree.parameters(), lambda: F.cross_entropy(tree(X), Y)),
        "slid": Step(slid.parameters(), lambda: F.cross_entropy(slid(tokens, lengths)[inside], following)),
        "shared": Step(shared.parameters(), lambda: total_loss(shared, corpus.batch(chosen)) / len(X)),
    }


def throughput_rows(names: list[str], session: Session) -> list[Row]:
    """Each method's step on `names`: its time, and the nodes and multiply-adds of its forward pass."""
    steps, windows = make_steps(names, session), sum(len(name) + 1 for name in names)
    config = WaveNetConfig(vocab_size=len(session.vocab))
    rows = call_rows({**steps}, session.pick(10, 40), f"{len(names)} names", session, block=5)
    for row in rows:
        row |= {f"{quartile}ms": row.pop(f"{quartile}us") / 1e3 for quartile in ("", "q1_", "q3_")}
        row |= {"names": len(names), "windows": windows, "times_windows": rows[0]["ms"] / row["ms"]}
        row |= {"names_per_second": len(names) / row["ms"] * 1e3, "windows_per_second": windows / row["ms"] * 1e3}
        with counting(config) as counted, torch.no_grad():
            steps[row["method"]].loss()
        row |= {"nodes": sum(counted.nodes), "multiply_adds": counted.multiply_adds}
    return rows


def operators(names: list[str], session: Session) -> Results:
    """Where a step's time goes: the operators that take the most of it, `TOP` of each of the `PROFILED` methods."""
    steps, count = make_steps(names, session), session.pick(3, 10)
    found = {method: profiled(steps[method], count) for method in PROFILED}
    top = {name for by_name in found.values() for name in list(by_name)[: TOP + 1]}
    cost = lambda name: max(by_name[name]["ms"] for by_name in found.values() if name in by_name)
    rows = [{"operator": name} | {method: found[method].get(name) for method in PROFILED} for name in top]
    return {"names": len(names), "steps": count, "rows": sorted(rows, key=lambda row: -cost(row["operator"]))}


def profiled(step: Call, count: int) -> dict[str, Row]:
    """Per operator, the most time first: milliseconds and calls per step, and its share; before them, of all."""
    for _ in range(3):  # to warm up
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(count):
            step()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    sums = [(event.key, event.self_cpu_time_total, event.count) for event in events]
    total = sum(us for _, us, _ in sums)
    sums.insert(0, ("all operators", total, sum(calls for *_, calls in sums)))
    return {name: {"ms": us / count / 1e3, "share": us / total, "calls": calls / count} for name, us, calls in sums}


def training_row(kind: str, seed: int, target: float, session: Session) -> Row:
    """One training, until the validation loss is at the target or to the last step; validations are off the clock."""
    curve: list[tuple[int, float]] = []
    begin, waited, threads = now(session.device), 0.0, torch.get_num_threads()

    def validate(step: int, loss: Callable[[], float]) -> None:
        nonlocal waited
        start = now(session.device)
        curve.append((step, loss()))
        waited += now(session.device) - start
        if curve[-1][1] <= target:
            raise Reached

    torch.set_num_threads(THREADS[kind])
    with suppress(Reached):
        KINDS[kind](seed, session, validate)
    torch.set_num_threads(threads)
    seconds, (step, loss) = now(session.device) - begin - waited, curve[-1]
    return {"seconds": seconds, "steps": step, "validation_loss": loss, "reached": loss <= target, "curve": curve}


Validate = Callable[[int, Callable[[], float]], None]  # takes the step, and what computes the loss


def train_lecture(seed: int, session: Session, validate: Validate) -> None:
    """The lecture's recipe."""
    train, valid, _ = split_names(session.names)
    tree, held_out, (X, Y) = new_tree(seed, session), windows_of(valid, session), windows_of(train, session)

    def on_step(step: int, _: Tensor) -> None:
        if step % LECTURE_EVERY == 0:
            validate(step, partial(lecture.evaluate, tree, *held_out))

    generator = torch.Generator(session.device).manual_seed(seed)
    lecture.train(tree, X, Y, steps=LECTURE_STEPS, generator=generator, on_step=on_step)


def train_ours(seed: int, session: Session, validate: Validate) -> None:
    """The preset "fast" on the same network as it starts with this seed."""
    train, valid, _ = split_names(session.names)
    recipe = replace(PRESETS["fast"][1], seed=seed)
    trainer = Trainer(from_tree(new_tree(seed, session)), session.vocab, train, valid, recipe)
    while not trainer.finished:
        trainer.advance()
        if trainer.step % OUR_EVERY == 0:
            validate(trainer.step, trainer.validate)


KINDS = {"lecture": train_lecture, "ours": train_ours}


def tables(results: Results) -> Iterator[Table]:
    """What is printed."""
    yield Table(
        "One training step: forward, backward and SGD on the same names",
        "method; names=names ,; windows=windows ,; ms per step=ms .2f; quartiles=~ms .2f; "
        "nodes=nodes ,; multiply-adds=multiply_adds ,; "
        "names/s=names_per_second ,.0f; windows/s=windows_per_second ,.0f; x windows=times_windows .2f",
        results["throughput"],
        "windows: the tree on all windows as one batch; slid: the convolutions; shared: each distinct node once. "
        "Nodes and multiply-adds are of the forward pass.",
    )
    times, rows = results["times_faster"], results["trainings"]
    rows = [row | {"faster": row["lecture"]["seconds"] / row["ours"]["seconds"]} for row in rows]
    threads = ", ".join(f"{kind} with {count} threads" for kind, count in results["threads"].items())
    short = "" if results["target"] == TARGET else " A short run: it shows that it runs, and proves nothing."
    faster = "Ours did not reach it." if times is None else f"Median seconds: {times:.1f} times faster."
    columns = "{k}, s={k}.seconds .1f; steps={k}.steps ,; validation={k}.validation_loss .4f"
    yield Table(
        f"Seconds until the validation loss first is {results['target']:g} nats",
        f"seed; {'; '.join(columns.format(k=kind) for kind in KINDS)}; times faster=faster .1f",
        rows,
        f"{faster} The {threads}.{short}",
    )
    if found := results.get("operators"):  # older results have none
        column = "{k}, ms={k}.ms .2f; share={k}.share .0%; calls={k}.calls .0f"
        yield Table(
            f"Where a step's time goes, {found['names']:,} names",
            f"operator; {'; '.join(column.format(k=method) for method in PROFILED)}",
            found["rows"],
            f"Per step, of {found['steps']} steps: the {TOP} operators that take each method the most time.",
        )


main = partial(harness.main, Benchmark("train", __doc__, run, tables))

if __name__ == "__main__":
    sys.exit(main())
