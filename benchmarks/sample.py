"""How fast are names drawn, one at a time and many at once, and how far is that from what the machine can do?

Equality comes first: names that differ from those of the lecture's loop with the same uniform numbers end the run with
exit code 1 and no timings. Then every method with the model that ships, the latency of one character, and growth with
the context. float32 throughout, IEEE also on CUDA; equality in float64 as well.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import reference
import reference.sampling as lecture
from benchmarks import harness
from benchmarks.counting import CountingNodes
from benchmarks.harness import quartiles, time_calls
from benchmarks.score import NOT_INSTALLED, PEER, TCN, Peer, seed, shared_multiply_adds
from benchmarks.slide import GROWTH_BATCHES as WINDOW_TOKENS
from benchmarks.slide import table_of
from wavenet_conv import ConvWaveNet, Stream, WaveNetConfig, WaveNetConvError, exact_float32, fold_batch_norm, sample
from wavenet_conv.checkpoint import Checkpoint, load_checkpoint
from wavenet_conv.equivalence import TOLERANCE
from wavenet_conv.nodes import SharedNodes
from wavenet_conv.sampling import uniform
from wavenet_conv.streaming import compiled_loops
from wavenet_conv.vocabulary import Vocabulary

LONGEST = 100  # characters; a name is cut there
WINDOW_BATCHES = {"cpu": (256, 512, 1024, 2048, 4096), "cuda": (1024, 4096, 16384, 65536, 262144)}
OUR_BATCHES = {"cpu": (64, 1024, 16384, 65536, 131072), "cuda": (1024, 16384, 131072, 524288, 1048576)}
GROWTH_LAYERS = range(3, 13)  # contexts 8, 16, ... 4096
GROWTH_BATCH = 64  # rows of a stream
GROWTH_CHARACTERS = {True: 131_072, False: 1_024}  # of the string that `sample` draws in compiled loops, or not
COMPARED_BATCHES = (1, 9)  # rows of a stream that is compared with windows: compiled loops take the steps of few
COMPARED_STEPS = 4  # characters after a full context
NEAR = {"launches": "the limit of launches", "operations": "the limit of operations", "neither": "neither limit"}


class Method(NamedTuple):
    """`run(batch size)` draws names, as many as fill such a batch, and gives them, as tokens or as strings."""

    run: Callable[[int], Sequence[Sequence]]
    sizes: Sequence[int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code: 1 where names differ, 2 for wrong usage."""
    args = parse(arguments)
    try:
        device = harness.pick_device(args.device)
        harness.check_writable(args.json)
        trained = load_checkpoint("default")
    except WaveNetConvError as error:
        print(f"benchmarks.sample: {error}", file=sys.stderr)
        return 2
    try:
        with harness.progress_bar() as progress, torch.no_grad(), exact_float32():
            results = run(args, device, trained, progress)
    except WaveNetConvError as error:
        print(f"benchmarks.sample: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return harness.report(results, args.json, print_tables)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; argparse leaves with exit code 2 for what it cannot read."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sample", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--seed", metavar="S", type=seed, default=42, help="of the draws and the random weights (42)")
    parser.add_argument("--json", metavar="FILE|-", help="write the results as JSON; - prints it instead of the tables")
    parser.add_argument("--quick", action="store_true", help="small batches and few repeats: under 30 seconds")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace, device: torch.device, trained: Checkpoint, progress: Progress) -> dict[str, Any]:
    """All results, as they stand in the JSON; where names differ, nothing after the equality."""
    model, config = trained.model.to(device), trained.model.config
    results: dict[str, Any] = {
        "device": harness.machine(device),
        "torch": torch.__version__,
        "dtype": "float32",
        "compiled": compilable(device),
        "model": {
            "checkpoint": "default",
            "kernel_sizes": list(config.kernel_sizes),
            "context": model.context,
            "n_embd": config.n_embd,
            "n_hidden": list(config.n_hidden),
            "vocab_size": config.vocab_size,
            "parameters": parameters(model),
            "seed": args.seed,
        },
        "equality": equality(args, device, trained, progress),
    }
    if not results["equality"]["equal"]:
        return results
    methods = methods_of(args, device, trained)
    results["methods"] = method_rows(args, methods, device, progress)
    results["latency"], narrow = latency_rows(args, device, trained, progress)
    results["growth"] = [
        growth_row(layers, args, device) for layers in progress.track(growth_levels(args), description="growth")
    ]
    results["limits"] = limits(results, narrow, methods["sample"], model, device)
    return results


