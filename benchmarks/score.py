"""What is it worth to share nodes across names, and how far is that from what the machine can do?

Equality comes first: log-likelihoods that differ from the float64 tree's end the run with exit code 1 and no timings.
Then every method on the whole list, the limits of this device, growth with the number of distinct names, and the
installed peer `pytorch-tcn`. float32 throughout, IEEE also on CUDA.
"""

from __future__ import annotations

import argparse
import copy
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import reference
from benchmarks import harness
from benchmarks.counting import CountingNodes, distinct_nodes, multiply_adds
from benchmarks.harness import quartiles, time_calls
from benchmarks.slide import (
    NAME_BATCHES,
    WINDOW_BATCHES,
    Models,
    counts,
    positive,
    random_models,
    sequences_by_length,
    table_of,
)
from wavenet_conv import ConvWaveNet, Vocabulary, WaveNetConfig, WaveNetConvError, exact_float32
from wavenet_conv.checkpoint import Checkpoint, load_checkpoint
from wavenet_conv.names import read_names
from wavenet_conv.sampling import sample_stream
from wavenet_conv.scoring import CHUNK_NAMES, Scorer

try:
    from pytorch_tcn import TCN
except ImportError:
    TCN = None

ARCHITECTURE = argparse.Namespace(kernel_sizes=(2, 2, 2), n_embd=24, n_hidden=128)  # the lecture's last network
TOLERANCE = 2e-5  # of a name's log-likelihood, in nats
METHODS = ("loop", "windows", "windows_folded", "slid", "shared")
PEER = "pytorch-tcn"
NOT_INSTALLED = f"not installed: pip install {PEER}"
SAMPLED = 2**17  # names that are drawn before repeats are taken out
LONGEST = 20  # characters; a sampled name is cut there
FEW = 1_000_000  # growth sizes up to here are timed several times, in turn; larger ones once


class Method(NamedTuple):
    """`run(batch size)` gives the log-likelihoods of `names`, float32 on the host."""

    run: Callable[[int], Tensor]
    sizes: Sequence[int]
    names: list[str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code: 1 where log-likelihoods differ, 2 for wrong usage."""
    args = parse(arguments)
    try:
        device, names = harness.pick_device(args.device), read_names(args.names)
        vocab = Vocabulary.from_names(names)
        harness.check_writable(args.json)
        trained = load_checkpoint("default")
    except WaveNetConvError as error:
        print(f"benchmarks.score: {error}", file=sys.stderr)
        return 2
    try:
        if args.peak is not None:
            print(peak_here(args, names, vocab))
            return 0
        with harness.progress_bar() as progress, torch.no_grad(), exact_float32():
            results = run(args, device, names, vocab, trained, progress)
    except WaveNetConvError as error:
        print(f"benchmarks.score: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return harness.report(results, args.json, print_tables)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; argparse leaves with exit code 2 for what it cannot read."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.score", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--names", metavar="FILE", default=str(harness.NAMES), help="one name a line (names.txt)")
    parser.add_argument(
        "--count", metavar="N", type=positive, help="distinct names to grow to (10000000; with --quick 20000)"
    )
    parser.add_argument("--seed", metavar="S", type=seed, default=42, help="of the weights and the sampled names (42)")
    parser.add_argument("--json", metavar="FILE|-", help="write the results as JSON; - prints it instead of the tables")
    parser.add_argument("--quick", action="store_true", help="every tenth name and few repeats: under 30 seconds")
    parser.add_argument("--peak", metavar="METHOD:BATCH", help=argparse.SUPPRESS)  # for `peak_memory`'s processes
    args = parser.parse_args(arguments)
    args.count = args.count or (20_000 if args.quick else 10_000_000)
    return args


def seed(text: str) -> int:
    """An integer that every generator takes."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 to 2**63 - 1")
    return int(text)


