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
Figure = Callable[[Results], str]  # may raise where a section is missing


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
    print("\n124 and 137: the step was stopped at its limit.\n")
    runs: dict[str, Results] = {}
    for name in BENCHMARKS:
        file = out / f"{name}.json"
        runs[name] = json.loads(file.read_text()) if file.exists() else {}
        print(f"- {name}: {state(runs[name])}")
    print("\n| question | measured |\n| --- | --- |")
    for question, (name, figure) in HEADLINES.items():
        try:
            print(f"| {question} | {figure(runs[name])} |")
        except (KeyError, IndexError, TypeError, ZeroDivisionError):
            print(f"| {question} | not measured |")
    return 0


def state(results: Results) -> str:
    """Whether a run is there, has ended, and whether its results are equal."""
    if not results:
        return "no results"
    equal = "equal" if results.get("equality", {}).get("equal") else "NOT EQUAL"
    kernels = ", ".join(results.get("triton_kernels") or []) or "none"
    text = f"{'finished' if results['finished'] else 'NOT FINISHED'}, {equal}, Triton kernels that ran: {kernels}"
    return text if is_real(results["device"]) else f"{text}; NO MEASUREMENTS, since the device is not real"


def row_of(rows: list[Results], **wanted: Any) -> Results:
    """The last row with these entries; raises `IndexError` if there is none."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())][-1]


def times(section: str, method: str, rival: str) -> Figure:
    """How many times as fast a method is as a rival."""

    def figure(results: Results) -> str:
        ours, other = (row_of(results[section], method=name)["us"] for name in (method, rival))
        return f"{other / ours:.2f} times: {ours:.1f} us against {other:.1f}"

    return figure


def growth(context: int) -> Figure:
    """How many times as fast the pass is as windows, at this context."""

    def figure(results: Results) -> str:
        row = row_of(results["growth"], context=context)
        windows, slid = (part["us_per_position"] for part in row["methods"])
        return f"{row['time_ratio']:.2f} times: {slid:.4f} us per position against {windows:.4f}"

    return figure


def scoring(way: str) -> Figure:
    """Positions per second of a way to score."""
    return lambda results: (
        f"{row_of(results['on_device']['rows'], method=way)['positions_per_second'] / 1e9:.3f} billion"
    )


def step(results: Results) -> str:
    """A training step on 256 names against windows."""
    rows = results["throughput"]
    ours, windows = (row_of(rows, method=name, names=256)["ms"] for name in ("shared", "windows"))
    return f"{windows / ours:.2f} times: {ours:.2f} ms against {windows:.2f}"


def drawing(results: Results) -> str:
    """Names per second against windows."""
    rows = results["methods"]
    ours, windows = (row_of(rows, method=name)["names_per_second"] for name in ("sample", "windows_folded"))
    return f"{ours / windows:.2f} times: {ours:,.0f} names per second against {windows:,.0f}"


def training(results: Results) -> str:
    """Training against the lecture's loop."""
    return f"{results['times_faster']:.1f} times"


# The questions of docs/gpu.md, in its words; then what it does not ask. Each with the benchmark that answers it.
HEADLINES: dict[str, tuple[str, Figure]] = {
    "one name: `slid` against `windows_folded`": ("slide", times("one_name", "slid", "windows_folded")),
    "one name: `slid_graph` against `windows`": ("slide", times("one_name", "slid_graph", "windows")),
    "one name: `slid_graph` against `loop`": ("slide", times("one_name", "slid_graph", "loop")),
    "growth: `slid` against `windows` at context 8": ("slide", growth(8)),
    "growth: `slid` against `windows` at context 1,024": ("slide", growth(1024)),
    "positions/s, scored in the device": ("score", scoring("in the device")),
    "positions/s, from a list of strings": ("score", scoring("from a list of strings")),
    "positions/s, from an Arrow column": ("score", scoring("from an Arrow column")),
    "a training step on 256 names: `shared` against `windows`": ("train", step),
    "`Stream`, one row: `stream_graph` against `stream`": ("sample", times("latency", "stream_graph", "stream")),
    "drawing names: `sample` against `windows_folded`": ("sample", drawing),
    "training to the lecture's loss: our recipe against the lecture's": ("train", training),
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
