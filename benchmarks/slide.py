"""Does the convolutional pass reuse the nodes that the loop recomputes, and what is that worth?

Equality comes first: models that differ end the run with exit code 1 and no timings. Then nodes, counted while the
models run; time for one name; time for the whole list; growth with the context. float32 throughout, IEEE also on CUDA.

- One name: against the loop, most of the gain is fewer launches. Against the strongest rival, all windows as one batch
  with batch norm folded, the pass gains little on one short name. `nn.Conv1d` has a large fixed cost on the CPU, so
  `fold_batch_norm` makes matrix products over shifted views.
- The whole list: the pass has fewer multiply-adds than the windows, and it reads and writes activations less often. In
  large batches `nn.Conv1d` is as fast as the matrix products.
- On CUDA, `slid_graph` is the pass on one name as a CUDA graph, captured once: a replay launches all kernels at once.
- Growth: a longer context makes reuse worth more. Per prediction, the tree computes all nodes of a window, and the pass
  one node per layer, plus those at the ends of the sequence.

The published run takes about two minutes on two cores.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import reference
from benchmarks import harness
from benchmarks.counting import nodes_of
from benchmarks.harness import Benchmark, Call, Results, Session, Sized, call_rows, rows_at_best
from benchmarks.methods import GRAPHS, METHODS, Model, Models, OnList, Replayed, list_rows, random_models
from benchmarks.tables import Row, Table, text, with_shares
from wavenet_conv import verify
from wavenet_conv.counts import count_nodes
from wavenet_conv.equivalence import TOLERANCE

NAME = "analisa"  # on which one pass is timed, or the first name if the list has not its characters
COMPARED = ("loop", "windows", "windows_folded", "slid_conv1d", "slid")
GROWTH_TOKENS = 4096
GROWTH_LAYERS = range(3, 11)  # contexts 8, 16, ... 1024
WINDOW_TOKENS = {"cpu": (2**14, 2**12, 2**16), "cuda": (2**18, 2**16, 2**20)}  # tokens in the windows of one call


def run(session: Session) -> Iterator[Results]:
    """All results; where the models differ, nothing after the equality."""
    args, names = session.args, session.names[:: session.pick(5, 1)]
    models, model = random_models(names, session)
    name = NAME if set(NAME) <= set(session.vocab.characters) else names[0]
    tokens = session.vocab.encode([name], context=models.context)[0].to(session.device)
    used = {"file": Path(args.names).name, "used": len(names), "of": len(session.names), "one_name": name}
    found = equality(models, names, session)
    yield {"model": model, "names": used, "equality": found}
    if not found["equal"]:
        return
    lists = {"one_name": [name], "whole_list": names}
    yield {"distinct_nodes": {key: [*count_nodes(part, models.conv.config).distinct] for key, part in lists.items()}}
    methods: dict[str, Model] = {name: METHODS[name].on_names(models) for name in COMPARED}
    yield {"one_name": one_name_rows(methods, models, tokens, session)}
    on_list = {name: OnList(name, models, names, session.pick(50, 300)) for name in COMPARED}
    whole_list = list_rows(on_list, "logits", models, session)
    yield {"whole_list": whole_list, "matmul_multiply_adds_per_second": session.matmul_rate}
    growth = [growth_row(layers, session) for layers in GROWTH_LAYERS]
    found["equal"] = all(row["max_abs_diff"] <= TOLERANCE[torch.float32] for row in growth)
    yield {"growth": growth, "equality": found}
    if session.device.type == "cuda" and found["equal"]:
        yield from graph_sections(methods, models, tokens, found, session)


def graph_sections(
    methods: dict[str, Model], models: Models, tokens: Tensor, found: Results, session: Session
) -> Iterator[Results]:
    """The table of one name again, with the pass as a graph: after all else, which a failed capture then leaves."""
    graph = Replayed(models.folded, tokens)
    inputs = (tokens, tokens.flip(1), tokens)
    worst = torch.stack([(graph(read) - methods["windows"](read)).abs().max() for read in inputs]).max()
    found["graph_max_abs_diff"], found["equal"] = float(worst), bool(worst <= TOLERANCE[torch.float32])
    yield {"equality": found}
    if found["equal"]:
        yield {"one_name": one_name_rows(methods | {"slid_graph": graph}, models, tokens, session)}


def equality(models: Models, names: Sequence[str], session: Session) -> Results:
    """Both convolutional models against the tree, at every position of every name."""
    reports = [verify(models.tree, slid, names, session.vocab) for slid in (models.conv, models.folded)]
    worst = max(reports, key=lambda report: report.max_abs_diff)
    found = {name: getattr(worst, name) for name in ("positions", "max_abs_diff", "tolerance", "worst")}
    return {"equal": all(report.equal for report in reports), **found}


def one_name_rows(methods: dict[str, Model], models: Models, tokens: Tensor, session: Session) -> list[Row]:
    """Every method on one name: nodes, launches and microseconds.

    A graph is not profiled, since that crashes in some versions of CUDA: its kernels are those of the pass in it.
    """
    calls: dict[str, Call] = {name: partial(method, tokens) for name, method in methods.items()}
    rows = call_rows(calls, session.pick(400, 2000), "one name", session, unprofiled=GRAPHS)
    for row in rows:
        is_graph = row["method"] in GRAPHS
        captured = calls["slid" if is_graph else row["method"]]
        row["nodes"] = nodes_of(captured, models.conv.config)
        if is_graph:
            row["launches"] = 1
            session.to_profile.append((row, "kernels", captured, False))
    return rows


def growth_row(layers: int, session: Session) -> Row:
    """Windows against the convolutional pass at context `2 ** layers`, kernel sizes of 2, on one long random sequence.

    Both with batch norm folded, the windows at the best of several batch sizes. Without `--full` the windows are a
    sample of all positions, which the row counts.
    """
    models = Models(reference.build((2,) * layers).eval().to(session.device), session.vocab)
    context, tokens = models.context, torch.randint(1, 27, (1, GROWTH_TOKENS), device=session.device)
    stride = session.pick(max(1, (GROWTH_TOKENS - context + 1) * context // 2**16), 1)
    windows, logits = reference.windows(tokens, context)[0, ::stride].contiguous(), {}

    def by_windows(size: int) -> int:
        logits["windows"] = torch.cat([models.folded_tree(batch) for batch in windows.split(size)])
        return len(windows)

    def by_sliding(size: int) -> int:
        logits["slid"] = models.folded(tokens)[0]
        return len(logits["slid"])

    sizes = [max(1, size // context) for size in WINDOW_TOKENS[session.device.type]]
    methods: dict[Any, Sized] = {"windows": Sized(by_windows, sizes), "slid": Sized(by_sliding)}
    rows = rows_at_best(methods, "position", models.conv.config, session.pick(3, 5), f"context {context}", session)
    per_position = [sum(row["nodes"]) / row["positions"] for row in rows]
    difference = float((logits["windows"] - logits["slid"][::stride]).abs().max())
    ratios = {"node_ratio": per_position[0] / per_position[1], "theory_node_ratio": (context - 1) / layers}
    ratios["time_ratio"] = rows[0]["us_per_position"] / rows[1]["us_per_position"]
    return {"context": context, "layers": layers, "max_abs_diff": difference, **ratios, "methods": rows}


def tables(results: Results) -> Iterator[Table]:
    """What is printed."""
    names, distinct = results["names"], results["distinct_nodes"]
    yield Table(
        f"One name, {names['one_name']!r}, {len(names['one_name']) + 1} positions",
        "method; nodes per layer=nodes ,; launches; kernels in it=kernels; median us=us .1f; quartiles=~us .1f; "
        "x loop=us/loop .2f; x windows=us/windows .2f",
        results["one_name"],
        f"Launches: operators, on CUDA kernels; a graph is one. Distinct nodes: {text(distinct['one_name'], ',')}. "
        "Batch norm is folded in slid and in windows_folded, its strongest rival.",
    )
    rate, rows = results["matmul_multiply_adds_per_second"], results["whole_list"]
    yield Table(
        f"The whole list, {names['used']:,} names",
        "method; batch=batch ,; nodes per layer=nodes ,; positions/s=positions_per_second ,.0f; "
        "quartiles=~positions_per_second ,.0f; x windows=positions_per_second/windows .2f; "
        "multiply-adds per position=multiply_adds_per_position ,.0f; share of matmul rate=share .0%",
        with_shares(rows, rate),
        f"The loop ran on {rows[0]['names']} of the names. Distinct nodes: {text(distinct['whole_list'], ',')}. Matmul "
        f"rate: {rate / 1e9:.0f} billion multiply-adds per second.",
    )
    growth = [
        row | {part["method"]: sum(part["nodes"]) / part["positions"] for part in row["methods"]}
        for row in results["growth"]
    ]
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


main = partial(harness.main, Benchmark("slide", __doc__, run, tables))

if __name__ == "__main__":
    sys.exit(main())
