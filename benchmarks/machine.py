"""What a run says of its machine: the device, versions, clocks as found, and the Triton kernels that ran."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.tables import Row

# Of `nvidia-smi`, by our names; MHz, watts and degrees Celsius.
ASKED = {
    "driver": "driver_version",
    "sm_clock": "clocks.sm",
    "memory_clock": "clocks.mem",
    "power_limit": "power.limit",
    "temperature": "temperature.gpu",
}


def machine(device: torch.device) -> str:
    """The device in words, such as "AMD EPYC, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    threads = torch.get_num_threads()
    return f"{model[1] if model else platform.machine()}, {threads} thread{'s' * (threads > 1)}"


def facts(device: torch.device) -> Row:
    """What every file of results says first."""
    found: Row = {"device": machine(device), "torch": torch.__version__, "dtype": "float32"}
    found |= {"cuda": torch.version.cuda, "triton": installed("triton")}
    return found | {"gpu": gpu(device)} if device.type == "cuda" else found


def installed(package: str) -> str | None:
    """The version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def gpu(device: torch.device) -> dict[str, Any]:
    """The driver and the clocks of a GPU as they are now: None for what `nvidia-smi` does not say."""
    command = ["nvidia-smi", f"--query-gpu={','.join(ASKED.values())}", "--format=csv,noheader,nounits"]
    if identity := getattr(torch.cuda.get_device_properties(device), "uuid", None):
        command.append(f"--id=GPU-{identity}")
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        printed = ""
    values: list[Any] = [number(text.strip()) for text in printed.partition("\n")[0].split(",")]
    if len(values) != len(ASKED):
        values = [None] * len(ASKED)
    return dict(zip(ASKED, values))


def number(text: str) -> Any:
    """A number if it is one, None for "[N/A]" and its like, else the text."""
    if not text or text.startswith("["):
        return None
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else text


@contextmanager
def triton_kernels() -> Iterator[set[str]]:
    """The names of the Triton kernels that are launched inside the `with`."""
    ran: set[str] = set()
    try:
        import triton
    except ImportError:
        yield ran
        return
    launch = triton.JITFunction.run

    def run(self: Any, *args: Any, **options: Any) -> Any:
        ran.add(self.fn.__name__)
        return launch(self, *args, **options)

    with patch.object(triton.JITFunction, "run", run):
        yield ran
