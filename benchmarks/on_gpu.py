"""What on_gpu.sh asks of Python: what this machine lacks and has, and the headline figures of a run.

python -m benchmarks.on_gpu check
python -m benchmarks.on_gpu has MODULE
python -m benchmarks.on_gpu summary OUT
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.output import RESULTS, is_real

REQUIRED = ("torch", "numpy", "einops", "rich", "safetensors", "filelock", "pytest", "hypothesis")
OPTIONAL = ("triton", "xdist", "numba", "kenlm", "pytorch_tcn")
BENCHMARKS = ("slide", "score", "sample", "train")

Results = dict[str, Any]


def check() -> int:
    """Prints the versions, or what is missing; returns the exit code."""
    missing = [name for name in REQUIRED if find_spec(name) is None]
    if missing:
        print(f"missing here: {', '.join(missing)}; install them first (`pip install {' '.join(missing)}`)")
        return 2
    import torch

    if not torch.cuda.is_available():
        print(f"PyTorch {torch.__version__} sees no CUDA device here: a driver and a CUDA build of PyTorch are needed")
        return 2
    from benchmarks.machine import gpu, installed, machine

    device = torch.device("cuda")
    found = gpu(device)
    print(machine(device))
    print(f"Python {platform.python_version()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}", end=", ")
    print(f"Triton {installed('triton')}, NumPy {installed('numpy')}, commit {commit()}")
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in found.items()), "(as found)")
    if absent := [name for name in OPTIONAL if find_spec(name) is None]:
        print(f"without {', '.join(absent)}")
    return 0


def commit() -> str:
    """The commit of this checkout, marked where files differ from it; "unknown" without Git."""
    if given := os.environ.get("COMMIT"):
        return given
    command = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def summary(out: Path) -> int:
    """Prints the exit codes and seconds of the steps, then the headline figures that there are."""
    print("\n| step | exit code | seconds | limit |\n| --- | --: | --: | --: |")
    for line in (out / "steps.txt").read_text().splitlines():
        print(f"| {' | '.join(line.split())} |")
    print("\n124 and 137: the step was stopped at its limit.")
    for name in BENCHMARKS:
        file = out / f"{name}.json"
        results = json.loads(file.read_text()) if file.exists() else {}
        print(f"\n{name}: {state(results)}")
        for figure in HEADLINES[name]:
            try:
                print(f"- {figure(results)}")
            except (KeyError, IndexError, StopIteration, TypeError, ZeroDivisionError):
                print(f"- {(figure.__doc__ or '').rstrip('.')}: not measured")
    return 0


def state(results: Results) -> str:
    """Whether a run is there, has ended, and whether its results are equal."""
    if not results:
        return "no results"
    equal = "equal" if results.get("equality", {}).get("equal") else "NOT EQUAL"
    kernels = ", ".join(results.get("triton_kernels") or []) or "none"
    text = f"{'finished' if results['finished'] else 'NOT FINISHED'}, {equal}, Triton kernels that ran: {kernels}"
    return text if is_real(results["device"]) else f"{text}; NO MEASUREMENTS, since the device is not real"


def row_of(results: Results, section: str, method: str) -> Results:
    """The last row of a method in a section."""
    return next(row for row in reversed(results[section]) if row["method"] == method)


def one_name(results: Results) -> str:
    """One name by slid_graph against loop and windows."""
    graph, loop, windows, folded, slid = (
        row_of(results, "one_name", name)["us"] for name in ("slid_graph", "loop", "windows", "windows_folded", "slid")
    )
    ratios = f"{loop / graph:.1f} x loop, {windows / graph:.1f} x windows, {folded / graph:.1f} x windows_folded"
    return f"one name: slid_graph {graph:.1f} us: {ratios}, {slid / graph:.1f} x slid"


def growth(results: Results) -> str:
    """Growth at the longest context."""
    row = results["growth"][-1]
    windows, slid = (part["us_per_position"] for part in row["methods"])
    text = f"context {row['context']:,}: slid {slid:.4f} us per position, windows {windows:.4f}"
    return f"{text}: {row['time_ratio']:.1f} times as fast"


def scoring(results: Results) -> str:
    """Positions per second of scoring."""
    shared, distinct = (row_of(results, "methods", name) for name in ("shared", "windows_distinct"))
    rate = shared["positions_per_second"]
    text = f"the list by Scorer: {rate / 1e6:,.1f} million positions per second"
    return f"{text}, {rate / distinct['positions_per_second']:.1f} x windows_distinct"


def longest_list(results: Results) -> str:
    """Scoring of the longest list."""
    row = results["sizes"][-1]
    us = row["shared"]["us"]
    return f"{row['names']:,} names from strings: {us:.3f} us per name, {row['windows']['us'] / us:.1f} x windows"


def on_device(results: Results) -> str:
    """Scoring in the device, and from an Arrow column."""
    rates = {row["method"]: row["positions_per_second"] / 1e6 for row in results["on_device"]["rows"]}
    return f"million positions per second {', '.join(f'{name}: {rate:,.0f}' for name, rate in rates.items())}"


def drawing(results: Results) -> str:
    """Names per second."""
    ours, windows = (row_of(results, "methods", name)["names_per_second"] for name in ("sample", "windows_folded"))
    return f"sample: {ours:,.0f} names per second, {ours / windows:.1f} x windows_folded"


def step(results: Results) -> str:
    """A training step against windows."""
    row = row_of(results, "throughput", "shared")
    return f"a training step on {row['names']:,} names: {row['ms']:.2f} ms, {row['times_windows']:.2f} x windows"


def training(results: Results) -> str:
    """Training against the lecture's loop."""
    return f"to {results['target']} nats: {results['times_faster']:.1f} times as fast as the lecture's recipe"


HEADLINES: dict[str, tuple[Callable[[Results], str], ...]] = {
    "slide": (one_name, growth),
    "score": (scoring, longest_list, on_device),
    "sample": (drawing,),
    "train": (step, training),
}


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    if arguments == ["check"]:
        return check()
    if len(arguments) == 2 and arguments[0] == "has":
        return int(find_spec(arguments[1]) is None)
    if len(arguments) == 2 and arguments[0] == "summary":
        return summary(Path(arguments[1]))
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