def run(
    args: argparse.Namespace,
    device: torch.device,
    every_name: list[str],
    vocab: Vocabulary,
    trained: Checkpoint,
    progress: Progress,
) -> dict[str, Any]:
    """All results, as they stand in the JSON; where log-likelihoods differ, nothing after the equality."""
    names = every_name[::10] if args.quick else every_name
    models, methods = models_and_methods(args, names, vocab, device)
    results: dict[str, Any] = {
        "device": harness.machine(device),
        "torch": torch.__version__,
        "dtype": "float32",
        "model": {
            "kernel_sizes": list(ARCHITECTURE.kernel_sizes),
            "context": models.conv.context,
            "n_embd": ARCHITECTURE.n_embd,
            "n_hidden": ARCHITECTURE.n_hidden,
            "vocab_size": len(vocab),
            "parameters": sum(p.numel() for p in models.tree.parameters()),
            "seed": args.seed,
        },
        "names": {
            "file": Path(args.names).name,
            "used": len(names),
            "of": len(every_name),
            "positions": outputs(names),
        },
    }
    differences, nodes = differences_of(models, methods, names, vocab, progress)
    differences["shared, default model"] = trained_difference(trained, args.seed, device)
    results["equality"] = equality(differences)
    if not results["equality"]["equal"]:
        return results
    results["distinct_nodes"] = distinct_nodes(
        sequences_by_length(names, vocab, models.conv.context, device), ARCHITECTURE.kernel_sizes
    )
    rates = {
        "matmul_multiply_adds_per_second": harness.matmul_rate(device),
        "copy_bytes_per_second": copy_bandwidth(device, quick=args.quick),
    }
    rows, peer = method_rows(args, models, methods, nodes, device, progress)
    results["methods"] = rows
    results["limits"] = rates | limit(rates, models.conv.config, nodes["shared"], names, rows[-1]["median_us"] / 1e6)
    del methods
    results["growth"] = growth_rows(args, trained, rates, device, progress)
    results["peer"] = peer
    return results


def outputs(names: Sequence[str]) -> int:
    """Positions of these names: one a character and one for each end."""
    return sum(map(len, names)) + len(names)


# The methods


def models_and_methods(
    args: argparse.Namespace, names: list[str], vocab: Vocabulary, device: torch.device
) -> tuple[Models, dict[str, Method]]:
    """Random weights and every method with them on these names; the installed peer last."""
    torch.manual_seed(args.seed)
    models = random_models(ARCHITECTURE, names, vocab, device)
    wanted = (*METHODS, PEER) if TCN is not None else METHODS
    return models, {name: method_of(name, args, models, names, vocab, device) for name in wanted}


