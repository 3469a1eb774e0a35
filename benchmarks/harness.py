"""What every benchmark shares: one command line, fair timing, launches, rates of the machine, JSON by section."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import output
from benchmarks.counting import counting
from benchmarks.machine import facts, gpu, triton_kernels
from benchmarks.tables import Row, Table, print_page
from wavenet_conv import Vocabulary, WaveNetConfig, WaveNetConvError, exact_float32
from wavenet_conv.errors import NamesError, UsageError
from wavenet_conv.names import read_names

# Seconds before each method's turn on the CPU: OpenMP's threads spin for some milliseconds after their work, and would
# take a processor from the next method.
SETTLE = 0.01
OWN_LIST = str(Path(__file__).parent.parent / "names.txt")

Call = Callable[[], Any]
Results = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """A question, how it is answered, and how the answer is printed.

    `run` yields sections of the results; each is in the JSON before the next one begins, and may replace another.
    If `["equality"]["equal"]` is false the exit code is 1 and no tables are printed, unless `["caveat"]` says why that
    proves nothing.
    """

    name: str
    question: str
    run: Callable[[Session], Iterable[Results]]
    tables: Callable[[Results], Iterable[Table]]
    add_options: Callable[[argparse.ArgumentParser], Any] = lambda parser: None
    devices: Sequence[str] = ("auto", "cuda", "cpu")
    default_names: Callable[[], str] | None = None  # the lecture's list; None: this project's


@dataclass
class Session:
    """One run of a benchmark."""

    args: argparse.Namespace
    device: torch.device
    names: list[str]
    vocab: Vocabulary
    progress: Progress
    matmul_rate: float = 0.0  # the most multiply-adds per second that `rows_at_best` has seen: the ceiling
    # A row, the key of a count of launches, what it counts, and whether that needs gradients.
    to_profile: list[tuple[Row, str, Call, bool]] = field(default_factory=list)

    def pick(self, short: Any, full: Any) -> Any:
        """The first, or with `--full` the second."""
        return full if self.args.full else short

    def ticks(self, title: str, total: int) -> Callable[..., None]:
        """A new progress bar; each call of what is returned is one of `total` parts, or as many as it is given."""
        return partial(self.progress.advance, self.progress.add_task(title, total=total))


def main(benchmark: Benchmark, arguments: Sequence[str] | None = None) -> int:
    """Runs a benchmark; returns 0, 1 where results differ or a run fails, 2 for wrong usage, 130 after Ctrl-C."""
    args, file = parse(benchmark, arguments), None
    try:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device cuda: this PyTorch sees no CUDA device; run it with --device cpu")
        device = torch.device("cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu")
        first = facts(device)
        file = None if args.json is None else output.target(args.json, first["device"])
        args.names = args.names or (benchmark.default_names() if benchmark.default_names else OWN_LIST)
        names = read_names(args.names)
        session = Session(args, device, names, Vocabulary.from_names(names), Progress(console=Console(stderr=True)))
        with session.progress, exact_float32(), torch.no_grad():
            for results in growing(benchmark, session, first):
                if file:
                    output.write(file, results)
        equal = results["equality"]["equal"]
        print_page(results, benchmark.tables(results) if equal or "caveat" in results else ())
    except (WaveNetConvError, OSError) as error:
        print(f"benchmarks.{benchmark.name}: {error}", file=sys.stderr)
        return 2 if isinstance(error, (UsageError, NamesError, OSError)) else 1
    except KeyboardInterrupt:
        fix = "; add --resume to go on" if file and "resume" in args else ""
        print(f"benchmarks.{benchmark.name}: interrupted{fix}", file=sys.stderr)
        return 130
    return 0 if equal or results.get("caveat") else 1


def growing(benchmark: Benchmark, session: Session, first: Results) -> Iterator[Results]:
    """The results after each section. Launches come last: profiling must not change what is timed after it."""
    on_cuda, results = session.device.type == "cuda", first | {"finished": False}
    with triton_kernels() as ran:
        for section in benchmark.run(session):
            if on_cuda:
                results |= {"triton_kernels": sorted(ran), "gpu_after": gpu(session.device)}
            results |= section
            yield results
    tick = session.ticks("launches", len(session.to_profile))
    for row, key, call, gradients in session.to_profile:
        with torch.set_grad_enabled(gradients):
            row[key] = count_launches(call, session.device)
        tick()
    yield results | {"finished": True}


def parse(benchmark: Benchmark, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; argparse exits with code 2 for what it cannot read."""
    prog, question = f"python -m benchmarks.{benchmark.name}", benchmark.question.splitlines()[0]
    parser = argparse.ArgumentParser(prog=prog, description=question)
    parser.add_argument("--device", choices=benchmark.devices, default=benchmark.devices[0])
    default = "the lecture's list, if it is here" if benchmark.default_names else "this project's names.txt"
    parser.add_argument("--names", metavar="FILE", help=f"the list of names, one per line ({default})")
    parser.add_argument("--seed", type=positive, default=42, help="of all random numbers (42)")
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON too, into a file that ends in .json")
    parser.add_argument("--full", action="store_true", help="the run of the published tables: all names, more repeats")
    benchmark.add_options(parser)
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or not 0 < int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 1 to 2**63 - 1")
    return int(text)


