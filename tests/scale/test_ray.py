"""A local Ray cluster of two workers: all rows, once each, with the bits of one process, also when a worker dies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from docs.pages import blocks_in
from helpers import ROOT

from wavenet_conv import Scorer
from wavenet_conv.ray import ScoreColumn

pytestmark = pytest.mark.slow
ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def cluster():
    """Two CPUs for workers, and one that reads and writes."""
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars, context.wait_for_min_actors_s = False, 120  # starts both workers
    yield
    ray.shutdown()


def traced_column():
    """A class inside a function, which Ray sends to workers as it is; they cannot import this module."""

    class Traced(ScoreColumn):
        """Adds the worker's process and threads. The first worker to score dies if `folder` has no file "dead"."""

        def __init__(self, column: str, folder: Path):
            super().__init__(column)
            self.folder = folder
            (folder / f"worker-{os.getpid()}").touch()

        def __call__(self, batch):
            import torch

            try:
                with open(self.folder / "dead", "x") as file:
                    file.write(str(os.getpid()))
                os.kill(os.getpid(), 9)
            except FileExistsError:
                pass
            scored = super().__call__(batch)
            for name, value in (("worker", os.getpid()), ("threads", torch.get_num_threads())):
                scored = scored.append_column(name, [[value] * len(scored)])
            return scored

    return Traced


@pytest.mark.parametrize("dies", [False, True], ids=["both live", "one dies"])
def test_text_in_and_parquet_out(cluster, names, tmp_path, dies):
    names, dead = names[::4], tmp_path / "dead"
    (tmp_path / "in").mkdir()
    for part in range(6):  # a line per name, some of which the model does not know
        lines = [*names[part::6], f"zoë {part}"]
        (tmp_path / "in" / f"{part}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if not dies:
        dead.touch()
    read = ray.data.read_text(str(tmp_path / "in"))
    scored = read.map_batches(
        traced_column(),
        fn_constructor_args=["text", tmp_path],
        compute=ray.data.ActorPoolStrategy(size=2),
        batch_format="pyarrow",
        batch_size=500,
    )
    scored.write_parquet(str(tmp_path / "out"))
    found = pq.read_table(tmp_path / "out").sort_by("text")
    expected = sorted([*names, *(f"zoë {part}" for part in range(6))])
    assert found["text"].to_pylist() == expected
    np.testing.assert_array_equal(found["score"], Scorer.load().score(expected, unknown="nan").numpy())
    assert {*found["threads"].to_pylist()} == {1}  # as Ray gives each worker one CPU
    assert len([*tmp_path.glob("worker-*")]) >= 2
    assert dies == bool(dead.read_text()) and dead.read_text() not in map(str, found["worker"].to_pylist())


def test_the_example_of_the_page(tmp_path):
    """A block of the page with the language `py`, which the quick tests do not run."""
    (block,) = (b for b in blocks_in((ROOT / "docs" / "scale.md").read_text()) if b.language == "py")
    (tmp_path / "names.txt").write_text("emma\nolivia\n")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", block.text], cwd=tmp_path, env=env, check=True, capture_output=True)
    assert sorted(pq.read_table(tmp_path / "scored")["text"].to_pylist()) == ["emma", "olivia"]
