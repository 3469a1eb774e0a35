"""Does sliding reuse the nodes that the loop recomputes, and what is that worth?

Equality comes first: models that differ end the run with exit code 1 and no timings. Then nodes, counted while the
models run; time for one name; time for the whole list; growth with the context. float32 throughout, IEEE also on CUDA.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import reference
from benchmarks import harness
from benchmarks.counting import CountingNodes, distinct_nodes, multiply_adds
from benchmarks.harness import UsageError, quartiles, time_calls
from wavenet_conv import (
    ConvWaveNet,
    Vocabulary,
    WaveNetConvError,
    exact_float32,
    fold_batch_norm,
    from_tree,
    verify,
)
from wavenet_conv.equivalence import TOLERANCE
from wavenet_conv.names import read_names

GROWTH_TOKENS = 4096
GROWTH_LAYERS = range(3, 11)  # contexts 8, 16, ... 1024
WINDOW_BATCHES = {"cpu": (256, 512, 1024, 2048, 4096, 8192), "cuda": (4096, 8192, 16384, 32768, 65536, 131072)}
NAME_BATCHES = {"cpu": (64, 128, 256, 512, 1024, 2048), "cuda": (512, 1024, 2048, 4096, 8192, 16384)}  # of one length
GROWTH_BATCHES = {"cpu": (2**12, 2**14, 2**16), "cuda": (2**16, 2**18, 2**20)}  # tokens in the windows of one call


class Models(NamedTuple):
    """The same weights four times."""

    tree: reference.Sequential
    folded_tree: reference.Sequential
    conv: ConvWaveNet
    folded: ConvWaveNet


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code: 1 where the models differ, 2 for wrong usage."""
    args = parse(arguments)
    try:
        device, names = harness.pick_device(args.device), read_names(args.names)
        vocab = Vocabulary.from_names(names)
        harness.check_writable(args.json)
        check_name(args.name, vocab)
    except WaveNetConvError as error:
        print(f"benchmarks.slide: {error}", file=sys.stderr)
        return 2
    try:
        with harness.progress_bar() as progress, torch.no_grad(), exact_float32():
            results = run(args, device, names, vocab, progress)
    except WaveNetConvError as error:
        print(f"benchmarks.slide: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return harness.report(results, args.json, print_tables)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; argparse leaves with exit code 2 for what it cannot read."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slide", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--names", metavar="FILE", default=str(harness.NAMES), help="one name a line (names.txt)")
    parser.add_argument("--name", default="analisa", help="the name that one pass is timed on (analisa)")
    parser.add_argument("--n-embd", type=positive, default=24, help="width of the embedding (24)")
    parser.add_argument("--n-hidden", type=positive, default=128, help="width of every layer (128)")
    parser.add_argument(
        "--kernel-sizes", type=kernel_sizes, default=(2, 2, 2), help="nodes that each layer fuses (2,2,2)"
    )
    parser.add_argument("--repeats", type=positive, help="calls timed for one name (2000; with --quick 400)")
    parser.add_argument("--seed", type=int, default=42, help="of the random weights (42)")
    parser.add_argument("--json", metavar="FILE|-", help="write the results as JSON; - prints it instead of the tables")
    parser.add_argument("--quick", action="store_true", help="every tenth name and few repeats: under 20 seconds")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def kernel_sizes(text: str) -> tuple[int, ...]:
    """Kernel sizes such as 2,2,2."""
    return tuple(positive(part) for part in text.split(","))


def check_name(name: str, vocab: Vocabulary) -> None:
    """Refuses a `--name` with characters that `--names` has none of; raises `UsageError`."""
    unknown = [character for character in name if character not in vocab.characters]
    if unknown:
        raise UsageError(f"--name {name}: the list of names has no character {unknown[0]!r}; name another with --name")


