"""`python -m benchmarks.ladder`: every rung runs, the verdict is given only where the published losses apply."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import reference
from benchmarks import ladder
from wavenet_conv import WaveNetConfig, WaveNetConvError, training

RUNG_NAMES = [rung.name for rung in ladder.LECTURE]
TINY = ["--steps", "6", "--workers", "1"]


@pytest.fixture(scope="module")
def list_file(names, tmp_path_factory):
    path = tmp_path_factory.mktemp("ladder") / "names.txt"
    path.write_text("\n".join(names[::1000]) + "\n")
    return path


def benchmark(*arguments):
    command = [sys.executable, "-m", "benchmarks.ladder", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ)


def test_every_rung_of_the_lecture_runs(list_file, names, capsys):
    threads = torch.get_num_threads()
    rungs = ",".join(RUNG_NAMES)
    assert ladder.main([*TINY, "--names", str(list_file), "--rungs", rungs, "--json", "-"]) == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr()
    results = json.loads(printed.out)
    assert list(results) == [*("device", "torch", "dtype", "names", "recipe", "workers", "caveat", "equality", "rungs")]
    used = len(names[::1000])
    assert results["names"]["of"] == used and results["names"]["train"] == int(0.8 * used)
    assert results["recipe"] == {"steps": 6, "batch": 32, "lr": 0.1, "seed": 42} and results["workers"] == 1
    assert results["equality"]["tolerance"] == 0.015 and not results["equality"]["equal"]
    assert "proves nothing" in results["caveat"]
    assert [row["rung"] for row in results["rungs"]] == RUNG_NAMES
    assert [row["context"] for row in results["rungs"]] == [1, 3, 3, 3, 8, 8, 8, 8]
    assert [row["steps"] for row in results["rungs"]] == [0] + [6] * 7
    for row in results["rungs"]:
        assert row["difference"] == row["validation_loss"] - row["published_validation_loss"]
        assert 0 < row["train_loss"] < 40 and row["seconds"] >= 0  # the unscaled rung starts near 27
        assert f"{row['rung']}: train {row['train_loss']:.4f}" in printed.err


@pytest.mark.parametrize("preset", ladder.OURS)
def test_our_presets_are_rungs_without_a_published_loss(preset, list_file, capsys):
    options = ["--steps", "2000", "--workers", "1", "--names", str(list_file), "--rungs", f"ours-{preset}"]
    assert ladder.main([*options, "--json", "-"]) == 0
    results = json.loads(capsys.readouterr().out)
    ladder.print_tables(results | {"caveat": None})
    assert "Nothing is published for these rungs." in capsys.readouterr().out
    (row,) = results["rungs"]
    sizes, recipe = training.PRESETS[preset]
    assert row["steps"] == max(1, recipe.steps // 100) and row["published_validation_loss"] is row["difference"] is None
    assert 0 < row["train_loss"] < 5 and 0 < row["validation_loss"] < 5
    assert row["context"] == WaveNetConfig(**sizes).context and row["parameters"] > 0


def test_a_resumed_ladder_keeps_its_rungs(list_file, tmp_path, capsys):
    path = tmp_path / "ladder.json"
    options = ["--steps", "100", "--workers", "1", "--names", str(list_file), "--json", str(path)]
    assert ladder.main([*options, "--rungs", "bigram"]) == 0
    first = json.loads(path.read_text())["rungs"]
    assert ladder.main([*options, "--rungs", "bigram,mlp-bn", "--resume"]) == 0
    rows = json.loads(path.read_text())["rungs"]
    assert [row["rung"] for row in rows] == ["bigram", "mlp-bn"] and rows[:1] == first
    capsys.readouterr()
    assert ladder.main(["--steps", "50", *options[2:], "--rungs", "bigram,mlp-bn", "--resume"]) == 2
    assert "is of a run with other settings; give another file" in capsys.readouterr().err
    path.write_text("[]")
    assert ladder.main([*options, "--resume"]) == 2
    assert "is no ladder's JSON" in capsys.readouterr().err


def test_a_training_that_breaks_down_is_one_line_and_exit_code_1(list_file, monkeypatch, capsys):
    def break_down(trainer):
        raise WaveNetConvError("it broke down")

    monkeypatch.setattr(training.Trainer, "validate", break_down)
    assert ladder.main([*TINY, "--names", str(list_file), "--rungs", "ours-fast"]) == 1
    assert capsys.readouterr().err.endswith("benchmarks.ladder: it broke down\n")


def test_the_library_splits_as_the_reference_does(names):
    assert training.split_names(names) == reference.split_names(names)


def test_rungs_at_once_are_the_rungs_one_after_another(list_file, tmp_path, capsys):
    options = ["--steps", "6", "--names", list_file, "--rungs", "tree-68,mlp-bn"]
    done = benchmark(*options, "--workers", "2", "--json", tmp_path / "ladder.json")
    assert done.returncode == 0, done.stderr
    assert "| rung " in done.stdout and "proves nothing" in done.stdout
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("| ")][1:] == ["mlp-bn", "tree-68"]
    assert ladder.main([*map(str, options), "--workers", "1", "--json", "-"]) == 0
    alone, at_once = json.loads(capsys.readouterr().out), json.loads((tmp_path / "ladder.json").read_text())
    assert at_once["workers"] == 2
    for row, other in zip(alone["rungs"], at_once["rungs"]):
        assert row | {"seconds": 0} == other | {"seconds": 0}


def test_a_full_run_that_misses_a_published_loss_ends_with_exit_code_1(list_file, monkeypatch, capsys):
    monkeypatch.setattr(ladder, "STEPS", 6)
    monkeypatch.setattr(ladder, "LECTURE_SHA256", hashlib.sha256(list_file.read_bytes()).hexdigest())
    options = [*TINY, "--names", str(list_file), "--rungs", "mlp-bn"]
    assert ladder.main(options) == 1
    assert "NOT every rung is within 0.015 nats" in capsys.readouterr().out
    monkeypatch.setattr(ladder, "TOLERANCE", 10.0)
    assert ladder.main(options) == 0
    assert "Every rung is within 10.0 nats" in capsys.readouterr().out


def test_a_full_run_on_another_list_has_no_verdict(list_file, monkeypatch, capsys):
    monkeypatch.setattr(ladder, "STEPS", 6)
    assert ladder.main([*TINY, "--names", str(list_file), "--rungs", "mlp-bn"]) == 0
    assert "Not the lecture's list" in capsys.readouterr().out


def test_the_rate_drops_where_the_rung_says_scaled_to_the_steps(list_file, monkeypatch):
    drops = {}
    monkeypatch.setattr(reference, "train", lambda tree, X, Y, **options: drops.update(options))
    for name, drop_at in (("mlp-10-200", 50), ("wide", 75)):
        options = ["--steps", "100", "--workers", "1", "--names", str(list_file), "--rungs", name, "--json", "-"]
        assert ladder.main(options) == 0
        assert drops["drop_at"] == drop_at and drops["lr"] == 0.1 and drops["batch"] == 32


def test_the_bigram_model_is_the_counts_raised_by_one():
    rung = ladder.LECTURE[0]
    outcome = ladder.count_bigrams(ladder.Job(rung, ["ab", "aa"], ["b"], "ab", 0))
    # After `.`: a twice of 2, so 3/5 for a, 1/5 for b and for the end; after a: ., a, b once each; after b: . once.
    train = torch.tensor([3 / 5, 2 / 6, 2 / 4, 3 / 5, 2 / 6, 2 / 6]).log().mean()
    assert outcome.train == pytest.approx(-float(train))
    assert outcome.validation == pytest.approx(-float(torch.tensor([1 / 5, 2 / 4]).log().mean()))
    assert outcome[:3] == (9, 1, 0)


def test_the_lectures_floor(lecture_list):
    args = ladder.parse(["--rungs", "bigram", "--names", "lecture"])
    outcome = ladder.count_bigrams(*ladder.jobs_of(args, lecture_list))
    assert outcome.parameters == 729 and abs(outcome.validation - 2.454) < ladder.TOLERANCE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--names", "missing.txt"], "benchmarks.ladder: missing.txt: No such file"),
        (["--rungs", "mlp-bn,deep"], "--rungs: no rung is called 'deep'; there are bigram, "),
        (["--steps", "0"], "--steps: '0' is not an integer of at least 1"),
        (["--workers", "many"], "--workers: 'many' is not an integer of at least 1"),
        (["--json", "no/such/folder/ladder.json"], "--json no/such/folder/ladder.json: cannot write there"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, message, list_file, capsys):
    try:
        code = ladder.main([*TINY, "--names", str(list_file), *arguments])
    except SystemExit as left:
        code = left.code
    printed = capsys.readouterr()
    assert code == 2 and not printed.out and message in printed.err
    assert printed.err.startswith("usage") or printed.err.count("\n") == 1


def test_a_list_too_short_to_split_is_refused(tmp_path, capsys):
    (tmp_path / "names.txt").write_text("emma\nolivia\n")
    assert ladder.main([*TINY, "--names", str(tmp_path / "names.txt")]) == 2
    assert "2 names leave nothing to validate on; give at least 10" in capsys.readouterr().err


def test_without_a_list_it_asks_for_the_lectures(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WAVENET_CONV_LECTURE_NAMES", str(tmp_path / "nothing"))
    assert ladder.main(TINY) == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmarks.ladder: the published losses are of the lecture's list, which is not here: run")
    assert "WAVENET_CONV_LECTURE_NAMES" in error and error.count("\n") == 1
