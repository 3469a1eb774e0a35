"""The training benchmark end to end, on a few names: its checks hold, and its results say what was measured."""

import json

import pytest

from benchmarks import train
from wavenet_conv import training


@pytest.fixture
def small(monkeypatch, tmp_path, names):
    """A list of 61 names with every letter, and trainings of a few steps."""
    monkeypatch.setattr(train, "LECTURE_STEPS", 40)
    monkeypatch.setattr(train, "LECTURE_EVERY", 20)
    monkeypatch.setattr(train, "OUR_EVERY", 2)
    monkeypatch.setattr(train, "BATCHES", (8,))
    monkeypatch.setitem(training.PRESETS, "fast", ({}, training.Recipe(steps=260, batch=16)))
    path = tmp_path / "names.txt"
    path.write_text("\n".join([*names[:60], "abcdefghijklmnopqrstuvwxyz"]))
    return ["--names", str(path), "--device", "cpu", "--quick"]


def test_the_results_are_of_this_run(small, capsys):
    assert train.main([*small, "--target", "3.2", "--json", "-"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["equality"]["equal"] and results["equality"]["largest"] < 1e-12
    assert results["parameters"] == 76_579 and [row["method"] for row in results["throughput"]] == [
        "windows",
        "slid",
        "shared",
    ]
    (row,) = results["trainings"]
    for part in (row["lecture"], row["ours"]):
        assert part["reached"] == (part["validation_loss"] <= 3.2) and part["curve"][-1] == [
            part["steps"],
            part["validation_loss"],
        ]
        assert all(loss > 3.2 for _, loss in part["curve"][:-1])
    assert results["times_faster"] == row["lecture"]["seconds"] / row["ours"]["seconds"]
    train.print_tables(results)
    out = capsys.readouterr().out
    assert "Equal to the float64 tree" in out and f"{results['times_faster']:.1f} times faster" in out


def test_a_target_that_is_not_reached_is_marked(small, capsys):
    assert train.main([*small, "--target", "0.1"]) == 0
    table = capsys.readouterr().out
    assert table.count("|    >") + table.count("| >") + table.count(" >") >= 2 and "ended above the target" in table


def test_a_step_that_differs_ends_the_run(small, capsys, monkeypatch):
    honest = train.total_loss
    monkeypatch.setattr(train, "total_loss", lambda *args: honest(*args) * (1 + 1e-9))
    assert train.main(small) == 1
    out = capsys.readouterr().out
    assert "DIFFERENT from the float64 tree" in out and "ms a step" not in out


def test_wrong_usage(small, capsys, tmp_path):
    assert train.main(["--names", str(tmp_path / "no.txt")]) == 2
    assert train.main([*small, "--json", str(tmp_path)]) == 2
    assert "cannot write there" in capsys.readouterr().err
