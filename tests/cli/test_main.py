"""The `wavenet-conv` command as a whole: it starts fast, runs without POSIX, and works where the wheel is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from helpers import ROOT

import wavenet_conv
from wavenet_conv import names as names_module
from wavenet_conv.cli import COMMANDS

POSIX_ONLY = ["fcntl", "grp", "posix", "pty", "pwd", "resource", "termios", "tty"]
HEAVY = {"matplotlib", "numba", "numpy", "optuna", "rich", "safetensors", "torch"}

START = """
import sys
from wavenet_conv.cli import main

for arguments in [["--help"], ["--version"], [], ["unknown"], *([c, o] for c in sys.argv[1:] for o in ("-h", "--bad"))]:
    try:
        main(arguments)
    except SystemExit as exit:
        print("exit", exit.code, file=sys.stderr)
print("imported", *sys.modules, file=sys.stderr)
"""

# Libraries import some of these modules themselves, and guard it; PyTorch and Optuna are imported before.
WITHOUT_POSIX = """
import sys
import optuna, torch
sys.modules.update(dict.fromkeys(sys.argv[1:], None))
from wavenet_conv import names
from wavenet_conv.cli import main

names.download_lecture_names = lambda url: "no download"
for command in (
    "score list.txt --output scores.tsv --sort",
    "train list.txt -o model.safetensors --n-embd 2 --n-hidden 4 --steps 2",
    "explain --model model.safetensors emma",
    "next --model model.safetensors em",
    "complete --model model.safetensors --width 2 em",
    "sample --model model.safetensors --novel --list list.txt --count 2 --format tsv",
    "find-lr list.txt --steps 2 --batch-size 4",
    "sweep space.toml list.txt --trials 1 --output best.safetensors",
    "page --output page.html",
    "export --onnx model.onnx",
    "lecture-names",
):
    print(command.split()[0], main(command.split()), file=sys.stderr)
