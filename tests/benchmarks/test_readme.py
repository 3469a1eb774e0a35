"""The README's Python runs as it stands, and its figures are those of the committed runs."""

import importlib
import json
import re
from pathlib import Path

import pytest

from benchmarks.tables import print_page
from wavenet_conv.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def test_the_python_blocks_run(monkeypatch, tmp_path, capsys):
    (tmp_path / "names.txt").write_bytes((ROOT / "names.txt").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) >= 2
    namespace = {}
    for block in BLOCKS:
        exec(block, namespace)
    assert "equal: " in capsys.readouterr().out


def test_the_losses_are_those_of_the_checkpoint_that_ships():
    notes = load_checkpoint("default").notes
    for part, phrase in (("train", "on the training part"), ("validation", "on validation"), ("test", "on test")):
        assert re.search(rf"{notes[part + '_loss']:.3f}( nats (a|per) position)? {phrase}", README), part


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.name)
def test_the_tables_are_those_of_the_committed_runs(file, capsys):
    benchmark = importlib.import_module(f"benchmarks.{file.name.partition('-')[0]}").main.args[0]
    results = json.loads(file.read_text())
    print_page(results, benchmark.tables(results))
    printed = capsys.readouterr().out
    assert printed.count("\n|") > 10
    for line in printed.splitlines():
        assert line.strip() in README, line