def run(
    args: argparse.Namespace, device: torch.device, every_name: list[str], vocab: Vocabulary, progress: Progress
) -> dict[str, Any]:
    """All results, as they stand in the JSON; where the models differ, nothing after the equality."""
    names = every_name[::10] if args.quick else every_name
    torch.manual_seed(args.seed)
    models = random_models(args, names, vocab, device)
    context = models.conv.context
    one_name = vocab.encode([args.name], context=context)[0].to(device)
    results: dict[str, Any] = {
        "device": harness.machine(device),
        "torch": torch.__version__,
        "dtype": "float32",
        "model": {
            "kernel_sizes": list(args.kernel_sizes),
            "context": context,
            "n_embd": args.n_embd,
            "n_hidden": args.n_hidden,
            "vocab_size": len(vocab),
            "parameters": sum(p.numel() for p in models.tree.parameters()),
            "seed": args.seed,
        },
        "names": {"file": Path(args.names).name, "used": len(names), "of": len(every_name), "one_name": args.name},
        "equality": equality(models, names, vocab, progress),
    }
    if not results["equality"]["equal"]:
        return results
    by_length = sequences_by_length(names, vocab, context, device)
    results["distinct_nodes"] = {
        "one_name": distinct_nodes([one_name], args.kernel_sizes),
        "whole_list": distinct_nodes(by_length, args.kernel_sizes),
    }
    results["matmul_multiply_adds_per_second"] = harness.matmul_rate(device)
    results["one_name"] = one_name_rows(models, one_name, args, progress)
    results["whole_list"] = whole_list_rows(models, by_length, args, progress)
    layers = progress.track(GROWTH_LAYERS, description="growth")
    results["growth"] = [growth_row(level_count, args, device) for level_count in layers]
    differences = [results["equality"]["max_abs_diff"]] + [row["max_abs_diff"] for row in results["growth"]]
    results["equality"]["equal"] = all(difference <= TOLERANCE[torch.float32] for difference in differences)
    return results


def random_models(args: argparse.Namespace, names: list[str], vocab: Vocabulary, device: torch.device) -> Models:
    """Random weights, and the batch statistics of the names' own windows."""
    tree = reference.build(args.kernel_sizes, vocab_size=len(vocab), n_embd=args.n_embd, n_hidden=args.n_hidden)
    for _ in range(20):
        sample = [names[i] for i in torch.randint(len(names), (64,))]
        reference.window_logits(tree, vocab.encode(sample, context=reference.context_of(tree))[0])
    conv = from_tree(tree.eval().to(device))
    folded = fold_batch_norm(conv)
    return Models(tree, reference.from_conv(folded), conv, folded)


def equality(models: Models, names: list[str], vocab: Vocabulary, progress: Progress) -> dict[str, Any]:
    """Both slid models against the tree, at every position of every name."""
    task = progress.add_task("equality", total=2 * len(names))
    reports = [
        verify(models.tree, slid, names, vocab, on_progress=lambda n: progress.advance(task, n))
        for slid in (models.conv, models.folded)
    ]
    worst = max(reports, key=lambda report: report.max_abs_diff)
    return {
        "equal": all(report.equal for report in reports),
        "positions": worst.positions,
        "max_abs_diff": worst.max_abs_diff,
        "tolerance": worst.tolerance,
        "worst": worst.worst,
        "argmax_differences": max(report.argmax_differences for report in reports),
    }


def sequences_by_length(names: list[str], vocab: Vocabulary, context: int, device: torch.device) -> list[Tensor]:
    """Tokens `(names, context + length)` for every length that there is, so that nothing is padded behind a name."""
    by_length: dict[int, list[str]] = {}
    for name in names:
        by_length.setdefault(len(name), []).append(name)
    return [vocab.encode(by_length[length], context=context)[0].to(device) for length in sorted(by_length)]


