"""How fast are names drawn, one at a time and many at once, and how far is that from what the machine can do?

Equality comes first: names that differ from those of the lecture's loop with the same uniform numbers end the run with
exit code 1 and no timings. Then every method with the model that ships, the latency of one character, and growth with
the context. float32 throughout, IEEE also on CUDA; names are compared with the loop's in float64.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import reference
import reference.sampling as lecture
from benchmarks import harness
from benchmarks.counting import CountingProducts, nodes_of
from benchmarks.harness import Benchmark, Call, Results, Session, spread, time_at_best, time_calls
from benchmarks.methods import METHODS, MISSING, PEER, TCN, WINDOW_BATCHES, Models, Step, parameters, peer_step
from benchmarks.slide import WINDOW_TOKENS
from benchmarks.tables import Row, Table
from wavenet_conv import ConvWaveNet, Stream, WaveNetConfig, sample
from wavenet_conv.checkpoint import load_checkpoint
from wavenet_conv.equivalence import TOLERANCE
from wavenet_conv.sampling import uniform

LONGEST = 100  # characters; a name is cut there
OUR_BATCHES = {"cpu": (1024, 131072, 64, 16384, 65536), "cuda": (16384, 1048576, 1024, 131072, 524288)}
GROWTH_LAYERS = range(3, 13)  # contexts 8, 16, ... 4096
GROWTH_BATCH = 64  # rows of a stream
COMPARED_NAMES = (40, 200)  # without and with --full
COMPARED_BATCHES = (1, 9)  # rows of a stream that is compared with windows: compiled loops take the steps of few

Draw = Callable[[Tensor, Tensor, Tensor], Tensor]  # probabilities `(batch, vocab)`, names, positions -> `(batch,)`
Sampler = Callable[[int], Sequence[Sequence]]  # from a batch size to names, as tokens or as strings


def run(session: Session) -> Results:
    """All results; where names differ, nothing after the equality."""
    trained = load_checkpoint("default")
    models, config = Models(reference.from_conv(trained.model.to(session.device)), trained.vocab), trained.model.config
    shape: Row = {name: list(getattr(config, name)) for name in ("kernel_sizes", "n_hidden")}
    shape |= {"n_embd": config.n_embd, "parameters": parameters(models.conv), "context": models.context}
    results: Results = {
        "model": {"checkpoint": "default", **shape, "seed": session.args.seed},
        "equality": equality(models, session),
    }
    if results["equality"]["equal"]:
        results["matmul_multiply_adds_per_second"] = harness.matmul_rate(session.device)
        results["methods"] = method_rows(methods_of(models, session), session)
        results["latency"] = latency_rows(models, session)
        layers = session.progress.track(growth_layers(session), description="growth")
        results["growth"] = [growth_row(layer_count, session) for layer_count in layers]
    return results


def sample_windows(model: Any, models: Models, count: int, draw: Draw) -> list[list[int]]:
    """`count` names side by side: per character one call of the tree on the windows of all that have not ended."""
    windows = torch.zeros(count, models.context, dtype=torch.int64, device=models.device)
    tokens, names = torch.zeros(count, LONGEST).to(windows), torch.arange(count).to(windows)
    for place in range(LONGEST):
        drawn = draw(model(windows).softmax(1), names, torch.full_like(names, place))
        tokens[names, place], going = drawn, drawn > 0
        windows, names = torch.cat([windows[:, 1:], drawn[:, None]], 1)[going], names[going]
        if not len(names):
            break
    return [row[: row.index(0)] if 0 in row else row for row in tokens.tolist()]


def by_multinomial(session: Session) -> Draw:
    """Draws as the lecture does."""
    generator = torch.Generator(session.device).manual_seed(session.args.seed)
    return lambda probs, names, places: torch.multinomial(probs, 1, generator=generator)[:, 0]


def by_inverse_cdf(seed: int) -> Draw:
    """Draws with the uniform numbers that `sample` takes for these names and positions."""

    def draw(probs: Tensor, names: Tensor, places: Tensor) -> Tensor:
        summed = probs.cumsum(1)
        return (summed / summed[:, -1:] <= uniform(seed, names, places)[:, None]).sum(1)

    return draw


def drawing(step: Step, batch: int, session: Session) -> Call:
    """One call is one character: a step, and a draw that the next step reads."""
    token, draw = torch.zeros(batch, dtype=torch.int64, device=session.device), by_multinomial(session)

    def character() -> None:
        nonlocal token
        token = draw(step(token).softmax(1), token, token)

    return character


def characters_of(names: Sequence[Sequence]) -> int:
    """Characters that were drawn for these names, with the `.` at their ends."""
    return sum(min(len(name) + 1, LONGEST) for name in names)


def equality(models: Models, session: Session) -> Results:
    """Names against those of the lecture's loop in float64 with the same uniform numbers, at every batch.

    In float32 names at every batch against those drawn one by one. Then the logits of the streams whose growth is
    timed, against their windows', in float32.
    """
    count, seed, exact, device = session.pick(*COMPARED_NAMES), session.args.seed, torch.float64, session.device
    tree = reference.from_conv(models.conv).to(device=device, dtype=exact)

    def uniforms(name: int, position: int) -> float:
        return float(uniform(seed, torch.tensor([name]), torch.tensor([position])))

    expected = {exact: lecture.sample_loop(tree, count, lecture.inverse_cdf(uniforms), max_length=LONGEST)}
    windows = sample_windows(tree, models, count, by_inverse_cdf(seed))
    different = {"windows": differing(windows, expected[exact])}
    for batch in (1, *OUR_BATCHES[device.type][: session.pick(2, None)]):
        for dtype in (exact, torch.float32):
            options = {"seed": seed, "batch_size": batch, "device": device, "dtype": dtype, "max_length": LONGEST}
            # Few names would not be drawn as a batch's are.
            names = sample(models.conv, models.vocab, max(count, batch), **options)[:count]
            tokens = [models.vocab.encode([name], context=1)[0][0, 1:].tolist() for name in names]
            way = f"sample, batch {batch:,}, {str(dtype)[6:]}"
            different[way] = differing(tokens, expected.setdefault(dtype, tokens))
    streams = [(layers, batch) for layers in growth_layers(session) for batch in COMPARED_BATCHES]
    tick, differences = session.ticks("equality", len(streams)), []
    for layers, batch in streams:
        differences.append(stream_difference(growth_models(layers, session), batch))
        tick()
    worst = float(torch.tensor(differences).max())  # NaN where there is one
    return {
        "equal": not any(different.values()) and worst <= TOLERANCE[torch.float32],
        "names": count,
        "characters": characters_of(expected[exact]),
        "different_names": different,
        "max_abs_diff": worst,
        "tolerance": TOLERANCE[torch.float32],
    }


def differing(names: Sequence[list[int]], expected: Sequence[list[int]]) -> int:
    """How many names are not what they should be, missing ones included."""
    return max(len(names), len(expected)) - sum(name == other for name, other in zip(names, expected))


def growth_layers(session: Session) -> Sequence[int]:
    """Layers of the models whose growth is timed."""
    return GROWTH_LAYERS[:: session.pick(3, 1)]


def growth_models(layers: int, session: Session) -> Models:
    """Kernel sizes of 2, the lecture's widths and random weights: context `2 ** layers`."""
    torch.manual_seed(session.args.seed)
    return Models(reference.build((2,) * layers).eval().to(session.device), session.vocab)


