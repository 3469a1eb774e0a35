"""What every benchmark shares: one command line, fair timing, launches, rates of the machine, whole JSON files."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.tables import Table, print_page
from wavenet_conv import Vocabulary, WaveNetConvError, exact_float32
from wavenet_conv.files import write_whole
from wavenet_conv.names import read_names

Call = Callable[[], Any]
Results = dict[str, Any]


class UsageError(WaveNetConvError):
    """An option that cannot be carried out on this machine or with this list."""


@dataclass(frozen=True)
class Benchmark:
    """A question, how it is answered, and how the answer is printed.

    `run` returns what goes into the JSON. Where `["equality"]["equal"]` is false the exit code is 1, unless
    `["caveat"]` says why that proves nothing, and no timings are printed. `tables` makes the tables of such results.
    `check` raises a `WaveNetConvError` for options that cannot be carried out, before any work.
    """

    name: str
    question: str
    run: Callable[[Session], Results]
    tables: Callable[[Results], Iterable[Table]]
    add_options: Callable[[argparse.ArgumentParser], Any] = lambda parser: None
    check: Callable[[Session], None] = lambda session: None
    devices: Sequence[str] = ("auto", "cuda", "cpu")
    default_names: Callable[[], str] = lambda: str(Path(__file__).parent.parent / "names.txt")
    gradients: bool = False


@dataclass
class Session:
    """One run of a benchmark: its options, device, names and progress bar."""

    args: argparse.Namespace
    device: torch.device
    names: list[str]
    vocab: Vocabulary
    progress: Progress

    def pick(self, short: Any, full: Any) -> Any:
        """The first, or with `--full` the second."""
        return full if self.args.full else short

    def ticks(self, title: str, total: int) -> Call:
        """A new progress bar; each call of what is returned is one of `total` parts."""
        task = self.progress.add_task(title, total=total)
        return lambda: self.progress.advance(task)


def main(benchmark: Benchmark, arguments: Sequence[str] | None = None) -> int:
    """Runs a benchmark; returns 0, 1 where results differ or a run fails, 2 for wrong usage, 130 after Ctrl-C."""
    args, code = parse(benchmark, arguments), 2
    try:
        device = pick_device(args.device)
        check_writable(args.json)
        args.names = args.names or benchmark.default_names()
        names = read_names(args.names)
        session = Session(args, device, names, Vocabulary.from_names(names), progress_bar())
        benchmark.check(session)
        code = 1
        head = {"device": machine(device), "torch": torch.__version__, "dtype": "float32"}
        with session.progress, exact_float32(), torch.set_grad_enabled(benchmark.gradients):
            results: Results = {**head, **benchmark.run(session)}
        if args.json != "-":
            shown = results["equality"]["equal"] or "caveat" in results
            print_page(results, benchmark.tables(results) if shown else ())
        text = json.dumps(results, indent=1)
        if args.json == "-":
            print(text)
        elif args.json is not None:
            write_whole(args.json, (text + "\n").encode())
    except (WaveNetConvError, OSError) as error:
        print(f"benchmarks.{benchmark.name}: {error}", file=sys.stderr)
        return code
    except KeyboardInterrupt:
        return 130
    return 0 if results["equality"]["equal"] or results.get("caveat") else 1


def parse(benchmark: Benchmark, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; argparse exits with code 2 for what it cannot read."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{benchmark.name}", description=benchmark.question.splitlines()[0]
    )
    parser.add_argument("--device", choices=benchmark.devices, default=benchmark.devices[0])
    parser.add_argument("--names", metavar="FILE", help="the list of names, one per line")
    parser.add_argument("--seed", type=seed, default=42, help="of all random numbers (42)")
    parser.add_argument("--json", metavar="FILE|-", help="write the results as JSON; - prints JSON and no tables")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", dest="full", action="store_false", help="fewer names and repeats (the default)")
    length.add_argument("--full", action="store_true", help="the run of the published tables")
    parser.set_defaults(full=False)
    benchmark.add_options(parser)
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def seed(text: str) -> int:
    """An integer that every generator takes."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 to 2**63 - 1")
    return int(text)


def pick_device(name: str) -> torch.device:
    """The device of `--device`; raises `UsageError` for CUDA where there is none."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UsageError("--device cuda: this PyTorch sees no CUDA device; run it with --device cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def machine(device: torch.device) -> str:
    """The device in words, such as "AMD EPYC, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {torch.get_num_threads()} threads"