def method_of(
    name: str, args: argparse.Namespace, models: Models, names: list[str], vocab: Vocabulary, device: torch.device
) -> Method:
    """One method of `METHODS`, or the peer; the loop is given a sample of the names.

    All but `shared` are given their tokens and targets as tensors on the device, windows cut and lengths sorted, and do
    not spend time on that: in their favour. `shared` starts at the list of strings.
    """
    if name == "loop":
        sample = names[:: max(1, len(names) // (50 if args.quick else 300))]
        return Method(by_loop(models.tree, sample, vocab, device), (1,), sample)
    if name == "shared":
        scorer = Scorer(models.conv, vocab, device=device, dtype=torch.float32)
        return Method(SharedRun(scorer, names), (len(names),), names)
    if name in ("windows", "windows_folded"):
        tree = models.tree if name == "windows" else models.folded_tree
        return Method(by_windows(tree, names, vocab, device), WINDOW_BATCHES[device.type], names)
    if name == "slid":
        return Method(
            by_length(models.folded, models.conv.context, names, vocab, device), NAME_BATCHES[device.type], names
        )
    # The peer pads by itself, with zeros inside the network: one `.` before a name is all that it is given.
    peer = Peer(models.conv.config).eval().to(device)
    return Method(by_length(peer, 1, names, vocab, device), NAME_BATCHES[device.type], names)


def picked(logits: Tensor, targets: Tensor) -> Tensor:
    """The log-probability of each target: logits `(..., vocab)` and targets `(...)`."""
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def by_loop(
    tree: reference.Sequential, names: list[str], vocab: Vocabulary, device: torch.device
) -> Callable[[int], Tensor]:
    """The lecture's loop, one call an example."""
    context = reference.context_of(tree)
    sequences = [vocab.encode([name], context=context)[0].to(device) for name in names]
    targets = [F.pad(tokens[:, context:], (0, 1)) for tokens in sequences]

    def run(_: int) -> Tensor:
        logits = (reference.loop_logits(tree, tokens) for tokens in sequences)
        return torch.stack([picked(of, next_).double().sum() for of, next_ in zip(logits, targets)]).float().cpu()

    return run


def by_windows(
    tree: reference.Sequential, names: list[str], vocab: Vocabulary, device: torch.device
) -> Callable[[int], Tensor]:
    """All windows of all names in batches; windows and targets are tensors on the device before the clock starts."""
    context = reference.context_of(tree)
    sequences, places = sequences_by_length(names, vocab, context, device), places_by_length(names, device)
    windows = torch.cat([reference.windows(tokens, context).reshape(-1, context) for tokens in sequences])
    targets = torch.cat([F.pad(tokens[:, context:], (0, 1)).flatten() for tokens in sequences])
    lengths = torch.tensor([len(name) for name in names], device=device)
    owners = places.repeat_interleave(lengths[places] + 1)

    def run(size: int) -> Tensor:
        batches = zip(windows.split(size), targets.split(size))
        log_probs = torch.cat([picked(tree(batch), next_) for batch, next_ in batches])
        scores = torch.zeros(len(names), dtype=torch.float64, device=device)
        return scores.index_add_(0, owners, log_probs.double()).float().cpu()

    return run


def by_length(
    model: Callable[[Tensor], Tensor], context: int, names: list[str], vocab: Vocabulary, device: torch.device
) -> Callable[[int], Tensor]:
    """A model of whole sequences in batches of names of one length, tokens and targets on the device beforehand."""
    sequences, places = sequences_by_length(names, vocab, context, device), places_by_length(names, device)
    targets = [F.pad(tokens[:, context:], (0, 1)) for tokens in sequences]

    def run(size: int) -> Tensor:
        parts = [
            picked(model(batch), next_).double().sum(1).float()
            for tokens, of in zip(sequences, targets)
            for batch, next_ in zip(tokens.split(size), of.split(size))
        ]
        scores = torch.empty(len(names), device=device)
        scores[places] = torch.cat(parts)
        return scores.cpu()

    return run


def places_by_length(names: list[str], device: torch.device) -> Tensor:
    """Which name each row of `sequences_by_length` is."""
    return torch.tensor([len(name) for name in names]).argsort(stable=True).to(device)


class SharedRun:
    """`Scorer.score`, from strings to scores on the host, everything included; the batch size does not matter."""

    def __init__(self, scorer: Scorer, names: list[str]):
        self.scorer, self.names = scorer, names

    def __call__(self, _: int) -> Tensor:
        return self.scorer.score(self.names)


class Peer(nn.Module):
    """A `TCN` of `pytorch-tcn`: the same widths, dilations and kernel size, embedding and head of the same sizes.

    Another function: it zero-pads the activations, and each of its blocks holds two convolutions and a residual. Its
    normalisation is left out, as ours is folded.
    """

    def __init__(self, config: WaveNetConfig):
        super().__init__()
        self.kernel_size, self.dilations = config.kernel_sizes[0], config.dilations
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.tcn = TCN(
            num_inputs=config.n_embd,
            num_channels=list(config.n_hidden),
            kernel_size=self.kernel_size,
            dilations=list(config.dilations),
            dropout=0.0,
            causal=True,
            use_norm=None,
            activation="tanh",
            output_projection=config.vocab_size,
        )

    @property
    def receptive_field(self) -> int:
        """Tokens that one prediction sees."""
        return 1 + sum(2 * (self.kernel_size - 1) * dilation for dilation in self.dilations)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `(batch, time, vocab)` of tokens `(batch, time)`."""
        return self.tcn(self.embedding(tokens).transpose(1, 2)).transpose(1, 2)


# Equality


def differences_of(
    models: Models, methods: dict[str, Method], names: list[str], vocab: Vocabulary, progress: Progress
) -> tuple[dict[str, float], dict[str, list[int]]]:
    """Every method's largest difference from the float64 tree's windows, and the nodes a layer that it evaluates."""
    task = progress.add_task("equality", total=len(METHODS) + 1)
    exact = dict(zip(names, exact_scores(models.tree, names, vocab).tolist()))
    progress.advance(task)
    differences, nodes = {}, {}
    for name in METHODS:
        method = methods[name]
        scores, nodes[name] = counted(method, models.conv)
        differences[name] = worst(scores, [exact[one] for one in method.names])
        progress.advance(task)
    return differences, nodes


def trained_difference(trained: Checkpoint, seed: int, device: torch.device) -> float:
    """The scorer's largest difference with the default model's trained weights, on names that are sampled from it."""
    names = distinct_names(trained, 2_000, seed, device)
    scores = Scorer(trained.model, trained.vocab, device=device, dtype=torch.float32).score(names)
    tree = reference.from_conv(trained.model).to(device=device)
    return worst(scores, exact_scores(tree, names, trained.vocab).tolist())


def equality(differences: dict[str, float]) -> dict[str, Any]:
    """Whether every difference is within the tolerance; a NaN is not."""
    return {
        "equal": all(difference <= TOLERANCE for difference in differences.values()),
        "tolerance": TOLERANCE,
        "max_abs_diff": differences["shared"],
        "max_abs_diffs": differences,
    }


def worst(scores: Tensor, exact: list[float]) -> float:
    """The largest difference of a name's log-likelihood; NaN where there is one."""
    return float((scores.double() - torch.tensor(exact, dtype=torch.float64)).abs().max())


def exact_scores(tree: reference.Sequential, names: list[str], vocab: Vocabulary) -> Tensor:
    """The log-likelihood of each name by the tree's windows in float64: `(names,)` on the CPU."""
    tree, context = copy.deepcopy(tree).to(dtype=torch.float64), reference.context_of(tree)
    scores = torch.empty(len(names), dtype=torch.float64)
    device = tree.layers[-1].weight.device
    parts = []
    for tokens in sequences_by_length(names, vocab, context, device):
        for batch in tokens.split(512):
            log_probs = picked(reference.window_logits(tree, batch), F.pad(batch[:, context:], (0, 1)))
            parts.append(log_probs.sum(1).cpu())
    scores[places_by_length(names, torch.device("cpu"))] = torch.cat(parts)
    return scores


def counted(method: Method, conv: ConvWaveNet) -> tuple[Tensor, list[int]]:
    """One run's log-likelihoods, and the nodes a layer that it evaluated; the tabulated ones of `shared` count 0."""
    if isinstance(method.run, SharedRun):
        with evaluated_nodes(method.run.scorer) as nodes:
            return method.run(0), nodes
    with CountingNodes(conv.config.n_hidden) as counting:
        return method.run(method.sizes[0]), counting.nodes


@contextmanager
def evaluated_nodes(scorer: Scorer) -> Iterator[list[int]]:
    """Inside the `with`, counts a layer the nodes that `scorer` evaluates: those that its numbering tells apart.

    Low layers that are tabulated, once for all names, count 0.
    """
    nodes, number = [0] * len(scorer.nodes.kernel_sizes), scorer.nodes.number

    def counting(*args: Any) -> Any:
        layers, *rest = number(*args)
        for layer, children in enumerate(layers, start=scorer.nodes.tabulated):
            nodes[layer] += len(children)
        return (layers, *rest)

    scorer.nodes.number = counting
    try:
        yield nodes
    finally:
        del scorer.nodes.number


# Times


def method_rows(
    args: argparse.Namespace,
    models: Models,
    methods: dict[str, Method],
    nodes: dict[str, list[int]],
    device: torch.device,
    progress: Progress,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Positions a second of every method at its best batch size, and of the peer."""
    best, samples = timed(args, methods, device, progress)
    peaks = peak_memory(args, methods, best, device, progress)
    rows = []
    for name, method in methods.items():
        positions = outputs(method.names)
        q1, median, q3 = quartiles(samples[name])
        row = {
            "method": name,
            "batch": best[name],
            "names": len(method.names),
            "positions": positions,
            "median_us": median,
            "q1_us": q1,
            "q3_us": q3,
            "positions_per_second": positions / median * 1e6,
            "q1_positions_per_second": positions / q3 * 1e6,
            "q3_positions_per_second": positions / q1 * 1e6,
            "calls": len(samples[name]),
            "peak_bytes": peaks[name],
        }
        if name in nodes:
            shared = name == "shared"
            config, of = models.conv.config, nodes[name]
            work = shared_multiply_adds(config, of) if shared else multiply_adds(models.conv, of, positions)
            row |= {"nodes": of, "multiply_adds_per_position": work / positions}
        rows.append(row)
    peer = {"method": PEER, "installed": TCN is not None}
    if TCN is None:
        return rows, peer | {"message": NOT_INSTALLED}
    model = Peer(models.conv.config)
    peer |= {"parameters": sum(p.numel() for p in model.parameters()), "receptive_field": model.receptive_field}
    return rows[:-1], peer | rows[-1]


def timed(
    args: argparse.Namespace, methods: dict[str, Method], device: torch.device, progress: Progress
) -> tuple[dict[str, int], dict[str, list[float]]]:
    """Every method's best batch size and its times in microseconds, the methods taking turns.

    `shared` is called three times a turn, being short.
    """
    rounds = 3 if args.quick else 9
    sizes = max(len(method.sizes) for method in methods.values())
    task = progress.add_task("methods", total=1 + sizes + rounds)

    def tick() -> None:
        progress.advance(task)

    def calls(of: dict[str, int]) -> dict[str, harness.Call]:
        return {name: lambda n=name, size=size: methods[n].run(size) for name, size in of.items()}

    # Every method once to warm up, then each at all its sizes.
    time_calls(calls({name: method.sizes[0] for name, method in methods.items()}), 1, device, block=1, tick=tick)
    tried: dict[str, dict[int, float]] = {name: {} for name in methods}
    for index in range(sizes):
        turn = {name: method.sizes[index] for name, method in methods.items() if index < len(method.sizes)}
        for name, times in time_calls(calls(turn), 1, device, block=1, tick=tick).items():
            tried[name][turn[name]] = times[0]
    best = {name: min(times, key=times.get) for name, times in tried.items()}
    turn = calls(best)
    again = {f"shared {index}": turn["shared"] for index in (2, 3)}
    samples = time_calls(turn | again, rounds, device, block=1, tick=tick)
    for name in again:
        samples["shared"] += samples.pop(name)
    return best, samples


# Memory


def peak_memory(
    args: argparse.Namespace,
    methods: dict[str, Method],
    best: dict[str, int],
    device: torch.device,
    progress: Progress,
) -> dict[str, int | None]:
    """The most bytes that one run of each method holds beyond the models and the list of names; None with `--quick`.

    On CUDA of the device's memory, tensors that the method is given not included; on the CPU of a process that makes
    those tensors and runs the method once, less a process that runs none, which is good to a few MiB.
    """
    if args.quick:
        return dict.fromkeys(methods)
    task, peaks = progress.add_task("memory", total=len(methods) + 1), {}
    if device.type == "cuda":
        for name, method in methods.items():
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            method.run(best[name])
            peaks[name] = torch.cuda.max_memory_allocated(device) - before
            progress.advance(task)
        return peaks
    for what in ["none:1", *(f"{name}:{best[name]}" for name in methods)]:
        options = ["--device", "cpu", "--names", str(Path(args.names).absolute()), "--seed", str(args.seed)]
        command = [sys.executable, "-m", "benchmarks.score", *options, "--peak", what]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
        if done.returncode:
            raise WaveNetConvError(f"measuring the memory of {what} failed: {done.stderr.strip()[-200:]}")
        peaks[what.partition(":")[0]] = int(done.stdout)
        progress.advance(task)
    nothing = peaks.pop("none")
    return {name: max(0, peak - nothing) for name, peak in peaks.items()}


def peak_here(args: argparse.Namespace, names: list[str], vocab: Vocabulary) -> int:
    """Runs the method of `--peak` once, or none, and gives the most bytes that this process has held."""
    name, _, size = args.peak.partition(":")
    device = torch.device("cpu")
    with torch.no_grad(), exact_float32():
        torch.manual_seed(args.seed)
        models = random_models(ARCHITECTURE, names, vocab, device)
        if name != "none":
            method_of(name, args, models, names, vocab, device).run(int(size))
    status = Path("/proc/self/status")  # Linux's ru_maxrss starts at the parent's, VmHWM does not
    lines = status.read_text().splitlines() if status.exists() else []
    peaks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peaks[0] if peaks else largest


# The distance to the limit


def copy_bandwidth(device: torch.device, *, quick: bool = False) -> float:
    """Bytes read and written a second while a large tensor is copied."""
    numbers = 2**28 if device.type == "cuda" else 2**24 if quick else 2**26
    source = torch.ones(numbers, device=device)
    target = torch.zeros_like(source)
    call = {"copy": lambda: target.copy_(source)}
    time_calls(call, 2, device, block=2)
    return 2 * source.nbytes / quartiles(time_calls(call, 10, device, block=10)["copy"])[1] * 1e6


def shared_multiply_adds(config: WaveNetConfig, nodes: Sequence[int]) -> int:
    """Multiply-adds for that many distinct nodes a layer.

    A node's are its products with each tap of its parents' layer, `kernel_size * channels * parent's channels`; on the last
    layer with the head, `channels * vocab`. Layers that are tabulated once for all count 0 nodes.
    """
    widths, kernel_sizes = config.n_hidden, config.kernel_sizes
    inner = [n * kernel_sizes[layer + 1] * widths[layer] * widths[layer + 1] for layer, n in enumerate(nodes[:-1])]
    return sum(inner) + nodes[-1] * widths[-1] * config.vocab_size


def shared_bytes(config: WaveNetConfig, nodes: Sequence[int], names: Sequence[str]) -> int:
    """The fewest bytes that go through memory for that many distinct nodes a layer, in float32:

        a node:     kernel_size * channels * 4  rows of contributions gathered
                    kernel_size * 8             numbers of its children
        inner node: parents' kernel_size * parents' channels * 4  contributions written
        last layer: 4                      a log-probability written; no logits
        a token:    1                      the encoded text, context tokens before each name among them
        an output:  8 + 4                  the number of its node, the log-probability read
        a name:     4                      its score

    Every gathered row counts as one from memory, though rows that are wanted often come from a cache; what the
    numbering itself moves does not count.
    """
    widths, kernel_sizes = config.n_hidden, config.kernel_sizes
    gathered = sum(n * kernel_size * (4 * width + 8) for n, kernel_size, width in zip(nodes, kernel_sizes, widths))
    inner = sum(4 * n * kernel_sizes[layer + 1] * widths[layer + 1] for layer, n in enumerate(nodes[:-1]))
    positions = outputs(names)
    tokens = positions + (config.context - 1) * len(names)
    return gathered + inner + 4 * nodes[-1] + tokens + 12 * positions + 4 * len(names)


def limit(
    rates: dict[str, float], config: WaveNetConfig, nodes: Sequence[int], names: Sequence[str], seconds: float
) -> dict[str, Any]:
    """The least time that this device's rates allow for these nodes, and the share of it in the time that was taken."""
    work, moved = shared_multiply_adds(config, nodes), shared_bytes(config, nodes, names)
    operations = work / rates["matmul_multiply_adds_per_second"]
    memory = moved / rates["copy_bytes_per_second"]
    return {
        "multiply_adds": work,
        "bytes": moved,
        "operations_floor_seconds": operations,
        "bytes_floor_seconds": memory,
        "seconds": seconds,
        "bound_by": "operations" if operations >= memory else "bytes",
        "share_of_floor": max(operations, memory) / seconds,
    }


# Growth


def growth_rows(
    args: argparse.Namespace,
    trained: Checkpoint,
    rates: dict[str, float],
    device: torch.device,
    progress: Progress,
) -> list[dict[str, Any]]:
    """The time a name with the default model, for the first 1,000, 10,000, ... of `--count` distinct names from it."""
    task = progress.add_task("sampling", total=args.count)
    names = distinct_names(trained, args.count, args.seed, device, tick=lambda n: progress.update(task, completed=n))
    scorer = Scorer(trained.model, trained.vocab, device=device, dtype=torch.float32)
    sizes = sorted({size for size in (10**power for power in range(3, 19)) if size < len(names)} | {len(names)})
    firsts = {size: names[:size] for size in sizes}
    few, rounds = [size for size in sizes if size <= FEW], 3 if args.quick else 7
    task = progress.add_task("growth", total=rounds + 2 * len(sizes) - len(few))
    nodes = {}
    for size in sizes:
        with evaluated_nodes(scorer) as nodes[size]:
            scorer.score(firsts[size])
        progress.advance(task)

    def timed_at(of: Sequence[int], calls: int) -> dict[int, list[float]]:
        scoring = {size: lambda size=size: scorer.score(firsts[size]) for size in of}
        return time_calls(scoring, calls, device, block=1, tick=lambda: progress.advance(task))

    samples = timed_at(few, rounds)
    for size in sizes[len(few) :]:
        samples |= timed_at([size], 1)
    rows = []
    for size in sizes:
        q1, median, q3 = quartiles(samples[size])
        positions, last = outputs(firsts[size]), nodes[size][-1]
        rows.append(
            {
                "names": size,
                "positions": positions,
                "calls": len(samples[size]),
                "us_per_name": median / size,
                "q1_us_per_name": q1 / size,
                "q3_us_per_name": q3 / size,
                "positions_per_second": positions / median * 1e6,
                "nodes": nodes[size],
                "windows_share": last / positions,
                "multiply_adds_per_position": shared_multiply_adds(trained.model.config, nodes[size]) / positions,
                "share_of_floor": limit(rates, trained.model.config, nodes[size], firsts[size], median / 1e6)[
                    "share_of_floor"
                ],
            }
        )
    return rows


def distinct_names(
    trained: Checkpoint,
    count: int,
    seed: int,
    device: torch.device,
    tick: Callable[[int], Any] | None = None,
) -> list[str]:
    """`count` distinct names from the model in the order in which they were drawn, repeats and empty ones left out.

    The first n of them do not depend on `count`. `tick` is called with how many there are.
    """
    drawn = sample_stream(trained.model, trained.vocab, max_length=LONGEST, seed=seed, device=device)
    names: dict[str, None] = {}
    while len(names) < count:
        names.update(dict.fromkeys(islice(drawn, SAMPLED)))
        names.pop("", None)
        if tick is not None:
            tick(min(count, len(names)))
    return list(islice(names, count))


# Tables


def print_tables(results: dict[str, Any]) -> None:
    """The results on stdout, as tables that are Markdown too."""
    console = Console(width=400, highlight=False, soft_wrap=True)  # a table that wraps is no Markdown
    model, names, equal = results["model"], results["names"], results["equality"]
    differences = ", ".join(f"{name} {difference:.2g}" for name, difference in equal["max_abs_diffs"].items())
    console.print(
        f"{results['device']}, PyTorch {results['torch']}, {results['dtype']}; kernel sizes {model['kernel_sizes']}, "
        f"embedding {model['n_embd']}, hidden {model['n_hidden']}, {model['parameters']:,} parameters.",
        f"{'Equal' if equal['equal'] else 'NOT EQUAL'} to the float64 tree in the log-likelihoods of {names['used']:,} "
        f"names, {names['positions']:,} positions, to {equal['tolerance']:g}; largest differences: {differences}.",
        sep="\n",
    )
    if equal["equal"]:
        for title, table, remark in (methods_table(results), peer_table(results), growth_table(results)):
            console.print("", title, table, remark, sep="\n")


def rate(row: dict[str, Any]) -> tuple[str, str]:
    """Positions a second, and their quartiles."""
    low, high = row["q1_positions_per_second"], row["q3_positions_per_second"]
    return f"{row['positions_per_second']:,.0f}", f"{low:,.0f} to {high:,.0f}"


def mebibytes(count: int | None) -> str:
    """Bytes in words; a dash where they were not measured."""
    return "-" if count is None else f"{count / 2**20:,.0f} MiB"


def methods_table(results: dict[str, Any]) -> tuple[str, Table, str]:
    """Every method on the list, and how far the shared nodes are from the limit."""
    rows, limits = {row["method"]: row for row in results["methods"]}, results["limits"]
    table = table_of(
        *("method", "batch", "positions/s", "quartiles", "x windows", "x loop", "multiply-adds a position"),
        *("nodes a layer", "peak memory"),
    )
    for name, row in rows.items():
        times = [f"{row['positions_per_second'] / rows[of]['positions_per_second']:.2f}" for of in ("windows", "loop")]
        work, memory = f"{row['multiply_adds_per_position']:,.0f}", mebibytes(row["peak_bytes"])
        batch = "all" if name == "shared" else f"{row['batch']:,}"
        table.add_row(name, batch, *rate(row), *times, work, counts(row["nodes"]), memory)
    operations, memory = limits["operations_floor_seconds"], limits["bytes_floor_seconds"]
    remark = (
        f"The loop ran on {rows['loop']['names']:,} of the names. shared starts at a list of strings, the others at "
        f"tensors of tokens. Distinct nodes: {counts(results['distinct_nodes'])}; shared tabulates the layers "
        f"that show 0.\n"
        f"Limits: {limits['matmul_multiply_adds_per_second'] / 1e9:,.0f} billion multiply-adds a second in a matrix "
        f"product, {limits['copy_bytes_per_second'] / 1e9:,.1f} GB a second in a copy. shared took "
        f"{limits['seconds'] * 1e3:.1f} ms; its multiply-adds alone need {operations * 1e3:.1f} ms and its bytes "
        f"{memory * 1e3:.1f} ms, so it reaches {limits['share_of_floor']:.0%} of the larger floor "
        f"({limits['bound_by']})."
    )
    return f"The list, {results['names']['used']:,} names, {results['names']['positions']:,} positions", table, remark


def peer_table(results: dict[str, Any]) -> tuple[str, Table, str]:
    """The installed peer beside the shared nodes."""
    peer, model = results["peer"], results["model"]
    shared = next(row for row in results["methods"] if row["method"] == "shared")
    table = table_of(
        *("method", "parameters", "receptive field", "batch", "positions/s", "quartiles", "shared is faster by"),
        "peak memory",
    )
    table.add_row(
        *("shared", f"{model['parameters']:,}", str(model["context"]), "all", *rate(shared), "1.00"),
        mebibytes(shared["peak_bytes"]),
    )
    if peer["installed"]:
        faster = f"{shared['positions_per_second'] / peer['positions_per_second']:.2f}"
        sizes = (f"{peer['parameters']:,}", str(peer["receptive_field"]), f"{peer['batch']:,}")
        table.add_row(PEER, *sizes, *rate(peer), faster, mebibytes(peer["peak_bytes"]))
    else:
        table.add_row(PEER, peer["message"], *["-"] * 6)
    remark = (
        "pytorch-tcn computes another function: it pads activations with zeros, and each block holds two convolutions."
    )
    return "The peer, same names, embedding, widths, dilations and kernel size", table, remark


def growth_table(results: dict[str, Any]) -> tuple[str, Table, str]:
    """The time a name as the names grow in number."""
    table = table_of(
        *("distinct names", "us a name", "quartiles", "positions/s", "windows evaluated", "multiply-adds a position"),
        *("nodes a layer", "share of the larger floor"),
    )
    for row in results["growth"]:
        table.add_row(
            f"{row['names']:,}",
            f"{row['us_per_name']:.3f}",
            f"{row['q1_us_per_name']:.3f} to {row['q3_us_per_name']:.3f}",
            f"{row['positions_per_second']:,.0f}",
            f"{row['windows_share']:.1%}",
            f"{row['multiply_adds_per_position']:,.0f}",
            counts(row["nodes"]),
            f"{row['share_of_floor']:.0%}",
        )
    remark = (
        f"Windows evaluated: of all positions; those near a name's start and the nodes below are shared in the whole "
        f"stream, up to a bound, other windows at most inside a chunk of {CHUNK_NAMES:,} names. "
        f"Names sampled from the default model, cut at {LONGEST} characters, repeats removed."
    )
    return "Growth with the number of distinct names, Scorer.score with the default model", table, remark


if __name__ == "__main__":
    sys.exit(main())