def stream_difference(models: Models, batch: int) -> float:
    """The largest difference of a stream's logits from the tree's, after a random context that fills its state."""
    tokens = torch.randint(1, 27, (batch, models.context + 4), device=models.device)
    stream = Stream(models.conv, batch)
    stream.push(F.pad(tokens[:, :-4], (1, 0)), torch.full((batch,), models.context))
    windows = tokens.unfold(1, models.context, 1).unbind(1)[1:]
    return float(
        torch.stack([(stream.step(window[:, -1]) - models.tree(window)).abs().max() for window in windows]).max()
    )


def methods_of(models: Models, session: Session) -> dict[str, Sampler]:
    """Every method with the trained weights.

    The same seed each time, so that a method draws the same names in every call. `sample` gives strings, and makes its
    tables in every call; the others give tokens and are given models that are ready: in their favour.
    """
    seed, device, few = session.args.seed, session.device, session.pick(40, 300)

    def loop(batch: int, gradients: bool = False) -> list[list[int]]:
        with torch.set_grad_enabled(gradients):
            draw = lecture.multinomial(torch.Generator(device).manual_seed(seed))
            return lecture.sample_loop(models.tree, few, draw, max_length=LONGEST)

    def windows(batch: int, name: str) -> list[list[int]]:
        return sample_windows(METHODS[name].model(models), models, batch, by_multinomial(session))

    def ours(batch: int) -> list[str]:
        options = {"seed": seed, "batch_size": batch, "device": device, "dtype": torch.float32}
        return sample(models.conv, models.vocab, 4 * batch, max_length=LONGEST, **options)

    def peer(batch: int) -> list[list[int]]:
        """The peer draws as many characters per name as the loop has, its weights being random."""
        for name in names:
            models.peer.tcn.reset_buffers()
            character = drawing(peer_step(models.peer), 1, session)
            for _ in range(characters_of([name])):
                character()
        return names

    names = loop(1)[: few // 2]
    calls: dict[str, Sampler] = {"loop": loop, "loop_with_gradients": partial(loop, gradients=True)}
    calls |= {name: partial(windows, name=name) for name in ("windows", "windows_folded")}
    return calls | {"sample": ours} | ({} if TCN is None else {PEER: peer})


def method_rows(calls: dict[str, Sampler], session: Session) -> list[Row]:
    """Names and characters per second of every method at its best batch, and the multiply-adds that they took."""
    sizes: dict[str, Sequence[int]] = dict.fromkeys(calls, (1,))
    sizes |= dict.fromkeys(("windows", "windows_folded"), WINDOW_BATCHES[session.device.type])
    sizes["sample"] = OUR_BATCHES[session.device.type]
    best, samples = time_at_best(calls, sizes, session, session.pick(3, 7), amount=len)
    rows: list[Row] = []
    for name, times in samples.items():
        with CountingProducts() as counted:
            drawn = calls[name](best[name])
        row: Row = {"method": name, "batch": best[name], "names": len(drawn), "characters": characters_of(drawn)}
        row |= {"calls": len(times), **spread("us", times)}
        row |= spread("names_per_second", [len(drawn) / us * 1e6 for us in times])
        row["characters_per_second"] = row["names_per_second"] * row["characters"] / len(drawn)
        per_name = [us / (rows or [row])[0]["names"] for us in samples["loop"]]  # of the loop, in the same turns
        row |= spread("times_loop", [loop_us * len(drawn) / us for us, loop_us in zip(times, per_name)])
        rows.append(row | {"multiply_adds_per_second": counted.multiply_adds / row["us"] * 1e6})
    return rows if TCN is not None else [*rows, MISSING]


def latency_rows(models: Models, session: Session) -> list[Row]:
    """Microseconds of one character's logits at batch 1, without the draw.

    The last row is the limit of a stream's launches: a stream one channel wide has the same calls and no arithmetic.
    """
    token, device, count = torch.ones(1, dtype=torch.int64).to(session.device), session.device, session.pick(400, 4000)
    config = WaveNetConfig(len(models.vocab), n_embd=1, n_hidden=1, kernel_sizes=models.conv.config.kernel_sizes)
    narrow = ConvWaveNet(config).eval().to(device)
    sizes: dict[str, Any] = {"windows": models.tree, "windows_folded": models.folded_tree, "slid": models.folded_tree}
    sizes |= {"stream": models.conv} | ({} if TCN is None else {PEER: models.peer})
    calls: dict[str, Call] = {name: partial(METHODS[name].step(models, 1), token) for name in sizes}
    calls["one channel wide"], sizes["one channel wide"] = partial(Stream(narrow).step, token), narrow
    launches = {name: harness.count_launches(call, device) for name, call in calls.items()}
    time_calls(calls, 40, device)
    samples = time_calls(calls, count, device, tick=session.ticks("latency", count // 20))
    rows: list[Row] = []
    for name, times in samples.items():
        row = {"method": name, "parameters": parameters(sizes[name]), "launches": launches[name], "calls": len(times)}
        row["receptive_field"] = models.peer.context if name == PEER else models.context
        rows.append(row | spread("us", times))
    return rows if TCN is not None else [*rows, MISSING]


def growth_row(layers: int, session: Session) -> Row:
    """A character at context `2 ** layers`, from windows, from folded windows and from a stream.

    At batch 1, and then with many names: folded windows at the best of several batch sizes against a stream.
    """
    models, device = growth_models(layers, session), session.device

    def timed(batches: dict[str, int], calls: int, block: int) -> list[Row]:
        methods = {name: drawing(METHODS[name].step(models, batch), batch, session) for name, batch in batches.items()}
        time_calls(methods, block, device, block=block)
        samples = time_calls(methods, calls, device, block=block)
        per_character = {name: [us / batch for us in samples[name]] for name, batch in batches.items()}
        rows: list[Row] = [
            {"method": name, "batch": batch, "calls": len(samples[name])} for name, batch in batches.items()
        ]
        return [row | spread("us_per_character", per_character[row["method"]]) for row in rows]

    one = timed(dict.fromkeys(("windows", "windows_folded", "stream"), 1), session.pick(90, 210), 30)
    sizes = {max(1, tokens // models.context) for tokens in WINDOW_TOKENS[device.type]}
    tried = {size: timed({"windows_folded": size}, 1, 1)[0]["us_per_character"] for size in sizes}
    best = min(tried, key=lambda size: tried[size])
    many = timed({"windows_folded": best, "stream": GROWTH_BATCH}, session.pick(3, 15), 3)
    windows, folded, stream, folded_many, stream_many = (row["us_per_character"] for row in one + many)
    window = torch.zeros(1, models.context, dtype=torch.int64, device=device)
    nodes = nodes_of(lambda: models.tree(window), models.conv.config)
    return {
        "context": models.context,
        "layers": layers,
        "nodes_per_character": {"windows": sum(nodes), "stream": layers},
        "times_windows": windows / stream,
        "times_windows_folded": folded / stream,
        "times_windows_folded_many": folded_many / stream_many,
        "one": one,
        "many": many,
    }


def tables(results: Results) -> Iterator[Table]:
    """What is printed."""
    rate = results.get("matmul_multiply_adds_per_second")
    yield Table(
        "Names",
        "method; batch=batch ,; names=names ,; names/s=names_per_second ,.0f; quartiles=~names_per_second ,.0f; "
        "characters/s=characters_per_second ,.0f; x loop=times_loop ,.2f; quartiles=~times_loop ,.2f"
        + ("; share of matmul rate=share .1%" if rate else ""),
        [row | {"share": row.get("multiply_adds_per_second", 0) / (rate or 1)} for row in results["methods"]],
        f"Characters: with the `.` at the end of each name. sample gives strings, and makes its tables in every call; "
        f"the others draw by torch.multinomial and give tokens. {PEER} has random weights and draws as many characters "
        f"per name as the loop.",
    )
    yield Table(
        "One character's logits, batch 1",
        "method; parameters=parameters ,; receptive field=receptive_field; launches=launches ,; median us=us .1f; "
        "quartiles=~us .1f; x stream=us/stream .2f",
        results["latency"],
        f"Launches: operators of PyTorch on the CPU, kernels on CUDA; a stream's compiled loops are none. Without the "
        f"draw. Each of {PEER}'s blocks holds two convolutions, so it has more parameters and sees more tokens.",
    )
    columns = (
        "context=context ,; windows: nodes=nodes_per_character.windows ,; stream: nodes=nodes_per_character.stream ,"
    )
    for part, ratios in (("one", ("windows", "windows_folded")), ("many", ("windows_folded_many",))):
        for place, row in enumerate(results["growth"][0][part]):
            columns += f"; {row['method']}: us={part}.{place}.us_per_character ,.1f"
        columns += f"; quartiles=~{part}.{place}.us_per_character ,.1f"
        columns += "".join(f"; x {ratio.removesuffix('_many')}=times_{ratio} ,.2f" for ratio in ratios)
    yield Table(
        "Growth with the context",
        columns,
        results["growth"],
        f"Microseconds per character, first at batch 1, then of many names: the windows at their best batch, the "
        f"stream at {GROWTH_BATCH}. x: how many times faster the method before it is. Kernel sizes of 2, random "
        f"weights; a character is its logits and a draw.",
    )


main = partial(harness.main, Benchmark("sample", __doc__, run, tables))

if __name__ == "__main__":
    sys.exit(main())
