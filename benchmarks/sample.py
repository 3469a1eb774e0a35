"""How fast are names drawn, one at a time and many at once, and how far is that from what the machine can do?

Equality comes first: names that differ from those of the lecture's loop with the same uniform numbers end the run with
exit code 1 and no timings. Then every method with the model that ships, the latency of one character, and growth with
the context. float32 throughout, IEEE also on CUDA; names are compared with the loop's in float64.

- Names: `sample` computes what follows each distinct prefix once, however many names begin with it.
- One character: a stream computes one new node per layer. Its time is that of its calls, not of its arithmetic.
- Growth: a window's time grows with the context, a stream's only with the number of layers.

The published run uses the extra `bench` and takes some minutes on two cores.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

import reference
import reference.sampling as lecture
from benchmarks import harness
from benchmarks.counting import nodes_of
from benchmarks.harness import Benchmark, Call, Results, Session, Sized, call_rows, rows_at_best
from benchmarks.methods import GRAPHS, METHODS, PEER, PEERS, WINDOW_BATCHES, Models, parameters
from benchmarks.tables import Row, Table, with_shares
from wavenet_conv import sample
from wavenet_conv.checkpoint import load_checkpoint
from wavenet_conv.equivalence import TOLERANCE
from wavenet_conv.sampling import uniform

LONGEST = 100  # characters; a name is cut there
# None is larger than `sample` draws together: CHARACTERS / (LONGEST + 1) names.
OUR_BATCHES = {"cpu": (1024, 131072, 64, 16384, 65536), "cuda": (16384, 131072, 1024, 65536)}
GROWTH_LAYERS = range(3, 13)  # contexts 8, 16, ... 4096
COMPARED_NAMES = (40, 200)  # without and with --full
COMPARED_BATCHES = (1, 9)  # rows of a stream that is compared with windows: compiled loops take the steps of few


def run(session: Session) -> Iterator[Results]:
    """All results; where names differ, nothing after the equality."""
    trained = load_checkpoint("default")
    models, seed = Models(reference.from_conv(trained.model.to(session.device)), trained.vocab), session.args.seed
    model = {"checkpoint": "default", "context": models.context, "parameters": parameters(models.conv)}
    torch.manual_seed(seed)
    trees = [reference.build((2,) * layers).eval() for layers in GROWTH_LAYERS[:: session.pick(3, 1)]]
    growth = [Models(tree.to(session.device), session.vocab) for tree in trees]
    found = equality(models, growth, session)
    yield {"model": model | {"seed": seed}, "equality": found}
    if not found["equal"]:
        return
    methods = method_rows(models, session)
    yield {"methods": methods, "limits": {"matmul_multiply_adds_per_second": session.matmul_rate}}
    timed, calls = ("windows", "windows_folded", "slid", "stream", *PEERS), session.pick(400, 4000)
    yield {"latency": step_rows(timed, models, session, calls)}
    yield {"growth": [growth_row(larger, session) for larger in growth]}
    if session.device.type == "cuda":
        worst = torch.tensor([step_difference("stream_graph", models, batch) for batch in COMPARED_BATCHES]).max()
        found["graph_max_abs_diff"], found["equal"] = float(worst), bool(worst <= found["tolerance"])
        yield {"equality": found}
        if found["equal"]:
            yield {"latency": step_rows((*timed, "stream_graph"), models, session, calls)}


def equality(models: Models, growth: Sequence[Models], session: Session) -> Results:
    """Names against those of the lecture's loop in float64 with the same uniform numbers, at every batch.

    In float32 names at every batch against those drawn one by one, and the logits of everything that is timed step by
    step against those of the tree's windows.
    """
    count, seed, exact, device = session.pick(*COMPARED_NAMES), session.args.seed, torch.float64, session.device
    tree = reference.from_conv(models.conv).to(device=device, dtype=exact)

    def uniforms(name: int, position: int) -> float:
        return float(uniform(seed, torch.tensor([name]), torch.tensor([position])))

    looped = lecture.sample_loop(tree, count, lecture.inverse_cdf(uniforms), max_length=LONGEST)
    expected: dict[torch.dtype, list] = {exact: [models.vocab.decode(name) for name in looped]}
    different = {}
    for batch in (1, *OUR_BATCHES[device.type][: session.pick(2, None)]):
        for dtype in (exact, torch.float32):
            options = {"seed": seed, "batch_size": batch, "device": device, "dtype": dtype, "max_length": LONGEST}
            # Few names would not be drawn as a batch's are.
            names = sample(models.conv, models.vocab, max(count, batch), **options)[:count]
            pairs = zip_longest(names, expected.setdefault(dtype, names))
            different[f"sample, batch {batch:,}, {str(dtype)[6:]}"] = sum(name != other for name, other in pairs)
    tick, differences = session.ticks("equality", 1 + len(growth)), []
    for larger in (models, *growth):
        methods = ("windows_folded", "slid", "stream") if larger is models else ("stream",)
        differences += [step_difference(name, larger, batch) for name in methods for batch in COMPARED_BATCHES]
        tick()
    worst = float(torch.tensor(differences).max())  # NaN where there is one
    tolerance = TOLERANCE[torch.float32]
    equal = worst <= tolerance and not any(different.values())
    return {"equal": equal, "names": count, "different_names": different, "max_abs_diff": worst, "tolerance": tolerance}


def step_difference(name: str, models: Models, batch: int) -> float:
    """The largest difference of a method's last logits from the tree's, on a little more than one random context."""
    tokens = torch.randint(1, len(models.vocab), (batch, models.context + 4), device=models.device)
    step = METHODS[name].step(models, batch)
    found = [step(column) for column in tokens.unbind(1)][-5:]
    expected = [models.tree(window) for window in tokens.unfold(1, models.context, 1).unbind(1)]
    return float((torch.stack(found) - torch.stack(expected)).abs().max())


def sample_windows(model: Any, models: Models, count: int, session: Session) -> Tensor:
    """`count` names side by side: per character one call of the tree on the windows of all that have not ended.

    Returns their tokens on the CPU, int64 `(count, LONGEST)`, zeros after each name.
    """
    windows, draw = torch.zeros(count, models.context, dtype=torch.int64, device=models.device), multinomial(session)
    tokens, names = torch.zeros(count, LONGEST).to(windows), torch.arange(count).to(windows)
    for place in range(LONGEST):
        drawn = draw(model(windows))
        tokens[names, place], going = drawn, drawn > 0
        windows, names = torch.cat([windows[:, 1:], drawn[:, None]], 1)[going], names[going]
        if not len(names):
            break
    return tokens.cpu()


def multinomial(session: Session) -> Callable[[Tensor], Tensor]:
    """Draws from logits `(batch, vocab)` as the lecture does."""
    generator = torch.Generator(session.device).manual_seed(session.args.seed)
    return lambda logits: torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


def method_rows(models: Models, session: Session) -> list[Row]:
    """Every method with the trained weights at its best batch.

    The same seed each time, so that a method draws the same names in every call. `sample` gives strings, and makes its
    tables in every call; the others give tokens and are given models that are ready: in their favour.
    """
    seed, device = session.args.seed, session.device
    batches, config = WINDOW_BATCHES[device.type], models.conv.config

    def loop(size: int) -> int:
        draw = lecture.multinomial(torch.Generator(device).manual_seed(seed))
        return len(lecture.sample_loop(models.tree, session.pick(40, 300), draw, max_length=LONGEST))

    def windows(name: str, size: int) -> int:
        return len(sample_windows(METHODS[name].model(models), models, size, session))

    def ours(size: int) -> int:
        options = {"seed": seed, "batch_size": size, "device": device, "dtype": torch.float32}
        return len(sample(models.conv, models.vocab, 4 * size, max_length=LONGEST, **options))

    methods: dict[Any, Sized] = {"loop": Sized(loop), "sample": Sized(ours, OUR_BATCHES[device.type])}
    methods |= {name: Sized(partial(windows, name), batches) for name in ("windows", "windows_folded")}
    rows = rows_at_best(methods, "name", config, session.pick(3, 7), "names", session, by_host=True)
    return [row | {"times_loop": row["names_per_second"] / rows[0]["names_per_second"]} for row in rows]


def step_rows(methods: Sequence[str], models: Models, session: Session, calls: int, key: str = "us") -> list[Row]:
    """Launches and microseconds of one character's logits at batch 1."""
    token = torch.ones(1, dtype=torch.int64, device=session.device)
    steps: dict[str, Call] = {name: partial(METHODS[name].step(models, 1), token) for name in methods}
    return call_rows(steps, calls, f"context {models.context}", session, key=key, unprofiled=GRAPHS)


