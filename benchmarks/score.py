"""What is it worth to share nodes across names, and how far is that from what the machine can do?

Equality comes first: log-likelihoods that differ from the float64 tree's end the run with exit code 1 and no timings.
Then every method on the whole list, the limits of this device, growth with the number of distinct names, and the
installed peer `pytorch-tcn`. float32 throughout, IEEE also on CUDA.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import reference
from benchmarks import harness
from benchmarks.counting import distinct_nodes, outputs, shared_bytes, shared_multiply_adds
from benchmarks.harness import Benchmark, Results, Session, positive, spread, time_calls
from benchmarks.methods import (
    MISSING,
    PEER,
    TCN,
    Models,
    OnList,
    evaluated_nodes,
    exact_scores,
    list_rows,
    parameters,
    random_models,
)
from benchmarks.tables import Row, Table, text
from wavenet_conv import Scorer, WaveNetConfig
from wavenet_conv.checkpoint import load_checkpoint
from wavenet_conv.sampling import sample_stream
from wavenet_conv.scoring import CHUNK_NAMES

ARCHITECTURE = {"n_embd": 24, "n_hidden": 128}  # and kernel sizes of 2, 2, 2: the lecture's last network
TOLERANCE = 2e-5  # of a name's log-likelihood, in nats
METHODS = ("loop", "windows", "windows_folded", "slid", "shared")
SAMPLED = 2**17  # names that are drawn before repeats are taken out
LONGEST = 20  # characters; a sampled name is cut there
FEW = 1_000_000  # growth sizes up to here are timed several times, in turn; larger ones once


def add_options(parser: argparse.ArgumentParser) -> None:
    """How far to grow."""
    parser.add_argument(
        "--count", metavar="N", type=positive, help="distinct names to grow to (20000; --full: 10000000)"
    )


def run(session: Session) -> Results:
    """All results; where log-likelihoods differ, nothing after the equality."""
    args, names = session.args, session.names[:: session.pick(10, 1)]
    models = random_models(names, session, **ARCHITECTURE)
    wanted = METHODS if TCN is None else (*METHODS, PEER)
    lists = {name: OnList(name, models, names, session.pick(50, 300)) for name in wanted}
    sizes = {"vocab_size": len(session.vocab), "parameters": parameters(models.tree), "seed": args.seed}
    used = {"file": Path(args.names).name, "used": len(names), "of": len(session.names), "positions": outputs(names)}
    results: Results = {
        "model": {"kernel_sizes": [2, 2, 2], "context": models.context} | ARCHITECTURE | sizes,
        "names": used,
    }
    results["equality"], nodes = equality(models, lists, session)
    if not results["equality"]["equal"]:
        return results
    results["distinct_nodes"] = distinct_nodes(names, models.conv.config.kernel_sizes)
    rows = {row["method"]: row for row in list_rows(lists, "scores", nodes, models, session)}
    rates = {
        "matmul_multiply_adds_per_second": harness.matmul_rate(session.device),
        "copy_bytes_per_second": harness.copy_rate(session),
    }
    results["methods"] = [rows[name] for name in METHODS]
    results["limits"] = rates | limit(rates, models.conv.config, nodes["shared"], names, rows["shared"]["us"] / 1e6)
    results["growth"] = growth_rows(rates, session)
    results["peer"] = MISSING
    if TCN is not None:
        peer = {"installed": True, "parameters": parameters(models.peer), "receptive_field": models.peer.context}
        results["peer"] = rows[PEER] | peer
    return results


def equality(models: Models, lists: dict[str, OnList], session: Session) -> tuple[Results, dict[str, list[int]]]:
    """Every method's largest difference from the float64 tree's windows, and the nodes per layer that it evaluates.

    Also the scorer with the default model's trained weights, on names that are sampled from it.
    """
    tick, every_name = session.ticks("equality", len(METHODS)), lists["shared"].names
    exact = dict(zip(every_name, exact_scores(models.tree, every_name, session.vocab).tolist()))
    differences, nodes = {}, {}
    for name in METHODS:
        scores, nodes[name] = lists[name].counted(lists[name].scores)
        differences[name] = largest(scores, [exact[one] for one in lists[name].names])
        tick()
    trained, sampled = load_checkpoint("default"), distinct_names(session.pick(500, 2000), session)
    scores = Scorer(trained.model, trained.vocab, device=session.device, dtype=torch.float32).score(sampled)
    tree = reference.from_conv(trained.model).to(device=session.device)
    differences["shared, default model"] = largest(scores, exact_scores(tree, sampled, trained.vocab).tolist())
    verdict = {
        "equal": all(difference <= TOLERANCE for difference in differences.values()),  # a NaN is not
        "tolerance": TOLERANCE,
        "max_abs_diff": differences["shared"],
        "max_abs_diffs": differences,
    }
    return verdict, nodes


def largest(scores: Tensor, exact: Sequence[float]) -> float:
    """The largest difference of a name's log-likelihood; NaN where there is one."""
    return float((scores.double() - torch.tensor(exact, dtype=torch.float64)).abs().max())


def limit(
    rates: dict[str, float], config: WaveNetConfig, nodes: Sequence[int], names: Sequence[str], seconds: float
) -> Results:
    """The least time that this device's rates allow for these nodes, and its share of the time that was taken."""
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