def time_calls(
    methods: dict[Any, Call],
    calls: int,
    device: torch.device,
    *,
    block: int = 20,
    by_host: bool = False,
    tick: Call = lambda: None,
) -> dict[Any, list[float]]:
    """Times methods fairly, in microseconds of each of at least `calls` calls: they take turns in blocks.

    A slow moment of the machine falls on all of them, and in a block a method finds its own weights in the cache. The
    caller has warmed them up. CUDA is timed by events on the device, the CPU by the clock. `by_host`: CUDA too, until
    the device has done its work: for methods that start from strings or end on the host.
    """
    on_cuda = device.type == "cuda"
    time_block = _time_on_cuda if on_cuda and not by_host else partial(_time_by_clock, device)
    samples: dict[Any, list[float]] = {method: [] for method in methods}
    for _ in range(-(-calls // block)):
        for method, call in methods.items():
            if not on_cuda:
                time.sleep(SETTLE)
            samples[method] += time_block(call, block)
        tick()
    return samples


def now(device: torch.device) -> float:
    """Seconds on the clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _time_by_clock(device: torch.device, call: Call, calls: int) -> list[float]:
    samples = []
    for _ in range(calls):
        start = now(device)
        call()
        samples.append((now(device) - start) * 1e6)
    return samples


def _time_on_cuda(call: Call, calls: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * calls)]
    torch.cuda.synchronize()
    for start, end in zip(events[::2], events[1::2]):
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in zip(events[::2], events[1::2])]


def call_rows(
    methods: dict[str, Call],
    calls: int,
    title: str,
    session: Session,
    key: str = "us",
    block: int = 20,
    unprofiled: Sequence[Any] = (),
) -> list[Row]:
    """Times each method as it is called, all in turn: its microseconds under `key`.

    Its launches are None until everything has been timed, and those of `unprofiled` methods stay so.
    """
    time_calls(methods, block, session.device, block=block)  # to warm up
    tick = session.ticks(title, -(-calls // block))
    samples = time_calls(methods, calls, session.device, block=block, tick=tick)
    rows: list[Row] = [{"method": name, "launches": None, "calls": len(samples[name])} for name in methods]
    for row in rows:
        row |= spread(key, samples[name := row["method"]])
        if name not in unprofiled:
            session.to_profile.append((row, "launches", methods[name], torch.is_grad_enabled()))
    return rows


class Sized(NamedTuple):
    """A method that works in batches: `call(size)` returns how many units it did, such as names or positions."""

    call: Callable[[int], int]
    sizes: Sequence[int] = (1,)


def rows_at_best(
    methods: dict[Any, Sized],
    unit: str,
    config: WaveNetConfig,
    rounds: int,
    title: str,
    session: Session,
    by_host: bool = False,
) -> list[Row]:
    """Times each method at the best of its batch sizes, all in turn, and counts what it computes there.

    Without `--full` the first two sizes are tried per method. A row has what one call does, in units and per unit.
    """
    sizes = {name: method.sizes[: session.pick(2, None)] for name, method in methods.items()}
    tick, done = session.ticks(title, 2 + rounds), {}
    product, multiply_adds = matmul(session.device)

    def round_done() -> None:
        # In turn with the methods, so that a slow moment does not lower the ceiling alone.
        us = min(time_calls({"": product}, 5, session.device, block=5)[""])
        session.matmul_rate = max(session.matmul_rate, multiply_adds / us * 1e6)
        tick()

    def timed(wanted: Iterable[tuple[Any, int]], calls: int) -> dict[tuple[Any, int], list[float]]:
        def call(name: Any, size: int) -> None:
            done[name, size] = methods[name].call(size)

        turns: dict[Any, Call] = {(name, size): partial(call, name, size) for name, size in wanted}
        return time_calls(turns, calls, session.device, block=1, by_host=by_host, tick=round_done)

    timed([(name, tried[0]) for name, tried in sizes.items()], 1)  # to warm up
    costs = timed([(name, size) for name, tried in sizes.items() for size in tried], 1)
    per_unit = {pair: times[0] / done[pair] for pair, times in costs.items()}
    best = [min((pair for pair in per_unit if pair[0] == name), key=lambda pair: per_unit[pair]) for name in methods]
    rows = []
    for (name, size), times in timed(best, rounds).items():
        with counting(config) as counted:
            amount = methods[name].call(size)
        row = {"method": name, "batch": size, f"{unit}s": amount, "calls": len(times), **spread("us", times)}
        row |= spread(f"{unit}s_per_second", [amount / us * 1e6 for us in times])
        row |= spread(f"us_per_{unit}", [us / amount for us in times])
        rows.append(row | {"nodes": counted.nodes, f"multiply_adds_per_{unit}": counted.multiply_adds / amount})
    return rows


def spread(key: str, values: Iterable[float]) -> dict[str, float]:
    """The median under `key`, and the quartiles under `q1_key` and `q3_key`."""
    values = list(values)
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {key: quartiles[1], f"q1_{key}": quartiles[0], f"q3_{key}": quartiles[2]}


def count_launches(call: Call, device: torch.device) -> int | None:
    """Kernels that one call starts on CUDA, operators that it calls from Python on the CPU; None if none are seen."""
    on_cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda) as profiler:
        call()
        now(device)  # when all is done
    events = profiler.events()
    if on_cuda:
        kernels = (event.name for event in events if event.device_type == DeviceType.CUDA)
        return sum(not name.startswith(("Memcpy", "Memset")) for name in kernels) or None
    return sum(event.cpu_parent is None and event.name.startswith("aten::") for event in events) or None


def matmul(device: torch.device) -> tuple[Call, int]:
    """A large float32 matrix product, and its multiply-adds."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device)
    return lambda: a @ b, size**3