def parameters(model: torch.nn.Module) -> int:
    """How many numbers a model has learned."""
    return sum(p.numel() for p in model.parameters())


# Ways to draw

Step = Callable[[Tensor], Tensor]  # reads tokens `(batch,)` and gives the logits of what follows, `(batch, vocab)`
Draw = Callable[[Tensor, Tensor, Tensor], Tensor]  # probabilities `(batch, vocab)`, names, positions -> `(batch,)`


def sample_windows(tree: reference.Sequential, count: int, batch: int, draw: Draw) -> list[list[int]]:
    """`count` names, `batch` of them side by side: one call of the tree on all their windows a character.

    A row whose name ends begins another one at once; when all have begun, rows that end are taken out.
    """
    device, batch = tree.layers[-1].weight.device, min(batch, count)
    windows = torch.zeros(batch, reference.context_of(tree), dtype=torch.int64, device=device)
    names, places = torch.arange(batch, device=device), torch.zeros(batch, dtype=torch.int64, device=device)
    tokens, begun = torch.zeros(count, LONGEST, dtype=torch.int64, device=device), batch
    while len(names):
        drawn = draw(tree(windows).softmax(1), names, places)
        tokens[names, places] = drawn
        windows, places = torch.cat([windows[:, 1:], drawn[:, None]], 1), places + 1
        ended = ((drawn == 0) | (places == LONGEST)).nonzero()[:, 0]
        if not len(ended):
            continue
        fresh, over = ended[: count - begun], ended[count - begun :]
        names[fresh] = torch.arange(begun, begun + len(fresh), device=device)
        windows[fresh], places[fresh], begun = 0, 0, begun + len(fresh)
        if len(over):
            going = torch.ones_like(names, dtype=torch.bool)
            going[over] = False
            windows, names, places = windows[going], names[going], places[going]
    lengths = (tokens > 0).sum(1)
    rows = tokens[:, : int(lengths.max())].tolist()
    return [row[:length] for row, length in zip(rows, lengths.tolist())]


def generator_of(seed: int, device: torch.device) -> torch.Generator:
    """The device's generator, begun anew."""
    return torch.Generator(device).manual_seed(seed)


def by_multinomial(seed: int, device: torch.device) -> Draw:
    """Draws as the lecture does."""
    generator = generator_of(seed, device)
    return lambda probs, names, places: torch.multinomial(probs, 1, generator=generator)[:, 0]


def by_inverse_cdf(seed: int) -> Draw:
    """Draws with the uniform numbers that `sample` takes for these names and positions."""

    def draw(probs: Tensor, names: Tensor, places: Tensor) -> Tensor:
        summed = probs.cumsum(1)
        return (summed / summed[:, -1:] <= uniform(seed, names, places)[:, None]).sum(1)

    return draw


def window_step(tree: reference.Sequential, window: Tensor) -> Step:
    """Reads a token into a window `(1, context)` and runs the tree on it."""

    def step(tokens: Tensor) -> Tensor:
        nonlocal window
        window = torch.cat([window[:, 1:], tokens[:, None]], 1)
        return tree(window)

    return step


def peer_step(peer: Peer) -> Step:
    """The peer's streaming mode, which keeps what its convolutions have read; it takes one row."""
    return lambda tokens: peer.tcn.inference(peer.embedding(tokens[:, None]).transpose(1, 2))[..., 0]


def drawing(step: Step, token: Tensor, generator: torch.Generator) -> harness.Call:
    """One call is one character: a step, and a draw whose outcome the next step reads."""

    def character() -> Tensor:
        nonlocal token
        token = torch.multinomial(step(token).softmax(1), 1, generator=generator)[:, 0]
        return token

    return character


def new_peer(config: WaveNetConfig, seed: int, device: torch.device) -> Peer:
    """The installed peer with random weights and nothing read."""
    torch.manual_seed(seed)
    return Peer(config).eval().to(device)


# Equality


