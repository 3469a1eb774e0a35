"""Files of results: where they may be written, and which of them may be shown."""

from __future__ import annotations

import json
import os
from pathlib import Path

from benchmarks.tables import Row
from wavenet_conv.errors import UsageError
from wavenet_conv.files import write_whole

RESULTS = Path(__file__).parent / "results"  # what the docs are drawn from
NOT_REAL = "pretend"  # how the name of a device begins that only imitates one


def is_real(device: str) -> bool:
    """Whether figures of a device with this name are measurements."""
    return not device.lower().startswith(NOT_REAL)


def target(path: str, device: str) -> Path:
    """The file, links resolved, to which a run on this device may write its results; else raises `UsageError`."""
    file = Path(os.path.realpath(path))
    if file.exists() and not (file.is_file() or file.is_dir()):
        raise UsageError(f"--json {path}: is no regular file, and would be replaced; name a file, or leave it out")
    if file.suffix != ".json":  # it might be a source file, which would be replaced
        raise UsageError(f"--json {path or repr(path)}: name a file that ends in .json, such as results.json")
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise UsageError(f"--json {path}: cannot write there; name a file in a folder that exists")
    published = any(RESULTS.samefile(folder) for folder in file.parents if RESULTS.exists() and folder.exists())
    if published and not is_real(device):
        raise UsageError(f"--json {path}: {device!r} is a device that is not real; write its results elsewhere")
    return file


def write(file: Path, results: Row) -> None:
    """Replaces the file as a whole."""
    write_whole(file, (json.dumps(results, indent=1) + "\n").encode())


def published(file: Path) -> Row:
    """The results in a file; raises `UsageError` if the run did not finish or its device is not real."""
    results = json.loads(file.read_text())
    if not is_real(results["device"]):
        raise UsageError(f"{file}: {results['device']!r} is a device that is not real; its figures are shown nowhere")
    if not results.get("finished", True):  # files of older runs do not say it
        raise UsageError(f"{file}: this run did not finish; run it again")
    return results
