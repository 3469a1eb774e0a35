"""Does the convolutional pass reuse the nodes that the loop recomputes, and what is that worth?

Equality comes first: models that differ end the run with exit code 1 and no timings. Then nodes, counted while the
models run; time for one name; time for the whole list; growth with the context. float32 throughout, IEEE also on CUDA.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import reference
from benchmarks import harness
from benchmarks.counting import distinct_nodes, nodes_of
from benchmarks.harness import Benchmark, Call, Results, Session, UsageError, positive, spread, time_calls
from benchmarks.methods import METHODS, Models, OnList, list_rows, parameters, random_models
from benchmarks.tables import Row, Table, text
from wavenet_conv import WaveNetConvError, verify
from wavenet_conv.equivalence import TOLERANCE

COMPARED = ("loop", "windows", "windows_folded", "slid_conv1d", "slid")
GROWTH_TOKENS = 4096
GROWTH_LAYERS = range(3, 11)  # contexts 8, 16, ... 1024
WINDOW_TOKENS = {"cpu": (2**12, 2**14, 2**16), "cuda": (2**16, 2**18, 2**20)}  # tokens in the windows of one call


def add_options(parser: argparse.ArgumentParser) -> None:
    """The model and the one name."""
    parser.add_argument("--name", default="analisa", help="the name that one pass is timed on (analisa)")
    parser.add_argument("--n-embd", type=positive, default=24, help="width of the embedding (24)")
    parser.add_argument("--n-hidden", type=positive, default=128, help="width of every layer (128)")
    parser.add_argument("--kernel-sizes", type=kernel_sizes, default=(2, 2, 2), help="nodes that layers fuse (2,2,2)")


def kernel_sizes(text: str) -> tuple[int, ...]:
    """Kernel sizes such as 2,2,2."""
    return tuple(map(positive, text.split(",")))


def check_name(session: Session) -> None:
    """Rejects a `--name` with a character that the list has none of."""
    for character in set(session.args.name) - set(session.vocab.characters):
        raise UsageError(
            f"--name {session.args.name}: the list of names has no character {character!r}; name another with --name"
        )


def run(session: Session) -> Results:
    """All results; where the models differ, nothing after the equality."""
    args, names = session.args, session.names[:: session.pick(5, 1)]
    sizes = {name: getattr(args, name) for name in ("kernel_sizes", "n_embd", "n_hidden")}
    models = random_models(names, session, **sizes)
    results: Results = {
        "model": {**sizes, "kernel_sizes": list(args.kernel_sizes), "context": models.context}
        | {"vocab_size": len(session.vocab), "parameters": parameters(models.tree), "seed": args.seed},
        "names": {"file": Path(args.names).name, "used": len(names), "of": len(session.names), "one_name": args.name},
        "equality": equality(models, names, session),
    }
    if not results["equality"]["equal"]:
        return results
    lists = {"one_name": [args.name], "whole_list": names}
    results["distinct_nodes"] = {key: distinct_nodes(part, args.kernel_sizes) for key, part in lists.items()}
    results["matmul_multiply_adds_per_second"] = harness.matmul_rate(session.device)
    results["one_name"] = one_name_rows(models, session)
    on_list = {name: OnList(name, models, names, session.pick(50, 300)) for name in COMPARED}
    nodes = {name: method.counted(method.logits)[1] for name, method in on_list.items()}
    results["whole_list"] = list_rows(on_list, "logits", nodes, models, session)
    layers = session.progress.track(GROWTH_LAYERS, description="growth")
    results["growth"] = [growth_row(layer_count, session) for layer_count in layers]
    within = (row["max_abs_diff"] <= TOLERANCE[torch.float32] for row in results["growth"])
    results["equality"]["equal"] = all(within)
    return results


def equality(models: Models, names: Sequence[str], session: Session) -> Results:
    """Both convolutional models against the tree, at every position of every name."""
    task = session.progress.add_task("equality", total=2 * len(names))
    reports = [
        verify(models.tree, slid, names, session.vocab, on_progress=lambda n: session.progress.advance(task, n))
        for slid in (models.conv, models.folded)
    ]
    worst = max(reports, key=lambda report: report.max_abs_diff)
    return {name: getattr(worst, name) for name in ("positions", "max_abs_diff", "tolerance")} | {
        "worst": list(worst.worst),
        "equal": all(report.equal for report in reports),
        "argmax_differences": max(report.argmax_differences for report in reports),
    }


def one_name_rows(models: Models, session: Session) -> list[Row]:
    """Every method on one name: nodes, launches and microseconds.

    On CUDA the graph is captured after the others have been profiled and timed, since a profiler that starts for the
    first time after a capture crashes in some versions. Its replays take turns with the pass that was captured.
    """
    device, calls = session.device, session.pick(400, 2000)
    tokens = session.vocab.encode([session.args.name], context=models.context)[0].to(device)
    methods: dict[str, Call] = {name: partial(METHODS[name].on_names(models), tokens) for name in COMPARED}
    nodes = {name: nodes_of(call, models.conv.config) for name, call in methods.items()}
    launches = {name: harness.count_launches(call, device) for name, call in methods.items()}
    time_calls(methods, 40, device)
    samples = time_calls(methods, calls, device, tick=session.ticks("one name", -(-calls // 20)))
    if device.type == "cuda":
        replay, nodes["slid_graph"] = captured(models, tokens)
        turns: dict[str, Call] = {"slid": methods["slid"], "slid_graph": replay}
        time_calls(turns, 40, device)
        samples["slid_graph"] = time_calls(turns, calls, device)["slid_graph"]
        launches["slid_graph"] = harness.count_launches(replay, device)
    return [{"method": m, "nodes": nodes[m], "launches": launches[m], **spread("us", samples[m])} for m in samples]


def captured(models: Models, tokens: Tensor) -> tuple[Call, list[int]]:
    """The convolutional pass as a CUDA graph, which copies the tokens in, and the nodes counted during the capture."""
    static, side = tokens.clone(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # PyTorch asks for a warm-up away from the default stream
        for _ in range(3):
            models.folded(static)
    torch.cuda.current_stream().wait_stream(side)
    graph, logits = torch.cuda.CUDAGraph(), []

    def capture() -> None:
        with torch.cuda.graph(graph):
            logits.append(models.folded(static))

    def replay() -> Tensor:
        static.copy_(tokens)
        graph.replay()
        return logits[0]

    nodes = nodes_of(capture, models.conv.config)
    difference = float((replay() - models.folded(tokens)).abs().max())
    if not difference <= TOLERANCE[torch.float32]:
        raise WaveNetConvError(f"the replayed graph differs by {difference:g} from the pass that it was captured from")
    return replay, nodes


def growth_row(layers: int, session: Session) -> Row:
    """Windows against the convolutional pass at context `2 ** layers`, kernel sizes of 2, on one long random sequence.

    Both with batch norm folded, the windows at the best of several batch sizes. Without `--full` the windows are a
    sample of all positions, which the row counts.
    """
    args, device = session.args, session.device
    tree = reference.build((2,) * layers, n_embd=args.n_embd, n_hidden=args.n_hidden).eval().to(device)
    models = Models(tree, session.vocab)
    context, tokens = models.context, torch.randint(1, 27, (1, GROWTH_TOKENS), device=device)
    stride = session.pick(max(1, (GROWTH_TOKENS - context + 1) * context // 2**16), 1)
    windows = reference.windows(tokens, context)[0, ::stride].contiguous()
    sizes = {max(1, size // context) for size in WINDOW_TOKENS[device.type]}

    def by_windows(size: int) -> Tensor:
        return torch.cat([models.folded_tree(batch) for batch in windows.split(size)])

    over: dict[int, Call] = {size: partial(by_windows, size) for size in sizes}
    tried = time_calls(over, 1, device, block=1)
    calls: dict[str, Call] = {"windows": over[min(tried, key=lambda size: tried[size])]}
    calls["slid"] = lambda: models.folded(tokens)[0]
    logits = {method: call() for method, call in calls.items()}
    rows = []
    for method, samples in time_calls(calls, session.pick(3, 5), device, block=1).items():
        row = {"method": method, "positions": len(logits[method]), "nodes": nodes_of(calls[method], models.conv.config)}
        rows.append(row | spread("us_per_position", [us / row["positions"] for us in samples]))
    return {
        "context": context,
        "layers": layers,
        "max_abs_diff": float((logits["windows"] - logits["slid"][::stride]).abs().max()),
        "theory_node_ratio": (context - 1) / layers,
        "node_ratio": nodes_per_position(rows[0]) / nodes_per_position(rows[1]),
        "time_ratio": rows[0]["us_per_position"] / rows[1]["us_per_position"],
        "methods": rows,
    }


def nodes_per_position(row: Row) -> float:
    """Nodes of all layers, counted while the method ran."""
    return sum(row["nodes"]) / row["positions"]


def tables(results: Results) -> Iterator[Table]:
    """What is printed."""
    names, distinct = results["names"], results["distinct_nodes"]
    launches = "kernels" if any(row["method"] == "slid_graph" for row in results["one_name"]) else "operators"
    yield Table(
        f"One name, {names['one_name']!r}, {len(names['one_name']) + 1} positions",
        f"method; nodes per layer=nodes ,; {launches}=launches; median us=us .1f; quartiles=~us .1f; "
        "x loop=us/loop .2f; x windows=us/windows .2f",
        results["one_name"],
        f"Distinct nodes: {text(distinct['one_name'], ',')}. slid has batch norm folded into its convolutions; "
        f"windows_folded is the tree with the same folding, its strongest rival.",
    )
    rate, rows = results["matmul_multiply_adds_per_second"], results["whole_list"]
    loop, windows, slid = (next(row for row in rows if row["method"] == m) for m in ("loop", "windows", "slid"))
    fewer = windows["multiply_adds_per_position"] / slid["multiply_adds_per_position"]
    yield Table(
        f"The whole list, {windows['names']:,} names, {windows['positions']:,} positions",
        "method; batch=batch ,; nodes per layer=nodes ,; positions/s=positions_per_second ,.0f; "
        "quartiles=~positions_per_second ,.0f; x windows=positions_per_second/windows .2f; "
        "multiply-adds per position=multiply_adds_per_position ,.0f; share of matmul rate=share .0%",
        [row | {"share": row["multiply_adds_per_second"] / rate} for row in rows],
        f"The loop ran on {loop['names']} of the names. Distinct nodes: {text(distinct['whole_list'], ',')}. On short "
        f"names most of the convolutional pass's work is the padding before each name: it does only {fewer:.2f} times "
        f"fewer multiply-adds than the windows. Matmul rate: {rate / 1e9:.0f} billion multiply-adds per second.",
    )
    growth = [row | {part["method"]: nodes_per_position(part) for part in row["methods"]} for row in results["growth"]]
    yield Table(
        f"Growth with the context, kernel sizes of 2, a sequence of {GROWTH_TOKENS:,} tokens",
        "context; windows: nodes per position=windows ,.1f; us per position=methods.0.us_per_position ,.2f; "
        "slid: nodes per position=slid ,.1f; us per position=methods.1.us_per_position ,.2f; "
        "node ratio=node_ratio .2f; (context - 1) / layers=theory_node_ratio .2f; time ratio=time_ratio .1f; "
        "largest difference=max_abs_diff .1g",
        growth,
        f"Node ratio: windows over slid, counted; a sequence of {GROWTH_TOKENS:,} tokens is finite, so it stays below "
        f"its limit, (context - 1) / layers. Both with batch norm folded.",
    )


main = partial(harness.main, Benchmark("slide", __doc__, run, tables, add_options, check_name))

if __name__ == "__main__":
    sys.exit(main())