def equality(args: argparse.Namespace, device: torch.device, trained: Checkpoint, progress: Progress) -> dict[str, Any]:
    """Every method's names against those of the lecture's loop in float64, with the same uniform numbers.

    `sample` in float32 too: it promises the names of float64. Then the logits of the streams whose growth is timed,
    against their windows', in float32.
    """
    count, ways = 40 if args.quick else 200, [(batch, False) for batch in (1, *batches_of(OUR_BATCHES, args, device))]
    ways += [(1, True)] * compilable(device)
    task = progress.add_task("equality", total=2 + len(ways) + len(growth_levels(args)) * len(COMPARED_BATCHES))
    tree = reference.from_conv(trained.model).to(device=device, dtype=torch.float64)

    def uniforms(name: int, position: int) -> float:
        return float(uniform(args.seed, torch.tensor([name]), torch.tensor([position])))

    expected = lecture.sample_loop(tree, count, lecture.inverse_cdf(uniforms), max_length=LONGEST)
    progress.advance(task)
    found = {"windows": sample_windows(tree, count, count // 4, by_inverse_cdf(args.seed))}
    progress.advance(task)
    for batch, compiled in ways:
        for dtype in (torch.float64, torch.float32):
            names = sample(
                *(trained.model, trained.vocab, max(count, batch)),  # few names would not be drawn as a batch's are
                **dict(max_length=LONGEST, seed=args.seed, batch=batch, device=device, dtype=dtype),
                compiled=compiled,
            )
            way = f"sample, {'compiled' if compiled else f'batch {batch:,}'}, {str(dtype)[6:]}"
            found[way] = [tokens_of(name, trained) for name in names[:count]]
        progress.advance(task)
    different = {method: differing(names, expected) for method, names in found.items()}
    differences = []
    for layers in growth_levels(args):
        for batch in COMPARED_BATCHES:
            differences.append(stream_difference(layers, batch, args, device))
            progress.advance(task)
    worst = float(torch.tensor(differences).max())  # NaN where there is one
    return {
        "equal": not any(different.values()) and worst <= TOLERANCE[torch.float32],
        "names": count,
        "characters": characters_of(expected),
        "different_names": different,
        "max_abs_diff": worst,
        "tolerance": TOLERANCE[torch.float32],
    }


def compilable(device: torch.device) -> bool:
    """Whether a name alone can be drawn in compiled loops."""
    return compiled_loops(device, torch.float32) is not None


def batches_of(batches: dict[str, tuple[int, ...]], args: argparse.Namespace, device: torch.device) -> tuple[int, ...]:
    """The batches of names that a method is tried at; with `--quick` the first two."""
    return batches[device.type][: 2 if args.quick else None]


def tokens_of(name: str, trained: Checkpoint) -> list[int]:
    """The tokens of a name's characters, its end not among them."""
    return trained.vocab.encode([name], context=1)[0][0, 1:].tolist()


def differing(names: Sequence[list[int]], expected: Sequence[list[int]]) -> int:
    """How many names are not what they should be; missing ones are not."""
    same = sum(name == other for name, other in zip(names, expected))
    return max(len(names), len(expected)) - same


def characters_of(names: Sequence[Sequence]) -> int:
    """Characters that were drawn for these names, the `.` at their ends among them."""
    return sum(min(len(name) + 1, LONGEST) for name in names)


def growth_levels(args: argparse.Namespace) -> Sequence[int]:
    """Layers of the models whose growth is timed; with `--quick` every third."""
    return GROWTH_LAYERS[:: 3 if args.quick else 1]


def growth_model(layers: int, args: argparse.Namespace, device: torch.device) -> ConvWaveNet:
    """Kernel sizes of 2, the lecture's widths and random weights: context `2 ** layers`."""
    torch.manual_seed(args.seed)
    return ConvWaveNet(WaveNetConfig(kernel_sizes=(2,) * layers)).eval().to(device)


def stream_difference(layers: int, batch: int, args: argparse.Namespace, device: torch.device) -> float:
    """The largest difference of a stream's logits from the tree's, after a random context that fills its state."""
    model = growth_model(layers, args, device)
    tokens = torch.randint(1, model.config.vocab_size, (batch, model.context), device=device)
    stream, tree = Stream(model, batch), window_step(reference.from_conv(model), tokens)
    stream.push(F.pad(tokens, (1, 0)), torch.full((batch,), model.context))
    following = torch.randint(1, model.config.vocab_size, (COMPARED_STEPS, batch), device=device)
    return float(torch.stack([(stream.step(token) - tree(token)).abs().max() for token in following]).max())


# The methods


def methods_of(args: argparse.Namespace, device: torch.device, trained: Checkpoint) -> dict[str, Method]:
    """Every method with the trained weights; the installed peer, whose weights are random, last.

    The same seed each time, so that a method draws the same names in every call. `sample` gives strings, and makes its
    tables anew in every call; the others give tokens and are given models that are ready: in their favour.
    """
    tree = reference.from_conv(trained.model)
    folded_tree = reference.from_conv(fold_batch_norm(trained.model))
    few, many = (40, 200) if args.quick else (300, 2_000)

    def loop(_: int) -> list[list[int]]:
        draw = lecture.multinomial(generator_of(args.seed, device))
        return lecture.sample_loop(tree, few, draw, max_length=LONGEST)

    def loop_with_gradients(_: int) -> list[list[int]]:
        with torch.enable_grad():
            return loop(_)

    def windows_of(tree: reference.Sequential) -> Callable[[int], list[list[int]]]:
        return lambda batch: sample_windows(tree, 4 * batch, batch, by_multinomial(args.seed, device))

    def ours(batch: int, count: int = many, compiled: bool = False) -> list[str]:
        return sample(
            *(trained.model, trained.vocab, max(count, 4 * batch)),
            **dict(max_length=LONGEST, seed=args.seed, batch=batch, device=device, dtype=torch.float32),
            compiled=compiled,
        )

    methods = {
        "loop": Method(loop, (1,)),
        "loop_with_gradients": Method(loop_with_gradients, (1,)),
        "windows": Method(windows_of(tree), batches_of(WINDOW_BATCHES, args, device)),
        "windows_folded": Method(windows_of(folded_tree), batches_of(WINDOW_BATCHES, args, device)),
        "sample_one_by_one": Method(lambda batch: ours(batch, compiled=compilable(device)), (1,)),
        "sample_one_by_one_in_pytorch": Method(lambda batch: ours(batch, few), (1,)),
        "sample": Method(ours, batches_of(OUR_BATCHES, args, device)),
    }
    if TCN is not None:
        peer = new_peer(trained.model.config, args.seed, device)
        names = loop(1)
        methods[PEER] = Method(lambda _: sample_peer(peer, names[: few // 2], args.seed, device), (1,))
    return methods


def sample_peer(peer: Peer, names: list[list[int]], seed: int, device: torch.device) -> list[list[int]]:
    """The peer draws as many characters for each name as these have, its weights being random; gives `names`."""
    generator, start = generator_of(seed, device), torch.zeros(1, dtype=torch.int64, device=device)
    for name in names:
        peer.tcn.reset_buffers()
        character = drawing(peer_step(peer), start, generator)
        for _ in range(characters_of([name])):
            character()
    return names


def method_rows(
    args: argparse.Namespace, methods: dict[str, Method], device: torch.device, progress: Progress
) -> list[dict[str, Any]]:
    """Names and characters a second of every method at its best batch, and of the peer."""
    rounds = 3 if args.quick else 7
    sizes = max(len(method.sizes) for method in methods.values())
    task = progress.add_task("methods", total=1 + sizes + rounds)
    drawn: dict[str, Sequence[Sequence]] = {}

    def timed(batches: dict[str, int], calls: int = 1) -> dict[str, list[float]]:
        def call(name: str, batch: int) -> harness.Call:
            return lambda: drawn.update({name: methods[name].run(batch)})

        turn = {name: call(name, batch) for name, batch in batches.items()}
        return time_calls(turn, calls, device, block=1, tick=lambda: progress.advance(task))

    timed({name: method.sizes[0] for name, method in methods.items()})
    tried: dict[str, dict[int, float]] = {name: {} for name in methods}
    for index in range(sizes):
        turn = {name: method.sizes[index] for name, method in methods.items() if index < len(method.sizes)}
        for name, times in timed(turn).items():
            tried[name][turn[name]] = len(drawn[name]) / times[0] * 1e6
    best = {name: max(rates, key=rates.get) for name, rates in tried.items()}
    samples = timed(best, rounds)
    rates = {name: [len(drawn[name]) / time * 1e6 for time in times] for name, times in samples.items()}
    rows = []
    for name, of in rates.items():
        count, characters = len(drawn[name]), characters_of(drawn[name])
        row = {"method": name, "batch": best[name], "names": count, "characters": characters, "calls": len(of)}
        row["median_us"] = statistics.median(samples[name])
        row |= with_quartiles("names_per_second", of)
        row["characters_per_second"] = row["names_per_second"] * characters / count
        row |= with_quartiles("times_loop", [rate / loop for rate, loop in zip(of, rates["loop"])])
        row["tried_names_per_second"] = tried[name]
        rows.append(row)
    if TCN is None:
        return [*rows, missing_peer()]
    rows[-1]["installed"] = True
    return rows


def with_quartiles(name: str, values: Sequence[float]) -> dict[str, float]:
    """The median under `name`, and the quartiles beside it."""
    q1, median, q3 = quartiles(values)
    return {name: median, f"q1_{name}": q1, f"q3_{name}": q3}


def missing_peer() -> dict[str, Any]:
    """The peer's row where it is not installed."""
    return {"method": PEER, "installed": False, "message": NOT_INSTALLED}


# One character


def latency_rows(
    args: argparse.Namespace, device: torch.device, trained: Checkpoint, progress: Progress
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Microseconds of one character's logits at batch 1, tokens ready on the device; and of a narrow stream.

    The narrow stream has the same layers, one channel wide: hardly any arithmetic, so its time is that of the calls.
    """
    model = trained.model
    folded = fold_batch_norm(model)
    tree, folded_tree = reference.from_conv(model), reference.from_conv(folded)
    token = torch.ones(1, dtype=torch.int64, device=device)
    window = torch.ones(1, model.context, dtype=torch.int64, device=device)
    config = WaveNetConfig(model.config.vocab_size, n_embd=1, n_hidden=1, kernel_sizes=model.config.kernel_sizes)
    stream, narrow = Stream(model), Stream(ConvWaveNet(config).eval().to(device))
    methods: dict[str, harness.Call] = {
        "tree": lambda: tree(window),
        "tree_folded": lambda: folded_tree(window),
        "slid": lambda: folded(window),
        "stream": lambda: stream.step(token),
    }
    sizes = {name: (parameters(model), model.context) for name in methods}
    sizes["tree_folded"] = sizes["slid"] = (parameters(folded), model.context)
    if TCN is not None:
        peer = new_peer(model.config, args.seed, device)
        step = peer_step(peer)
        methods[PEER] = lambda: step(token)
        sizes[PEER] = (parameters(peer), peer.receptive_field)
    launches = {name: harness.count_launches(call, device) for name, call in methods.items()}
    methods["narrow"] = lambda: narrow.step(token)
    calls = 400 if args.quick else 4_000
    time_calls(methods, 40, device)
    task = progress.add_task("latency", total=-(-calls // 20))
    samples = time_calls(methods, calls, device, tick=lambda: progress.advance(task))
    rows = []
    for name, times in samples.items():
        row = {"method": name, **with_quartiles("us", times), "p99_us": statistics.quantiles(times, n=100)[98]}
        row["calls"] = len(times)
        if name in sizes:
            row |= dict(zip(("parameters", "receptive_field"), sizes[name])) | {"launches": launches[name]}
        rows.append(row)
    narrow_row = rows.pop()
    if TCN is None:
        return [*rows, missing_peer()], narrow_row
    rows[-1]["installed"] = True
    return rows, narrow_row


# Growth


def growth_row(layers: int, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """A character at context `2 ** layers`, drawn from windows, from folded windows, from a stream and by `sample`.

    At batch 1, and then with many names: folded windows at the best of several batch sizes against a stream. `sample`
    draws one string that never ends, what it prepares counted in.
    """
    model = growth_model(layers, args, device)
    model.head.bias[0] = -1e4
    vocab, compiled = Vocabulary("abcdefghijklmnopqrstuvwxyz"), compilable(device)
    length = GROWTH_CHARACTERS[compiled and not args.quick]
    trees = {"windows": reference.from_conv(model), "windows_folded": reference.from_conv(fold_batch_norm(model))}
    with CountingNodes(model.config.n_hidden) as counted:
        trees["windows"](torch.zeros(1, model.context, dtype=torch.int64, device=device))

    def call(method: str, batch: int) -> harness.Call:
        token = torch.zeros(batch, dtype=torch.int64, device=device)
        window = token[:, None].expand(-1, model.context)
        step = Stream(model, batch).step if method == "stream" else window_step(trees[method], window)
        return drawing(step, token, generator_of(args.seed, device))

    def rows(samples: dict[str, list[float]], batches: dict[str, int]) -> list[dict[str, Any]]:
        of = [{"method": method, "batch": batches[method], "calls": len(times)} for method, times in samples.items()]
        for row, times in zip(of, samples.values()):
            row |= with_quartiles("us_per_character", [time / row["batch"] for time in times])
        return of

    def timed(batches: dict[str, int], calls: int, block: int) -> list[dict[str, Any]]:
        methods = {method: call(method, batch) for method, batch in batches.items()}
        time_calls(methods, block, device, block=block)
        return rows(time_calls(methods, calls, device, block=block), batches)

    def one_string() -> list[str]:
        return sample(model, vocab, 1, max_length=length, seed=args.seed, batch=1, device=device, compiled=compiled)

    if len(one_string()[0]) != length:
        raise WaveNetConvError(f"context {model.context}: the string that `sample` draws ended early")
    alone = {method: 1 for method in ("windows", "windows_folded", "stream", "sample")}
    methods = {method: call(method, 1) for method in list(alone)[:3]}
    samples: dict[str, list[float]] = {method: [] for method in alone}
    for _ in range(3 if args.quick else 7):  # so that a slow moment of the machine is every method's
        for method, times in time_calls(methods, 30, device, block=30).items():
            samples[method] += times
        [time] = time_calls({"sample": one_string}, 1, device, block=1)["sample"]
        samples["sample"].append(time / length)
    one = rows(samples, alone)
    sizes = sorted({max(1, tokens // model.context) for tokens in WINDOW_TOKENS[device.type]})
    tried = [row for size in sizes for row in timed({"windows_folded": size}, 1, 1)]
    best = min(tried, key=lambda row: row["us_per_character"])["batch"]
    many = timed({"windows_folded": best, "stream": GROWTH_BATCH}, 3 if args.quick else 15, 3)
    windows, folded, stream, drawn, best_folded, best_stream = (row["us_per_character"] for row in one + many)
    return {
        "context": model.context,
        "layers": layers,
        "nodes_per_character": {"windows": sum(counted.nodes), "stream": layers},
        "tabulated_layers": SharedNodes(model).tabulated,
        "times_windows": windows / drawn,
        "times_windows_folded": folded / drawn,
        "times_windows_same_draw": windows / stream,
        "times_windows_folded_many": best_folded / best_stream,
        "one": one,
        "many": many,
    }


# The distance to the limit

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm, aten.baddbmm_}


class CountingProducts(TorchDispatchMode):
    """Inside the `with`, counts the multiply-adds of PyTorch's matrix products, in `multiply_adds`."""

    multiply_adds = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in PRODUCTS:
            left, right = [argument for argument in args if isinstance(argument, Tensor)][-2:]
            self.multiply_adds += left.numel() * right.shape[-1]
        return func(*args, **(kwargs or {}))


def smallest_operator(device: torch.device) -> float:
    """Microseconds of an operator on one number."""
    number = torch.zeros(1, device=device)
    call = {"add": lambda: number.add_(1)}
    time_calls(call, 100, device)
    return quartiles(time_calls(call, 1_000, device)["add"])[1]


def costliest(call: harness.Call, device: torch.device) -> dict[str, float]:
    """The operators in which one call spends most of its time, without those that they call, and their shares of it."""
    on_cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda) as profiler:
        call()
    own = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    times = {row.key: getattr(row, own) for row in profiler.key_averages()}
    first = sorted(times, key=times.get, reverse=True)[:5]
    return {name: times[name] / sum(times.values()) for name in first}


def limits(
    results: dict[str, Any], narrow: dict[str, Any], best: Method, model: ConvWaveNet, device: torch.device
) -> dict[str, Any]:
    """What a step at batch 1 and a run at the best batch need at least for their calls and for their multiply-adds."""
    rate, operator = harness.matmul_rate(device), smallest_operator(device)
    step = next(row for row in results["latency"] if row["method"] == "stream")
    row = next(row for row in results["methods"] if row["method"] == "sample")
    tabulated = SharedNodes(model).tabulated
    work = shared_multiply_adds(model.config, [0] * tabulated + [1] * (len(model.config.kernel_sizes) - tabulated))
    with CountingProducts() as counted:
        best.run(row["batch"])
    launches = harness.count_launches(lambda: best.run(row["batch"]), device)
    shares = costliest(lambda: best.run(row["batch"]), device)
    return {
        "matmul_multiply_adds_per_second": rate,
        "smallest_operator_us": operator,
        "step": {
            "us": step["us"],
            "narrow_us": narrow["us"],
            "launches": step["launches"],
            **near(step["us"], narrow["us"], work, rate),
        },
        "sample": {
            "us": row["median_us"],
            "batch": row["batch"],
            "launches": launches,
            "costliest_operators": shares,
            "multiply_adds_per_character": counted.multiply_adds / row["characters"],
            **near(row["median_us"], launches * operator, counted.multiply_adds, rate),
        },
    }


def near(us: float, calls_us: float, multiply_adds: int, rate: float) -> dict[str, Any]:
    """The shares of a time that the calls and the multiply-adds need at least, and which is half of it or more."""
    calls, operations = calls_us / us, multiply_adds / rate * 1e6 / us
    return {
        "multiply_adds": multiply_adds,
        "share_of_launches": calls,
        "share_of_matmul_rate": operations,
        "near": "neither" if max(calls, operations) < 0.5 else "launches" if calls >= operations else "operations",
    }


# Tables


def print_tables(results: dict[str, Any]) -> None:
    """The results on stdout, as tables that are Markdown too."""
    console = Console(width=400, highlight=False, soft_wrap=True)  # a table that wraps is no Markdown
    model, equal = results["model"], results["equality"]
    different = ", ".join(f"{name} {count:,}" for name, count in equal["different_names"].items() if count) or "none"
    console.print(
        f"{results['device']}, PyTorch {results['torch']}, {results['dtype']}; the model that ships: kernel sizes "
        f"{model['kernel_sizes']}, embedding {model['n_embd']}, hidden {model['n_hidden']}, {model['parameters']:,} "
        f"parameters.",
        f"{'Equal' if equal['equal'] else 'NOT EQUAL'} to the lecture's loop in float64, {equal['names']:,} names, "
        f"{equal['characters']:,} characters from the same uniform numbers, of the windows and of sample at every "
        f"batch, in float32 too; names that differ: {different}. Streams of context {2 ** GROWTH_LAYERS[0]:,} to "
        f"{2 ** GROWTH_LAYERS[-1]:,} against the tree: largest difference "
        f"{equal['max_abs_diff']:.2g}, tolerance {equal['tolerance']:g}.",
        sep="\n",
    )
    if equal["equal"]:
        for title, table, remark in (methods_table(results), latency_table(results), growth_table(results)):
            console.print("", title, table, remark, sep="\n")


def methods_table(results: dict[str, Any]) -> tuple[str, Table, str]:
    """Every way to draw names, and which limit ours is near."""
    table = table_of(
        *("method", "batch", "names", "names/s", "quartiles", "characters/s", "x loop", "quartiles of x loop")
    )
    for row in results["methods"]:
        if "message" in row:
            table.add_row(row["method"], row["message"], *["-"] * 6)
            continue
        table.add_row(
            row["method"],
            f"{row['batch']:,}",
            f"{row['names']:,}",
            f"{row['names_per_second']:,.0f}",
            f"{row['q1_names_per_second']:,.0f} to {row['q3_names_per_second']:,.0f}",
            f"{row['characters_per_second']:,.0f}",
            f"{row['times_loop']:,.2f}",
            f"{row['q1_times_loop']:,.2f} to {row['q3_times_loop']:,.2f}",
        )
    best = results["limits"]["sample"]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in best["costliest_operators"].items())
    one_by_one = "in compiled loops" if results["compiled"] else "in PyTorch too, as Numba is not installed"
    remark = (
        f"Characters: the `.` at the end of a name among them. loop, windows and {PEER} draw by torch.multinomial and "
        f"give tokens; sample gives strings, one by one {one_by_one}, and its tables are made anew in every call. "
        f"{PEER} has random weights and draws as many characters for each name as the loop.\n"
        f"Limit of sample at batch {best['batch']:,}: {best['launches']:,} launches need at least "
        f"{best['share_of_launches']:.0%} of its {best['us'] / 1e3:,.0f} ms, its "
        f"{best['multiply_adds_per_character']:,.0f} multiply-adds a character {best['share_of_matmul_rate']:.1%} at "
        f"the rate of a matrix product, {results['limits']['matmul_multiply_adds_per_second'] / 1e9:,.0f} billion a "
        f"second: near {NEAR[best['near']]}. Of the time in operators: {shares}."
    )
    return "Names", table, remark


def latency_table(results: dict[str, Any]) -> tuple[str, Table, str]:
    """One character's logits at batch 1, and which limit a step is near."""
    step = results["limits"]["step"]
    table = table_of(
        *("method", "parameters", "receptive field", "launches", "median us", "quartiles", "p99 us"),
        "stream is faster by",
    )
    for row in results["latency"]:
        if "message" in row:
            table.add_row(row["method"], row["message"], *["-"] * 6)
            continue
        table.add_row(
            row["method"],
            f"{row['parameters']:,}",
            str(row["receptive_field"]),
            str(row["launches"]),
            f"{row['us']:.1f}",
            f"{row['q1_us']:.1f} to {row['q3_us']:.1f}",
            f"{row['p99_us']:.1f}",
            f"{row['us'] / step['us']:.2f}",
        )
    remark = (
        f"Launches: operators of PyTorch on the CPU, kernels on CUDA; a stream's compiled loops are none. Each "
        f"of {PEER}'s blocks holds two convolutions, so it has more parameters and sees more tokens. Without the draw; "
        f"tokens are tensors on the device beforehand.\n"
        f"Limit of a step: its calls alone, on a model of the same layers one channel wide, take "
        f"{step['narrow_us']:.1f} of its {step['us']:.1f} us ({step['share_of_launches']:.0%}); its "
        f"{step['multiply_adds']:,} multiply-adds {step['share_of_matmul_rate']:.1%} at the rate of a matrix product: "
        f"near {NEAR[step['near']]}."
    )
    return "One character's logits, batch 1", table, remark


def growth_table(results: dict[str, Any]) -> tuple[str, Table, str]:
    """Nodes and time a character as the context grows."""
    table = table_of(
        *("context", "windows: nodes a character", "us", "folded: us", "stream: nodes a character", "us"),
        *("sample: us", "quartiles", "x windows", "x windows_folded", "many, folded: batch", "us"),
        *(f"stream, {GROWTH_BATCH}: us", "quartiles", "x windows_folded"),
    )
    for row in results["growth"]:
        nodes, (windows, folded, one, drawn), (best, many) = row["nodes_per_character"], row["one"], row["many"]
        table.add_row(
            *(f"{row['context']:,}", f"{nodes['windows']:,}", us_cells(windows)[0], us_cells(folded)[0]),
            *(f"{nodes['stream']:,}", us_cells(one)[0], *us_cells(drawn)),
            *(f"{row['times_windows']:,.2f}", f"{row['times_windows_folded']:,.2f}"),
            *(f"{best['batch']:,}", us_cells(best)[0], *us_cells(many), f"{row['times_windows_folded_many']:,.2f}"),
        )
    remark = (
        f"Microseconds a character at batch 1, then of many names: the windows at their best batch, the stream at "
        f"{GROWTH_BATCH}. Kernel sizes of 2, random weights; a character is its logits and a draw, by torch.multinomial but "
        f"for sample. Of the stream's layers the lowest {results['growth'][0]['tabulated_layers']} are looked up in a "
        f"table. One name's step reads every layer's weights for one row; the nodes of a window share them."
    )
    return "Growth with the context", table, remark


def us_cells(row: dict[str, Any]) -> tuple[str, str]:
    """Microseconds a character, and their quartiles."""
    low, high = row["q1_us_per_character"], row["q3_us_per_character"]
    return f"{row['us_per_character']:,.1f}", f"{low:,.1f} to {high:,.1f}"


if __name__ == "__main__":
    sys.exit(main())
