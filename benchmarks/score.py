"""What is it worth to share nodes across names, and how far is that from what the machine can do?

Equality comes first: log-likelihoods that differ from the float64 tree's end the run with exit code 1 and no timings.
Then every method on the whole list with its share of the matrix-product rate, the installed peer `pytorch-tcn`, and
lists of one name to a million. float32 throughout, IEEE also on CUDA.

- The list: sharing saves most of the multiply-adds. Equal windows are most of it, and a few lines of PyTorch find
  those (`windows_distinct`); the nodes below them are the rest.
- Sizes: from strings to log-likelihoods. A few names are scored by one thread in one call; long lists share more.
  KenLM's 6-grams are another model, with a higher loss, and the fastest peer.

The published run reads the lecture's list (`--names FILE`), uses the extra `bench`, and takes six minutes on two
cores.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import reference
from benchmarks import device, harness, rivals, sizes
from benchmarks.choosing import loss_of
from benchmarks.counting import outputs
from benchmarks.harness import Benchmark, Results, Session
from benchmarks.methods import MISSING, PEER, PEERS, Models, OnList, exact_scores, list_rows, random_models
from benchmarks.tables import Table, text, with_shares
from wavenet_conv.checkpoint import load_checkpoint
from wavenet_conv.counts import count_nodes
from wavenet_conv.sampling import sample_stream
from wavenet_conv.training import split_names

TOLERANCE = 2e-5  # of a name's log-likelihood, in nats
METHODS = ("loop", "windows", "windows_folded", "windows_distinct", "slid", "shared")
LONGEST_LIST = (2048, 1_000_000)  # names, without and with --full
LONGEST = 20  # characters; a sampled name is cut there


def run(session: Session) -> Iterator[Results]:
    """All results; where log-likelihoods differ, nothing after the equality."""
    args, names = session.args, session.names[:: session.pick(10, 1)]
    models, model = random_models(names, session)
    lists = {name: OnList(name, models, names, session.pick(50, 300)) for name in (*METHODS, *PEERS)}
    used = {"file": Path(args.names).name, "used": len(names), "of": len(session.names), "positions": outputs(names)}
    trained = load_checkpoint("default")
    default = Models(reference.from_conv(trained.model).to(device=session.device), trained.vocab)
    drawn = OnList("shared", default, distinct_names(session.pick(500, 2000), session))
    differences = {name: largest_difference(lists[name], models) for name in METHODS}
    differences["shared, default model"] = largest_difference(drawn, default)
    equal = all(difference <= TOLERANCE for difference in differences.values())  # a NaN is not
    equality = {"tolerance": TOLERANCE, "max_abs_diff": differences["shared"], "max_abs_diffs": differences}
    yield {"model": model, "names": used, "equality": {"equal": equal, **equality}}
    if not equal:
        return
    distinct = list(count_nodes(names, models.conv.config).distinct)
    rows = list_rows(lists, "scores", models, session)
    peer = rows[-1] | {"nodes": None} if PEERS else MISSING  # its nodes are others
    limits = {"matmul_multiply_adds_per_second": session.matmul_rate}
    yield {"distinct_nodes": distinct, "methods": rows[: len(METHODS)], "limits": limits, "peer": peer}
    ways, many = sizes.make_methods(default, session), distinct_names(session.pick(*LONGEST_LIST), session)
    for found in sizes.size_rows(ways, many, session):
        yield {"sizes": found}
    if session.device.type == "cuda":
        yield {"on_device": device.device_part(default, many, session)}
    valid = split_names(session.names)[1]
    losses = {name: loss_of(ways[name](valid), valid) for name in ways if name in ("shared", rivals.NGRAMS)}
    yield {"validation_losses": losses}


def largest_difference(method: OnList, models: Models) -> float:
    """From the exact log-likelihood of a name; NaN where there is one."""
    return float((method.scores(method.sizes[0]) - exact_scores(models, method.names)).abs().max())


def distinct_names(count: int, session: Session) -> list[str]:
    """The first `count` distinct names that the default model draws, without the empty one."""
    trained, options = load_checkpoint("default"), {"seed": session.args.seed, "device": session.device}
    drawn = filter(None, sample_stream(trained.model, trained.vocab, max_length=LONGEST, **options))
    names: dict[str, None] = {}
    while len(names) < count:
        names.update(dict.fromkeys(islice(drawn, count - len(names))))
    return list(names)


def tables(results: Results) -> Iterator[Table]:
    """What is printed."""
    names, rate = results["names"], results["limits"]["matmul_multiply_adds_per_second"]
    rows = with_shares([*results["methods"], results["peer"]], rate)
    columns = (
        "multiply-adds per position=multiply_adds_per_position ,.0f; nodes per layer=nodes ,; "
        "share of matmul rate=share .0%"
    )
    yield Table(
        f"The list, {names['used']:,} names, {names['positions']:,} positions",
        "method; batch=batch ,; positions/s=positions_per_second ,.0f; quartiles=~positions_per_second ,.0f; "
        f"x windows=positions_per_second/windows .2f; x loop=positions_per_second/loop .2f; {columns}",
        rows,
        f"The loop ran on {rows[0]['names']:,} of the names. shared starts at a list of strings, the others at "
        f"tensors of tokens. Distinct nodes: {text(results['distinct_nodes'], ',')}; shared tabulates the layers that "
        f"show 0. Matmul rate: {rate / 1e9:,.0f} billion multiply-adds per second.\n{PEER} computes another function: "
        f"it pads activations with zeros, and each of its blocks holds two convolutions.",
    )
    ways = [name for name in results["sizes"][0] if name != "names"]
    rows = [
        {"names": row["names"]} | {f"way{i}": row.get(name, {}).get("us") for i, name in enumerate(ways)}
        for row in results["sizes"]
    ]
    losses = ", ".join(f"{name} {loss:.3f}" for name, loss in results["validation_losses"].items())
    yield Table(
        "Microseconds per name, by the number of names in a call; from strings to scores, with the default model",
        "names=names ,; " + "; ".join(f"{name}=way{i} .3g" for i, name in enumerate(ways)),
        rows,
        "Medians; each call takes other names, sampled from the default model, without repeats. Losses in nats per "
        f"character on the list's validation part: {losses}.",
    )
    if "on_device" in results:
        yield device.device_table(results["on_device"])


main = partial(harness.main, Benchmark("score", __doc__, run, tables))

if __name__ == "__main__":
    sys.exit(main())
