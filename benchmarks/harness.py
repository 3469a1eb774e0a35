"""What every benchmark needs: a device, fair timings, a count of launches, JSON that is whole or not there."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from wavenet_conv import WaveNetConvError
from wavenet_conv.files import write_whole

NAMES = Path(__file__).parent.parent / "names.txt"

Call = Callable[[], Any]


class UsageError(WaveNetConvError):
    """An option that cannot be carried out here."""


def pick_device(name: str) -> torch.device:
    """The device of `--device auto|cuda|cpu`; raises `UsageError` for CUDA where there is none."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UsageError("--device cuda: this PyTorch sees no CUDA device; run it with --device cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def machine(device: torch.device) -> str:
    """The device in words, such as "AMD EPYC, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = (line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name"))
        model = next(models, model)
    return f"{model}, {torch.get_num_threads()} threads"


def time_calls(
    methods: dict[str, Call], calls: int, device: torch.device, *, block: int = 20, tick: Call | None = None
) -> dict[str, list[float]]:
    """Microseconds of each of at least `calls` calls a method; whoever calls this has warmed them up.

    The methods take turns in blocks of calls, so that a slow moment of the machine falls on all of them, and a method
    still finds its own weights in the cache. CUDA is timed by events on the device, the CPU by the clock. `tick` is
    called after every round.
    """
    samples: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(-(-calls // block)):
        for method, call in methods.items():
            samples[method] += _time_on_cuda(call, block) if device.type == "cuda" else _time_on_cpu(call, block)
        if tick is not None:
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


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return q1, median, q3


def count_launches(call: Call, device: torch.device) -> int:
    """Kernels that one call runs on CUDA, operators that it calls from Python on the CPU, as the profiler sees them."""
    on_cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda) as profiler:
        call()
        if on_cuda:
            torch.cuda.synchronize()
    events = profiler.events()
    if on_cuda:
        kernels = [event.name for event in events if event.device_type == DeviceType.CUDA]
        return sum(not name.startswith(("Memcpy", "Memset")) for name in kernels)
    return sum(event.cpu_parent is None and event.name.startswith("aten::") for event in events)


def matmul_rate(device: torch.device) -> float:
    """Multiply-adds a second of a large float32 matrix product on this device: the ceiling of every method."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device)
    call = {"matmul": lambda: a @ b}
    time_calls(call, 5, device, block=5)
    return size**3 / quartiles(time_calls(call, 20, device)["matmul"])[1] * 1e6


def progress_bar() -> Progress:
    """A progress bar on stderr, so that stdout holds results only."""
    columns = (TextColumn("{task.description:<12}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    return Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))


def check_writable(path: str | None) -> None:
    """Refuses `--json`'s argument before any work where it cannot be written; raises `UsageError`."""
    if path not in (None, "-") and (Path(path).is_dir() or not os.access(Path(path).absolute().parent, os.W_OK)):
        raise UsageError(f"--json {path}: cannot write there; name a file in a folder that exists")


def write_json(results: dict[str, Any], path: str) -> None:
    """Prints JSON for "-"; else writes it beside `path` and renames it, so that the file is whole or as it was."""
    text = json.dumps(results, indent=1)
    if path == "-":
        print(text)
        return
    write_whole(path, (text + "\n").encode())


def report(results: dict[str, Any], path: str | None, print_tables: Callable[[dict[str, Any]], None]) -> int:
    """Prints the tables, or the JSON in their place for "-", and writes the file; returns the exit code."""
    if path != "-":
        print_tables(results)
    if path is not None:
        write_json(results, path)
    return 0 if results["equality"]["equal"] else 1