def one_name_rows(models: Models, tokens: Tensor, args: argparse.Namespace, progress: Progress) -> list[dict[str, Any]]:
    """Every method on one name: nodes, launches and microseconds."""
    methods: dict[str, harness.Call] = {
        "loop": lambda: reference.loop_logits(models.tree, tokens),
        "windows": lambda: reference.window_logits(models.tree, tokens),
        "windows_folded": lambda: reference.window_logits(models.folded_tree, tokens),
        "slid_conv1d": lambda: models.conv.forward_conv1d(tokens),
        "slid_unfolded": lambda: models.conv(tokens),
        "slid": lambda: models.folded(tokens),
    }
    nodes = {method: nodes_of(call, models.conv) for method, call in methods.items()}
    if tokens.is_cuda:
        methods["slid_graph"], nodes["slid_graph"] = captured(models.folded, tokens)
    launches = {method: harness.count_launches(call, tokens.device) for method, call in methods.items()}
    time_calls(methods, 40, tokens.device)
    calls = args.repeats or (400 if args.quick else 2000)
    task = progress.add_task("one name", total=-(-calls // 20))
    samples = time_calls(methods, calls, tokens.device, tick=lambda: progress.advance(task))
    rows = []
    for method, times in samples.items():
        q1, median, q3 = quartiles(times)
        rows.append({"method": method, "nodes": nodes[method], "launches": launches[method]})
        rows[-1] |= {"median_us": median, "q1_us": q1, "q3_us": q3}
    return rows


def nodes_of(call: harness.Call, conv: ConvWaveNet) -> list[int]:
    """Nodes a layer that one call computes, counted while it runs."""
    with CountingNodes(conv.config.n_hidden) as counted:
        call()
    return counted.nodes


def captured(conv: ConvWaveNet, tokens: Tensor) -> tuple[harness.Call, list[int]]:
    """The convolutional pass as a CUDA graph, copying in the tokens included, and the nodes counted while it was captured."""
    static = tokens.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # PyTorch asks for a warm-up away from the default stream
        for _ in range(3):
            conv(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with CountingNodes(conv.config.n_hidden) as counted, torch.cuda.graph(graph):
        logits = conv(static)

    def replay() -> Tensor:
        static.copy_(tokens)
        graph.replay()
        return logits

    difference = float((replay() - conv(tokens)).abs().max())
    if not difference <= TOLERANCE[torch.float32]:
        raise WaveNetConvError(f"the replayed graph differs by {difference:g} from the pass that it was captured from")
    return replay, counted.nodes


def whole_list_rows(
    models: Models, by_length: list[Tensor], args: argparse.Namespace, progress: Progress
) -> list[dict[str, Any]]:
    """Positions a second over all names, every batched method at the best of several batch sizes.

    The loop runs on a sample of the names, which its row counts.
    """
    context, device = models.conv.context, by_length[0].device
    windows = torch.cat([reference.windows(tokens, context).reshape(-1, context) for tokens in by_length])
    every_name = [name[None] for tokens in by_length for name in tokens]
    sample = every_name[:: max(1, len(every_name) // (50 if args.quick else 300))]

    def over(model: Callable[[Tensor], Any], tensors: list[Tensor], size: int) -> harness.Call:
        return lambda: [model(batch) for tensor in tensors for batch in tensor.split(size)] and None

    window_sizes, name_sizes = WINDOW_BATCHES[device.type], NAME_BATCHES[device.type]
    batched = {
        "windows": (models.tree, [windows], window_sizes),
        "windows_folded": (models.folded_tree, [windows], window_sizes),
        "slid_conv1d": (models.conv.forward_conv1d, by_length, name_sizes),
        "slid_unfolded": (models.conv, by_length, name_sizes),
        "slid": (models.folded, by_length, name_sizes),
    }
    tries_a_size, rounds = (1, 3) if args.quick else (3, 7)
    task = progress.add_task("whole list", total=len(window_sizes) * tries_a_size + 2 + rounds)

    def tick() -> None:
        progress.advance(task)

    # Every size once to warm up, then all methods in turn at each size.
    tries = {
        index: {method: over(model, tensors, sizes[index]) for method, (model, tensors, sizes) in batched.items()}
        for index in range(len(window_sizes))
    }
    time_calls(tries[0], 1, device, block=1, tick=tick)
    times = {index: time_calls(calls, tries_a_size, device, block=1, tick=tick) for index, calls in tries.items()}
    best = {method: min(times, key=lambda index, m=method: quartiles(times[index][m])[1]) for method in batched}
    methods = {"loop": over(lambda tokens: reference.loop_logits(models.tree, tokens), sample, 1)}
    methods |= {method: tries[index][method] for method, index in best.items()}
    nodes = {method: nodes_of(call, models.conv) for method, call in methods.items()}
    tick()
    rows = []
    for method, times in time_calls(methods, rounds, device, block=1, tick=tick).items():
        names = sample if method == "loop" else every_name
        positions = sum(name.shape[1] - context + 1 for name in names)
        q1, median, q3 = quartiles(times)
        work = multiply_adds(models.conv, nodes[method], positions)
        rows.append(
            {
                "method": method,
                "batch": 1 if method == "loop" else batched[method][2][best[method]],
                "names": len(names),
                "positions": positions,
                "nodes": nodes[method],
                "positions_per_second": positions / median * 1e6,
                "q1_positions_per_second": positions / q3 * 1e6,
                "q3_positions_per_second": positions / q1 * 1e6,
                "multiply_adds_per_position": work / positions,
                "multiply_adds_per_second": work / median * 1e6,
            }
        )
    return rows


def growth_row(level_count: int, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Windows against the convolutional pass at context `2 ** level_count`, kernel sizes of 2, on one long random sequence.

    Both with batch norm folded, the windows at the best of several batch sizes. With `--quick` the windows are a sample
    of all positions, which the row counts.
    """
    tree = reference.build((2,) * level_count, n_embd=args.n_embd, n_hidden=args.n_hidden).eval().to(device)
    folded = fold_batch_norm(from_tree(tree))
    folded_tree = reference.from_conv(folded)
    context = folded.context
    tokens = torch.randint(1, 27, (1, GROWTH_TOKENS), device=device)
    positions = GROWTH_TOKENS - context + 1
    stride = max(1, positions * context // 2**16) if args.quick else 1
    windows = reference.windows(tokens, context)[0, ::stride].contiguous()
    sizes = {max(1, size // context) for size in GROWTH_BATCHES[device.type]}
    over = {size: lambda size=size: torch.cat([folded_tree(batch) for batch in windows.split(size)]) for size in sizes}
    tried = time_calls(over, 1, device, block=1)
    calls = {"windows": over[min(tried, key=lambda size: tried[size][0])], "slid": lambda: folded(tokens)[0]}
    logits = {method: call() for method, call in calls.items()}
    nodes = {method: nodes_of(call, folded) for method, call in calls.items()}
    samples = time_calls(calls, 3 if args.quick else 5, device, block=1)
    rows = {}
    for method, times in samples.items():
        of = len(logits[method])
        q1, median, q3 = (time / of for time in quartiles(times))
        rows[method] = {"method": method, "positions": of, "nodes": nodes[method]}
        rows[method] |= {"median_us_per_position": median, "q1_us_per_position": q1, "q3_us_per_position": q3}
    nodes_per_position = {method: sum(row["nodes"]) / row["positions"] for method, row in rows.items()}
    return {
        "context": context,
        "layers": level_count,
        "max_abs_diff": float((logits["windows"] - logits["slid"][::stride]).abs().max()),
        "theory_node_ratio": (context - 1) / level_count,
        "node_ratio": nodes_per_position["windows"] / nodes_per_position["slid"],
        "time_ratio": rows["windows"]["median_us_per_position"] / rows["slid"]["median_us_per_position"],
        "methods": list(rows.values()),
    }


def print_tables(results: dict[str, Any]) -> None:
    """The results on stdout, as tables that are Markdown too."""
    console = Console(width=200, highlight=False, soft_wrap=True)  # a table that wraps is no Markdown
    model, names, equal = results["model"], results["names"], results["equality"]
    console.print(
        f"{results['device']}, PyTorch {results['torch']}, {results['dtype']}; kernel sizes {model['kernel_sizes']}, "
        f"embedding {model['n_embd']}, hidden {model['n_hidden']}, {model['parameters']:,} parameters.",
        f"{'Equal' if equal['equal'] else 'NOT EQUAL'} at all {equal['positions']:,} positions of {names['used']:,} "
        f"names: largest difference {equal['max_abs_diff']:.2g}, tolerance {equal['tolerance']:g}.",
        sep="\n",
    )
    if equal["equal"]:
        for title, table, remark in (one_name_table(results), whole_list_table(results), growth_table(results)):
            console.print("", title, table, remark, sep="\n")


def table_of(*columns: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table(box=box.MARKDOWN)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def counts(nodes: Sequence[int]) -> str:
    """Nodes a layer, lowest first."""
    return " ".join(f"{n:,}" for n in nodes)


def one_name_table(results: dict[str, Any]) -> tuple[str, Table, str]:
    """Nodes, launches and times for one name."""
    name, rows = results["names"]["one_name"], results["one_name"]
    median = {row["method"]: row["median_us"] for row in rows}
    launched = "kernels" if any(row["method"] == "slid_graph" for row in rows) else "operators"
    table = table_of("method", "nodes a layer", launched, "median us", "quartiles", "x loop", "x windows")
    for row in rows:
        table.add_row(
            row["method"],
            counts(row["nodes"]),
            str(row["launches"]),
            f"{row['median_us']:.1f}",
            f"{row['q1_us']:.1f} to {row['q3_us']:.1f}",
            f"{median['loop'] / row['median_us']:.2f}",
            f"{median['windows'] / row['median_us']:.2f}",
        )
    remark = (
        f"Distinct nodes: {counts(results['distinct_nodes']['one_name'])}. slid has batch norm folded into its "
        f"convolutions; windows_folded is the tree with the same folding, its fairest rival."
    )
    return f"One name, {name!r}, {len(name) + 1} positions", table, remark


def whole_list_table(results: dict[str, Any]) -> tuple[str, Table, str]:
    """Positions a second and multiply-adds a position over the whole list."""
    rows = {row["method"]: row for row in results["whole_list"]}
    ceiling, windows, slid = results["matmul_multiply_adds_per_second"], rows["windows"], rows["slid"]
    table = table_of(
        *("method", "batch", "nodes a layer", "positions/s", "quartiles", "x windows"),
        *("multiply-adds a position", "share of matmul rate"),
    )
    for method, row in rows.items():
        table.add_row(
            method,
            f"{row['batch']:,}",
            counts(row["nodes"]),
            f"{row['positions_per_second']:,.0f}",
            f"{row['q1_positions_per_second']:,.0f} to {row['q3_positions_per_second']:,.0f}",
            f"{row['positions_per_second'] / windows['positions_per_second']:.2f}",
            f"{row['multiply_adds_per_position']:,.0f}",
            f"{row['multiply_adds_per_second'] / ceiling:.0%}",
        )
    fewer = windows["multiply_adds_per_position"] / slid["multiply_adds_per_position"]
    remark = (
        f"The loop ran on {rows['loop']['names']} of the names. Distinct nodes: "
        f"{counts(results['distinct_nodes']['whole_list'])}. On short names the padding before each is most of the "
        f"convolutional pass's work: it does only {fewer:.2f} times fewer multiply-adds than the windows. "
        f"Matmul rate: {ceiling / 1e9:.0f} billion multiply-adds a second."
    )
    return f"The whole list, {windows['names']:,} names, {windows['positions']:,} positions", table, remark


def growth_table(results: dict[str, Any]) -> tuple[str, Table, str]:
    """Nodes and times a position as the context grows."""
    table = table_of(
        *("context", "windows: nodes a position", "us a position", "slid: nodes a position", "us a position"),
        *("node ratio", "(context - 1) / layers", "time ratio", "largest difference"),
    )
    for row in results["growth"]:
        cells = [str(row["context"])]
        for method in row["methods"]:
            cells += [f"{sum(method['nodes']) / method['positions']:,.1f}", f"{method['median_us_per_position']:,.2f}"]
        cells += [f"{row['node_ratio']:.2f}", f"{row['theory_node_ratio']:.2f}", f"{row['time_ratio']:.1f}"]
        table.add_row(*cells, f"{row['max_abs_diff']:.1g}")
    remark = (
        f"Node ratio: windows over slid, counted; a sequence of {GROWTH_TOKENS:,} tokens is finite, so it stays "
        f"below its limit, (context - 1) / layers. Both with batch norm folded."
    )
    return f"Growth with the context, kernel sizes of 2, a sequence of {GROWTH_TOKENS:,} tokens", table, remark


if __name__ == "__main__":
    sys.exit(main())