def growth_row(models: Models, session: Session) -> Row:
    """One character's logits from windows, from folded windows and from a stream, and the nodes that they take."""
    methods = ("windows", "windows_folded", "stream")
    rows = step_rows(methods, models, session, session.pick(90, 210), "us_per_character")
    window = torch.zeros(1, models.context, dtype=torch.int64, device=models.device)
    nodes = nodes_of(lambda: models.tree(window), models.conv.config)
    windows, folded, stream = (row["us_per_character"] for row in rows)
    ratios = {"times_windows": windows / stream, "times_windows_folded": folded / stream}
    per_character = {"windows": sum(nodes), "stream": len(nodes)}
    return {"context": models.context, "nodes_per_character": per_character, **ratios, "one": rows}


def tables(results: Results) -> Iterator[Table]:
    """What is printed."""
    yield Table(
        "Names",
        "method; batch=batch ,; names=names ,; names/s=names_per_second ,.0f; quartiles=~names_per_second ,.0f; "
        "x loop=times_loop ,.2f; share of matmul rate=share .1%",
        with_shares(results["methods"], results["limits"]["matmul_multiply_adds_per_second"], "name"),
        "sample gives strings and makes its tables in every call; the others draw by multinomial and give tokens.",
    )
    yield Table(
        "One character's logits, batch 1",
        "method; launches=launches ,; median us=us .1f; quartiles=~us .1f; x stream=us/stream .2f",
        results["latency"],
        "Launches: operators of PyTorch on the CPU, kernels on CUDA; compiled loops are not seen. Without the draw. "
        f"Each of {PEER}'s blocks holds two convolutions, so it has more parameters and sees more tokens.",
    )
    columns = (
        "context=context ,; windows: nodes=nodes_per_character.windows ,; stream: nodes=nodes_per_character.stream ,"
    )
    for place, row in enumerate(results["growth"][0]["one"]):
        columns += f"; {row['method']}: us=one.{place}.us_per_character ,.1f"
    yield Table(
        "Growth with the context, one name at a time",
        f"{columns}; quartiles=~one.{place}.us_per_character ,.1f; x windows=times_windows ,.2f; "
        "x windows_folded=times_windows_folded ,.2f",
        results["growth"],
        "x: how many times faster the last method is. Kernel sizes of 2, random weights.",
    )


main = partial(harness.main, Benchmark("sample", __doc__, run, tables))

if __name__ == "__main__":
    sys.exit(main())
