"""Every block of Python and of shell in the pages runs, and prints what the page says."""

from __future__ import annotations

import doctest
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from docs.pages import PAGES, Block, blocks_in, runs_with_outputs
from helpers import ROOT

import reference
from wavenet_conv import load_checkpoint

CHECKER = doctest.OutputChecker()
# Blocks with these change the environment or run all tests, as `.ci/run` does itself.
SET_UP = ("python3 -m venv", "git clone", "pip install", "python -m pytest", ".ci/run")


# What differs from machine to machine in what `verify` prints.
MEASURED = re.compile(r"largest difference [^;]*")


def notebook():
    """What readers of the README have: the lecture's tree, here with trained weights, and its numbering."""
    stoi = {character: token for token, character in enumerate(".abcdefghijklmnopqrstuvwxyz")}
    return {"model": reference.from_conv(load_checkpoint("default").model), "stoi": stoi}


def id_of(path):
    return path.relative_to(ROOT).as_posix()


def run_blocks(page, path="page.md", capture=None):
    """Runs a page's Python blocks in one namespace; raises AssertionError where one prints something else."""
    namespace = notebook() if Path(path).name == "README.md" else {}
    for block, expected in runs_with_outputs(blocks_in(page)):
        code = compile("\n" * (block.line - 1) + block.text, str(path), "exec")
        exec(code, namespace)
        printed = capture()
        if expected is not None:
            assert CHECKER.check_output(MEASURED.sub("", expected), MEASURED.sub("", printed), doctest.ELLIPSIS), (
                f"{path}, line {block.line}: the block prints\n{printed}\nand the page says\n{expected}"
            )


@pytest.mark.parametrize("path", PAGES, ids=id_of)
def test_the_python_blocks_run_and_print_what_the_page_says(path, monkeypatch, tmp_path, capsys):
    shutil.copy(ROOT / "names.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    run_blocks(path.read_text(), path, lambda: capsys.readouterr().out)


def test_another_output_is_found(capsys):
    page = "```python\nx = 3\nprint(x, 2.51)\n```\n\n```text\n{}\n```\n"
    run_blocks(page.format("3 2.51"), capture=lambda: capsys.readouterr().out)
    run_blocks(page.format("3 2..."), capture=lambda: capsys.readouterr().out)
    with pytest.raises(AssertionError, match=r"page\.md, line 2: the block prints\s+3 2\.51"):
        run_blocks(page.format("3 2.5"), capture=lambda: capsys.readouterr().out)


def shell_blocks():
    """Every shell block that is not set-up, with its page."""
    pairs = [(path, block) for path in PAGES for block in blocks_in(path.read_text()) if block.language == "sh"]
    return [pytest.param(*pair, id=f"{id_of(pair[0])}:{pair[1].line}") for pair in pairs if not is_set_up(pair[1])]


def is_set_up(block: Block) -> bool:
    return any(command in block.text for command in SET_UP)


@pytest.mark.slow
@pytest.mark.parametrize("path, block", shell_blocks())
def test_the_shell_blocks_run(path, block, tmp_path):
    for part in ("wavenet_conv", "reference", "benchmarks", "docs"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("names.txt", "README.md", "mkdocs.yml"):
        shutil.copy(ROOT / file, tmp_path)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = ["bash", "-euo", "pipefail", "-c", block.text]
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, f"{path}, line {block.line}: {ended.stderr[-2000:]}"


@pytest.mark.slow
def test_the_readme_shows_what_explain_prints(tmp_path):
    (shown,) = (block.text for block in blocks_in((ROOT / "README.md").read_text()) if block.text.startswith("char "))
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "wavenet_conv", "explain", "emma"]
    printed = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, check=True).stdout.decode()
    lines = [line.rstrip() for line in printed.splitlines()]
    assert lines[1 : 1 + len(shown.splitlines())] == shown.splitlines()