def progress_bar() -> Progress:
    """A progress bar on stderr, so that stdout holds results only."""
    columns = (TextColumn("{task.description:<12}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    return Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))


def check_writable(path: str | None) -> None:
    """Rejects `--json`'s argument where it cannot be written; raises `UsageError`."""
    if path not in (None, "-") and (Path(path).is_dir() or not os.access(Path(path).absolute().parent, os.W_OK)):
        raise UsageError(f"--json {path}: cannot write there; name a file in a folder that exists")


def time_calls(
    methods: dict[Any, Call], calls: int, device: torch.device, *, block: int = 20, tick: Call = lambda: None
) -> dict[Any, list[float]]:
    """Times methods fairly: they take turns in blocks, so that a slow moment of the machine falls on all of them.

    The caller has warmed them up. CUDA is timed by events on the device, the CPU by the clock. In a block a method
    finds its own weights in the cache. Returns the microseconds of each call per method, of at least `calls` calls;
    `tick` is called after each round.
    """
    samples: dict[Any, list[float]] = {method: [] for method in methods}
    for _ in range(-(-calls // block)):
        for method, call in methods.items():
            samples[method] += _time_on_cuda(call, block) if device.type == "cuda" else _time_on_cpu(call, block)
        tick()
    return samples


def _time_on_cpu(call: Call, calls: int) -> list[float]:
    samples = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e6)
    return samples


def _time_on_cuda(call: Call, calls: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    torch.cuda.synchronize()
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in events]


def time_at_best(
    calls: dict[str, Callable[[int], Any]],
    sizes: dict[str, Sequence[int]],
    session: Session,
    rounds: int,
    amount: Callable[[Any], float] = lambda result: 1,
) -> tuple[dict[str, int], dict[str, list[float]]]:
    """Times each method at the best of its batch sizes, all methods in turn.

    `calls` take a batch size, and `amount` says how much a result is, where that depends on the size. Without `--full`
    the first two of its sizes are tried per method. Returns the best size and the microseconds of each of `rounds`
    calls at that size, per method.
    """
    sizes = {method: tried[: session.pick(2, None)] for method, tried in sizes.items()}
    tick = session.ticks("methods", 2 + rounds)
    done: dict[tuple[str, int], float] = {}

    def call(method: str, size: int) -> None:
        done[method, size] = amount(calls[method](size))

    def timed(wanted: Iterable[tuple[str, int]], repeats: int) -> dict[tuple[str, int], list[float]]:
        turn: dict[tuple[str, int], Call] = {(m, n): partial(call, m, n) for m, n in wanted}
        return time_calls(turn, repeats, session.device, block=1, tick=tick)

    timed([(method, tried[0]) for method, tried in sizes.items()], 1)  # to warm up
    costs = timed([(method, n) for method, tried in sizes.items() for n in tried], 1)
    best = {
        m: min(tried, key={n: costs[m, n][0] / done[m, n] for n in tried}.__getitem__) for m, tried in sizes.items()
    }
    return best, {method: samples for (method, _), samples in timed(best.items(), rounds).items()}


def spread(key: str, values: Iterable[float]) -> dict[str, float]:
    """The median under `key`, and the quartiles under `q1_key` and `q3_key`."""
    values = list(values)
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {key: quartiles[1], f"q1_{key}": quartiles[0], f"q3_{key}": quartiles[2]}


def count_launches(call: Call, device: torch.device) -> int | None:
    """What one call starts, as the profiler sees it: kernels on CUDA, operators called from Python on the CPU.

    None where the profiler sees no kernel at all, as on some machines: unseen is not zero.
    """
    on_cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda) as profiler:
        call()
        if on_cuda:
            torch.cuda.synchronize()
    events = profiler.events()
    if on_cuda:
        kernels = [event.name for event in events if event.device_type == DeviceType.CUDA]
        return sum(not name.startswith(("Memcpy", "Memset")) for name in kernels) or None
    return sum(event.cpu_parent is None and event.name.startswith("aten::") for event in events)


def median_us(call: Call, calls: int, device: torch.device, block: int = 20) -> float:
    """The median time of one call, in microseconds, after a block of calls to warm up."""
    time_calls({"": call}, block, device, block=block)
    return statistics.median(time_calls({"": call}, calls, device, block=block)[""])


def matmul_rate(device: torch.device) -> float:
    """Multiply-adds per second of a large float32 matrix product: the ceiling of every method."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device)
    return size**3 / median_us(lambda: a @ b, 20, device, block=5) * 1e6


def copy_rate(session: Session) -> float:
    """Bytes read and written per second while a large tensor is copied."""
    source = torch.ones(2**28 if session.device.type == "cuda" else session.pick(2**24, 2**26), device=session.device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / median_us(lambda: target.copy_(source), 10, session.device, block=10) * 1e6