"""


def python(*arguments, cwd=None, path=ROOT) -> subprocess.CompletedProcess:
    command, environment = [sys.executable, *map(str, arguments)], os.environ | {"PYTHONPATH": str(path)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_every_public_name_is_there():
    for name in wavenet_conv.__all__:
        assert getattr(wavenet_conv, name) is not None and name in dir(wavenet_conv)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        wavenet_conv.nothing  # noqa: B018


def test_help_version_and_usage_errors_import_nothing_heavy():
    commands = [name.replace("_", "-") for name in COMMANDS]
    done = python("-c", START, *commands)
    *lines, imported = done.stderr.splitlines()
    codes = [int(line.split()[1]) for line in lines if line.startswith("exit ")]
    assert codes == [0, 0, 2, 2, *[0, 2] * len(commands)] and not HEAVY & set(imported.split())
    assert f"wavenet-conv {wavenet_conv.__version__}\n" in done.stdout
    assert all(f"usage: wavenet-conv {command}" in done.stdout for command in commands)


def test_no_module_imports_what_only_posix_has():
    for file in (ROOT / "wavenet_conv").rglob("*.py"):
        assert not re.search(rf"^\s*(import|from) ({'|'.join(POSIX_ONLY)})\b", file.read_text("utf-8"), re.MULTILINE)


def test_lecture_names_prints_the_path(run, monkeypatch, tmp_path):
    monkeypatch.setattr(names_module, "download_lecture_names", lambda url: tmp_path / url.rpartition("/")[2])
    assert run("lecture-names") == (0, f"{tmp_path / 'names.txt'}\n".encode(), "")


COMMANDS_OF_ROWS = pytest.mark.parametrize(
    "arguments", [["score", ROOT / "names.txt", "--limit", 100], ["sample", "--count", 100]], ids=["score", "sample"]
)


def pipe_without_reader():
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


@COMMANDS_OF_ROWS
def test_standard_output_that_takes_no_rows(run, monkeypatch, arguments):
    full = "standard output: No space left on device; the output is not complete"
    for opened, code, message in (
        (pipe_without_reader, 0, ""),
        (partial(open, "/dev/full", "w"), 1, f"wavenet-conv: {full}\n"),
        (nullcontext, 1, "wavenet-conv: standard output is closed; redirect it to a file\n"),
    ):
        with opened() as stdout, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            assert run(*arguments) == (code, b"", message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("score missing.txt", "missing.txt: No such file or directory; give a text file"),
        ("score list.txt --model missing", "--model missing: No such file or directory; give"),
        ("score list.txt --limit 0", "is not an integer of at least 1"),
        ("score list.txt --output list.txt", "is being read; give another one"),
        ("score list.txt --model model --output model", "is being read; give another one"),
        ("score list.txt --output .", "not a regular file in an existing folder"),
        ("score list.txt --device cuda", "--device cuda: PyTorch finds no CUDA device"),
        ("sample --top-p 1.5", "top_p is 1.5"),
        ("sample --prefix abé", "--prefix: name 0 ('abé'): character 'é' at position 2 is not in the vocabulary"),
        ("sample --list list.txt", "--list list.txt: it is read only with --novel"),
    ],
)
def test_wrong_usage_is_rejected_before_anything_is_written(run, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for file in ("list.txt", "model"):
        (tmp_path / file).write_text("emma\n")
    code, out, err = run(*arguments.split())
    assert (code, out) == (2, b"") and message in err and "Traceback" not in err
    assert (tmp_path / "list.txt").read_text() == (tmp_path / "model").read_text() == "emma\n"


@COMMANDS_OF_ROWS
def test_progress_is_on_standard_error_if_that_is_a_terminal(run, monkeypatch, arguments):
    code, expected, err = run(*arguments)
    assert (code, err) == (0, "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # standard error counts as a terminal
    code, out, err = run(*arguments)
    assert (code, out) == (0, expected) and "100 lines, " in err and "━" in err


@pytest.mark.slow
def test_every_command_runs_without_posix_modules(tmp_path):
    (tmp_path / "list.txt").write_text("\n".join(["emma", "olivia", "ava", "mia"] * 5))
    space = "preset = 'fast'\nsteps = 2\neval_every = 2\nn_embd = 2\nn_hidden = 4\nlr = {low = 0.001, high = 0.01}\n"
    (tmp_path / "space.toml").write_text(space)
    done = python("-c", WITHOUT_POSIX, *POSIX_ONLY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"{name.replace('_', '-')} 0\n" in done.stderr, done.stderr


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(tmp_path):
    """With PyTorch and the other dependencies from this environment."""
    source, installed = tmp_path / "source", tmp_path / "installed"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "shared", "*.egg-info"))
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    assert python(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source).returncode == 0
    (wheel,) = tmp_path.glob("*.whl")
    assert python(*pip, "install", "--no-deps", "--target", installed, wheel).returncode == 0
    assert {path.name for path in installed.iterdir() if "-" not in path.name} == {"wavenet_conv", "bin"}
    assert (installed / "wavenet_conv" / "py.typed").exists()
    done = python("-m", "wavenet_conv", "sample", "--count", 2, cwd=tmp_path, path=installed)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2
    done = python("-m", "wavenet_conv", "page", "--output", "page.html", cwd=tmp_path, path=installed)
    assert done.returncode == 0 and (tmp_path / "page.html").stat().st_size > 1e5, done.stderr
    # The guide's first example, in two blocks, needs no `reference`.
    guide = (ROOT / "docs" / "guide.md").read_text("utf-8")
    block = "".join(re.findall(r"```python\n(.*?)```", guide, re.DOTALL)[:2])
    done = python("-c", f"{block}\nimport wavenet_conv; print(wavenet_conv)", cwd=tmp_path, path=installed)
    assert done.returncode == 0 and f"from '{installed}" in done.stdout, done.stderr