def growth_rows(rates: dict[str, float], session: Session) -> list[Row]:
    """The time per name with the default model, for the first 1,000, 10,000, ... of `--count` names from it."""
    trained, count = load_checkpoint("default"), session.args.count or session.pick(20_000, 10_000_000)
    task = session.progress.add_task("sampling", total=count)
    names = distinct_names(count, session, lambda n: session.progress.update(task, completed=n))
    scorer, config = (
        Scorer(trained.model, trained.vocab, device=session.device, dtype=torch.float32),
        trained.model.config,
    )
    sizes = [size for size in (10**power for power in range(3, 10)) if size < count] + [count]
    rounds, tick, nodes = session.pick(3, 7), session.ticks("growth", len(sizes)), {}
    for size in sizes:
        with evaluated_nodes(config) as nodes[size]:
            scorer.score(names[:size])
        tick()

    def timed(chosen: Sequence[int], calls: int) -> dict[int, list[float]]:
        parts = {size: names[:size] for size in chosen}
        return time_calls(
            {size: partial(scorer.score, part) for size, part in parts.items()}, calls, session.device, block=1
        )

    samples = timed([size for size in sizes if size <= FEW], rounds)
    for size in sizes:
        samples |= {} if size <= FEW else timed([size], 1)
    rows = []
    for size in sizes:
        part, work = names[:size], shared_multiply_adds(config, nodes[size])
        row = {"names": size, "positions": outputs(part), "calls": len(samples[size]), "nodes": nodes[size]}
        row |= spread("us_per_name", [us / size for us in samples[size]])
        seconds = row["us_per_name"] * size / 1e6
        row |= {"positions_per_second": row["positions"] / seconds, "windows_share": nodes[size][-1] / row["positions"]}
        row |= {"multiply_adds_per_position": work / row["positions"]}
        rows.append(row | {"share_of_floor": limit(rates, config, nodes[size], part, seconds)["share_of_floor"]})
    return rows


def distinct_names(count: int, session: Session, tick: Callable[[int], Any] = lambda n: None) -> list[str]:
    """`count` distinct names of the default model in the order in which they were drawn, without the empty one.

    The first n of them do not depend on `count`. `tick` is called with how many there are.
    """
    trained, options = load_checkpoint("default"), {"seed": session.args.seed, "device": session.device}
    drawn = sample_stream(trained.model, trained.vocab, max_length=LONGEST, **options)
    names: dict[str, None] = {}
    while len(names) < count:
        names.update(dict.fromkeys(islice(drawn, min(SAMPLED, 2 * count))))
        names.pop("", None)
        tick(min(count, len(names)))
    return list(islice(names, count))


def tables(results: Results) -> Iterator[Table]:
    """What is printed."""
    names, peer = results["names"], results["peer"]
    limits, rows = results["limits"], {row["method"]: row for row in results["methods"]}
    rates = "positions/s=positions_per_second ,.0f; quartiles=~positions_per_second ,.0f"
    work = "multiply-adds per position=multiply_adds_per_position ,.0f; nodes per layer=nodes ,"
    yield Table(
        f"The list, {names['used']:,} names, {names['positions']:,} positions",
        f"method; batch=batch ,; {rates}; x windows=positions_per_second/windows .2f; "
        f"x loop=positions_per_second/loop .2f; {work}",
        [*results["methods"], peer],
        f"The loop ran on {rows['loop']['names']:,} of the names. shared starts at a list of strings, the others at "
        f"tensors of tokens. Distinct nodes: {text(results['distinct_nodes'], ',')}; shared tabulates the layers that "
        f"show 0.\nLimits: {limits['matmul_multiply_adds_per_second'] / 1e9:,.0f} billion multiply-adds per second in "
        f"a matrix product, {limits['copy_bytes_per_second'] / 1e9:,.1f} GB per second in a copy. shared took "
        f"{limits['seconds'] * 1e3:.1f} ms; its multiply-adds need {limits['operations_floor_seconds'] * 1e3:.1f} "
        f"ms and its bytes {limits['bytes_floor_seconds'] * 1e3:.1f} ms, so it reaches {limits['share_of_floor']:.0%} "
        f"of the larger floor ({limits['bound_by']}).\n{PEER}, with {text(peer.get('parameters'), ',')} parameters and "
        f"a receptive field of {text(peer.get('receptive_field'))}, computes another function: it pads activations "
        f"with zeros, and each of its blocks holds two convolutions.",
    )
    yield Table(
        "Growth with the number of distinct names, Scorer.score with the default model",
        "distinct names=names ,; us per name=us_per_name .3f; quartiles=~us_per_name .3f; "
        "positions/s=positions_per_second ,.0f; windows evaluated=windows_share .1%; "
        f"{work}; share of the larger floor=share_of_floor .0%",
        results["growth"],
        f"Windows evaluated: of all positions. Windows near a name's start and the nodes below are shared in the whole "
        f"stream, up to a bound; other windows at most inside a chunk of {CHUNK_NAMES:,} names. Names sampled from the "
        f"default model, cut at {LONGEST} characters, repeats removed.",
    )


main = partial(harness.main, Benchmark("score", __doc__, run, tables, add_options))

if __name__ == "__main__":
    sys.exit(main())
