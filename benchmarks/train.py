"""How long until a model is as good as the lecture's: by its own recipe, and by training on shared nodes?

Same architecture (the lecture's last network), same list, same split, same machine, same run. Equality comes first:
where one training step differs from the tree's on all windows of the same names, in float64, the run ends with exit
code 1 and no timings. Seconds leave out every evaluation of the validation loss; ours count the numbering of the list.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import reference
import reference.training as lecture
from benchmarks import harness
from benchmarks.harness import quartiles, time_calls
from benchmarks.slide import positive, table_of
from wavenet_conv import ConvWaveNet, Vocabulary, WaveNetConvError, exact_float32, from_tree
from wavenet_conv.names import read_names
from wavenet_conv.training import PRESETS, Corpus, Trainer, evaluate, split_names, total_loss

TARGET = 1.993  # nats: the validation loss that the lecture ends with
TOLERANCE = 1e-10  # of a float64 loss, gradient and statistic
LECTURE_STEPS, LECTURE_EVERY, OUR_EVERY = 200_000, 2_000, 25  # steps; between two looks at the validation loss
BATCHES = (256, 1024)  # names a step, for the throughput


class Reached(Exception):
    """The validation loss is at the target."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code: 1 where a training step differs, 2 for wrong usage."""
    args = parse(arguments)
    try:
        device, names = harness.pick_device(args.device), read_names(args.names)
        harness.check_writable(args.json)
    except WaveNetConvError as error:
        print(f"benchmarks.train: {error}", file=sys.stderr)
        return 2
    try:
        with harness.progress_bar() as progress, exact_float32():
            results = run(args, device, names, progress)
    except WaveNetConvError as error:
        print(f"benchmarks.train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return harness.report(results, args.json, print_tables)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; argparse leaves with exit code 2 for what it cannot read."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--names", metavar="FILE", default=str(harness.NAMES), help="one name a line (names.txt)")
    parser.add_argument("--seeds", type=positive, help="trainings of each kind (3; with --quick 1)")
    parser.add_argument("--target", type=float, help=f"validation loss to reach, in nats ({TARGET}; with --quick 2.4)")
    parser.add_argument("--json", metavar="FILE|-", help="write the results as JSON; - prints it instead of the tables")
    parser.add_argument("--quick", action="store_true", help="an easy target and few repeats: under 60 seconds")
    args = parser.parse_args(arguments)
    args.seeds = args.seeds or (1 if args.quick else 3)
    if args.target is None:
        args.target = 2.4 if args.quick else TARGET
    if not 0 < args.target < 100:
        parser.error(f"argument --target: {args.target} is not a loss in nats")
    return args


def run(args: argparse.Namespace, device: torch.device, names: list[str], progress: Progress) -> dict[str, Any]:
    """All results, as they stand in the JSON; where a training step differs, nothing after the equality."""
    vocab, (train, valid, _) = Vocabulary.from_names(names), split_names(names)
    _, recipe = PRESETS["fast"]
    tree = new_tree(0, len(vocab))
    results: dict[str, Any] = {
        "device": harness.machine(device),
        "torch": torch.__version__,
        "dtype": "float32",
        "target": args.target,
        "parameters": sum(p.numel() for p in tree.parameters()),
        "names": {"train": len(train), "validation": len(valid), "windows": sum(len(name) + 1 for name in train)},
        "recipe": asdict(recipe),
        "equality": equality(vocab, train[:256], device),
    }
    if not results["equality"]["equal"]:
        return results
    results["throughput"] = throughput_rows(args, vocab, train, device, progress)
    results["threads"] = fastest_threads(vocab, train, device)
    results["trainings"] = training_rows(args, vocab, train, valid, device, results["threads"], progress)
    medians = [statistics.median(row[kind]["seconds"] for row in results["trainings"]) for kind in ("lecture", "ours")]
    reached = all(row["ours"]["reached"] for row in results["trainings"])
    results["times_faster"] = medians[0] / medians[1] if reached else None
    return results


def new_tree(seed: int, vocab_size: int, dtype: torch.dtype = torch.float32) -> reference.Sequential:
    """The lecture's last network, its weights drawn from `seed`."""
    return reference.build(vocab_size=vocab_size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def windows_of(vocab: Vocabulary, names: Sequence[str], context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Every window of `names` and what follows it, as the lecture's dataset has them."""
    X, Y = lecture.examples(names, vocab.characters, context)
    return X.to(device), Y.to(device)


def equality(vocab: Vocabulary, names: list[str], device: torch.device) -> dict[str, Any]:
    """One step in float64: loss, gradients and running statistics of shared nodes against the tree on all windows."""
    tree = new_tree(0, len(vocab), torch.float64).to(device)
    conv = from_tree(tree).train()
    X, Y = windows_of(vocab, names, conv.context, device)
    expected = F.cross_entropy(tree.train()(X), Y)
    corpus = Corpus(names, vocab, conv)
    found = total_loss(conv, corpus.batch(torch.arange(len(names), device=device))) / len(X)
    expected.backward()
    found.backward()
    moved = reference.build(vocab_size=len(vocab)).to(torch.float64).to(device)
    for target, parameter in zip(moved.parameters(), tree.parameters()):
        target.data = parameter.grad
    gradients = from_tree(moved)
    differences = [abs(float(expected.detach() - found.detach()))]
    named = dict(conv.named_parameters())
    differences += [
        float((named[name].grad - gradient.detach()).abs().max()) for name, gradient in gradients.named_parameters()
    ]
    after = from_tree(tree)
    statistics = [name for name in conv.state_dict() if "running" in name]
    differences += [float((conv.state_dict()[name] - after.state_dict()[name]).abs().max()) for name in statistics]
    return {
        "windows": len(X),
        "largest": max(differences),
        "tolerance": TOLERANCE,
        "equal": all(d < TOLERANCE for d in differences),
    }


def throughput_rows(
    args: argparse.Namespace, vocab: Vocabulary, train: list[str], device: torch.device, progress: Progress
) -> list[dict[str, Any]]:
    """One whole training step, forward, backward and SGD, on the same names by every method."""
    rows, rounds = [], 2 if args.quick else 8
    task = progress.add_task("throughput", total=rounds * len(BATCHES))
    for size in BATCHES:
        names = train[:size]
        methods = step_calls(vocab, names, device)
        for call in methods.values():
            call()
        samples = time_calls(methods, rounds * 5, device, block=5, tick=lambda: progress.advance(task))
        windows = sum(len(name) + 1 for name in names)
        slowest = quartiles(samples["windows"])[1]
        for method, times in samples.items():
            q1, median, q3 = quartiles(times)
            rows.append(
                {
                    "method": method,
                    "names": len(names),
                    "windows": windows,
                    "ms": median / 1e3,
                    "q1_ms": q1 / 1e3,
                    "q3_ms": q3 / 1e3,
                    "names_per_second": len(names) / median * 1e6,
                    "windows_per_second": windows / median * 1e6,
                    "times_windows": slowest / median,
                }
            )
    return rows


def step_calls(vocab: Vocabulary, names: list[str], device: torch.device) -> dict[str, Callable[[], None]]:
    """A training step on all windows of `names`: the tree's, the convolutional pass's and that of shared nodes."""
    tree = new_tree(0, len(vocab)).to(device).train()
    slid, shared = from_tree(tree).train(), from_tree(tree).train()
    X, Y = windows_of(vocab, names, slid.context, device)
    tokens, lengths = (part.to(device) for part in vocab.encode(names, context=slid.context))
    inside = torch.arange(tokens.shape[1] - slid.context + 1, device=device) <= lengths[:, None]
    following = torch.cat([tokens[:, slid.context :], tokens.new_zeros(len(tokens), 1)], 1)[inside]
    corpus, everyone = Corpus(names, vocab, shared), torch.arange(len(names), device=device)

    def shared_loss() -> Tensor:
        return total_loss(shared, corpus.batch(everyone)) / len(corpus.windows)

    losses = {
        "windows": (tree.parameters(), lambda: F.cross_entropy(tree(X), Y)),
        "slid": (list(slid.parameters()), lambda: F.cross_entropy(slid(tokens, lengths)[inside], following)),
        "shared": (list(shared.parameters()), shared_loss),
    }

    def stepping(parameters: list[Tensor], loss: Callable[[], Tensor]) -> Callable[[], None]:
        optimizer = torch.optim.SGD(parameters, lr=0.01)

        def step() -> None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        return step

    return {method: stepping(*of) for method, of in losses.items()}


def fastest_threads(vocab: Vocabulary, train: list[str], device: torch.device) -> dict[str, int]:
    """How many threads suit each kind of training best, one or all: the lecture's minibatches are small."""
    most, chosen = torch.get_num_threads(), {}
    tree, generator = new_tree(0, len(vocab)).to(device), torch.Generator(device).manual_seed(0)
    X, Y = windows_of(vocab, train[:1000], 8, device)
    trainer = new_trainer(0, vocab, train, train[:10], device)
    calls = {
        "lecture": lambda: lecture.train(tree, X, Y, steps=200, generator=generator),
        "ours": lambda: [trainer.advance() for _ in range(20)],
    }
    for kind, call in calls.items():
        seconds = {}
        for threads in sorted({1, most}):
            torch.set_num_threads(threads)
            seconds[threads] = quartiles(time_calls({kind: call}, 5, device, block=1)[kind])[1]
        chosen[kind] = min(seconds, key=seconds.get)
    torch.set_num_threads(most)
    return chosen


def training_rows(
    args: argparse.Namespace,
    vocab: Vocabulary,
    train: list[str],
    valid: list[str],
    device: torch.device,
    threads: dict[str, int],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Seconds until the validation loss first reaches the target, by the lecture's recipe and by ours, seed by seed."""
    rows, before = [], torch.get_num_threads()
    task = progress.add_task("trainings", total=2 * args.seeds)
    for seed in range(args.seeds):
        row: dict[str, Any] = {"seed": seed}
        for kind, training in (("lecture", lecture_training), ("ours", our_training)):
            torch.set_num_threads(threads[kind])
            row[kind] = training(args, seed, vocab, train, valid, device)
            progress.advance(task)
        rows.append(row)
    torch.set_num_threads(before)
    return rows


def lecture_training(
    args: argparse.Namespace, seed: int, vocab: Vocabulary, train: list[str], valid: list[str], device: torch.device
) -> dict[str, Any]:
    """The lecture's recipe: single windows, 32 a step, SGD, until the target or its 200,000 steps are reached."""
    tree = new_tree(seed, len(vocab)).to(device)
    held_out, curve, waited = windows_of(vocab, valid, 8, device), [], 0.0

    def look(step: int, _: Tensor) -> None:
        nonlocal waited
        if step % LECTURE_EVERY == 0:
            paused = now(device)
            curve.append((step, lecture.evaluate(tree, *held_out)))
            waited += now(device) - paused
            if curve[-1][1] <= args.target:
                raise Reached

    begun = now(device)
    X, Y = windows_of(vocab, train, 8, device)
    generator = torch.Generator(device).manual_seed(seed)
    try:
        lecture.train(tree, X, Y, steps=LECTURE_STEPS, generator=generator, on_step=look)
    except Reached:
        pass
    return outcome(args, curve, now(device) - begun - waited)


def new_trainer(seed: int, vocab: Vocabulary, train: list[str], valid: list[str], device: torch.device) -> Trainer:
    """Ours: the preset "fast" on the same architecture."""
    shape, recipe = PRESETS["fast"]
    conv = from_tree(new_tree(seed, len(vocab)).to(device))
    assert isinstance(conv, ConvWaveNet) and not shape, "the preset's model is the lecture's"
    return Trainer(conv, vocab, train, valid, replace(recipe, seed=seed))


def our_training(
    args: argparse.Namespace, seed: int, vocab: Vocabulary, train: list[str], valid: list[str], device: torch.device
) -> dict[str, Any]:
    """The preset "fast", until the target or the end of its steps is reached."""
    begun, curve, waited = now(device), [], 0.0
    trainer = new_trainer(seed, vocab, train, valid, device)
    while not trainer.finished and not (curve and curve[-1][1] <= args.target):
        trainer.advance()
        if trainer.step % OUR_EVERY == 0:
            paused = now(device)
            curve.append((trainer.step, evaluate(trainer.kept, trainer.valid)))
            waited += now(device) - paused
    return outcome(args, curve, now(device) - begun - waited)


def now(device: torch.device) -> float:
    """Seconds on the clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


def outcome(args: argparse.Namespace, curve: list[tuple[int, float]], seconds: float) -> dict[str, Any]:
    """What a training came to."""
    step, loss = curve[-1]
    return {"seconds": seconds, "steps": step, "validation_loss": loss, "reached": loss <= args.target, "curve": curve}


def print_tables(results: dict[str, Any]) -> None:
    """The results on stdout, as tables that are Markdown too."""
    console = Console(width=400, highlight=False, soft_wrap=True)  # a table that wraps is no Markdown
    equal = results["equality"]
    console.print(
        f"{results['device']}, PyTorch {results['torch']}, {results['dtype']}; {results['parameters']:,} parameters, "
        f"{results['names']['train']:,} names, {results['names']['windows']:,} windows."
    )
    verdict = "Equal to" if equal["equal"] else "DIFFERENT from"
    console.print(
        f"{verdict} the float64 tree on {equal['windows']:,} windows in loss, gradients and batch statistics: "
        f"largest difference {equal['largest']:.2g}, tolerance {equal['tolerance']:g}."
    )
    if not equal["equal"]:
        return
    for title, table, remark in (throughput_table(results), training_table(results)):
        console.print(f"\n{title}")
        console.print(table)
        console.print(remark)


def throughput_table(results: dict[str, Any]) -> tuple[str, Table, str]:
    """A training step by every method."""
    table = table_of("method", "names", "windows", "ms a step", "quartiles", "names/s", "windows/s", "x windows")
    for row in results["throughput"]:
        table.add_row(
            row["method"],
            f"{row['names']:,}",
            f"{row['windows']:,}",
            f"{row['ms']:.2f}",
            f"{row['q1_ms']:.2f} to {row['q3_ms']:.2f}",
            f"{row['names_per_second']:,.0f}",
            f"{row['windows_per_second']:,.0f}",
            f"{row['times_windows']:.2f}",
        )
    remark = "windows: the tree on all windows as one batch; slid: the convolutions; shared: each distinct node once."
    return "One training step: forward, backward and SGD on the same names", table, remark


def training_table(results: dict[str, Any]) -> tuple[str, Table, str]:
    """Seconds to the target."""
    table = table_of("seed", "lecture, s", "steps", "validation", "ours, s", "steps", "validation", "times faster")
    for row in results["trainings"]:
        theirs, ours = row["lecture"], row["ours"]
        table.add_row(
            str(row["seed"]),
            *(
                text
                for part in (theirs, ours)
                for text in (_seconds(part), f"{part['steps']:,}", f"{part['validation_loss']:.4f}")
            ),
            f"{theirs['seconds'] / ours['seconds']:.1f}",
        )
    times = results["times_faster"]
    faster = "Ours did not reach it." if times is None else f"Median seconds: {times:.1f} times faster."
    threads = ", ".join(f"{kind} with {count} threads" for kind, count in results["threads"].items())
    remark = (
        f"{faster} Each with the number of threads that suits it: "
        f"{threads}. > marks a training that ended above the target."
    )
    return f"Seconds until the validation loss first is {results['target']:g} nats", table, remark


def _seconds(part: dict[str, Any]) -> str:
    return f"{'' if part['reached'] else '>'}{part['seconds']:.1f}"


if __name__ == "__main__":
    sys.exit(main())
