"""`python -m benchmarks.score` in real processes: equality first, counts that can be counted again, failing well."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from benchmarks import score
from benchmarks.score import distinct_names, exact_scores, limit, shared_bytes, shared_multiply_adds
from wavenet_conv import Vocabulary, WaveNetConfig
from wavenet_conv.checkpoint import load_checkpoint
from wavenet_conv.scoring import Scorer

COUNT = 2_500
SMALL = ["--quick", "--device", "cpu", "--count", str(COUNT)]


def benchmark(*arguments):
    command = [sys.executable, "-m", "benchmarks.score", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ)


def spans_of(names, context=8):
    """All spans of 2, 4 and 8 tokens, by layer."""
    padded = ["." * context + name for name in names]
    return [[name[i : i + span] for name in padded for i in range(len(name) - span + 1)] for span in (2, 4, 8)]


@pytest.fixture(scope="module")
def used(names):
    """Every tenth of the names in the file that `results` is made of."""
    return names[::100][::10]


@pytest.fixture(scope="module")
def done(names, tmp_path_factory):
    folder = tmp_path_factory.mktemp("score")
    (folder / "names.txt").write_text("\n".join(names[::100]) + "\n")
    (folder / "score.json").write_text("what was there")
    done = benchmark(*SMALL, "--names", folder / "names.txt", "--json", folder / "score.json")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["names.txt", "score.json"]
    return done, json.loads((folder / "score.json").read_text())


@pytest.fixture(scope="module")
def results(done):
    return done[1]


@pytest.fixture(scope="module")
def rows(results):
    return {row["method"]: row for row in results["methods"]}


def test_it_reports_what_it_ran(results, used):
    assert list(results) == [
        *("device", "torch", "dtype", "model", "names", "equality", "distinct_nodes", "methods", "limits", "growth"),
        "peer",
    ]
    assert results["torch"] == torch.__version__ and results["dtype"] == "float32" and results["device"]
    assert results["model"]["kernel_sizes"] == [2, 2, 2] and results["model"]["n_hidden"] == 128
    positions = sum(len(name) + 1 for name in used)
    assert results["names"] == {"file": "names.txt", "used": len(used), "of": 464, "positions": positions}


def test_equality_is_of_every_method_and_of_trained_weights(results):
    equality = results["equality"]
    assert equality["equal"] and equality["tolerance"] == 2e-5
    assert list(equality["max_abs_diffs"]) == [*score.METHODS, "shared, default model"]
    assert all(0 < difference <= 2e-5 for difference in equality["max_abs_diffs"].values())


def test_the_nodes_of_the_methods_are_the_formulas(results, rows, used):
    positions, spans = results["names"]["positions"], spans_of(used)
    assert list(rows) == list(score.METHODS)
    for method in ("loop", "windows", "windows_folded"):
        assert [n / rows[method]["positions"] for n in rows[method]["nodes"]] == [4, 2, 1]
    assert rows["windows"]["positions"] == rows["shared"]["positions"] == positions
    assert rows["slid"]["nodes"] == [len(layer) for layer in spans]
    distinct = [len(set(layer)) for layer in spans]
    assert results["distinct_nodes"] == distinct
    # Bigrams are tabulated. The windows are numbered, or nearly all distinct and not numbered at all.
    bigrams, fourgrams, windows = rows["shared"]["nodes"]
    assert bigrams == 0 and fourgrams == distinct[1] and windows in (distinct[2], positions)
    vocab_size = results["model"]["vocab_size"]
    tree = 4 * 2 * 24 * 128 + (2 + 1) * 2 * 128 * 128 + 128 * vocab_size
    assert rows["windows"]["multiply_adds_per_position"] == pytest.approx(tree)
    shared = fourgrams * 2 * 128 * 128 + windows * 128 * vocab_size
    assert rows["shared"]["multiply_adds_per_position"] == pytest.approx(shared / positions)
    assert results["limits"]["multiply_adds"] == shared


def test_times_and_limits_are_consistent(results, rows):
    for row in [*rows.values(), results["peer"]]:
        if row.get("installed", True):
            assert 0 < row["q1_us"] <= row["median_us"] <= row["q3_us"]
            assert row["positions_per_second"] == pytest.approx(row["positions"] / row["median_us"] * 1e6)
            assert row["peak_bytes"] is None
    assert rows["shared"]["calls"] == 3 * rows["windows"]["calls"] == 9
    limits = results["limits"]
    operations = limits["multiply_adds"] / limits["matmul_multiply_adds_per_second"]
    memory = limits["bytes"] / limits["copy_bytes_per_second"]
    assert limits["operations_floor_seconds"] == operations and limits["bytes_floor_seconds"] == memory
    assert limits["seconds"] == pytest.approx(rows["shared"]["median_us"] / 1e6)
    assert limits["share_of_floor"] == pytest.approx(max(operations, memory) / limits["seconds"])


def test_growth_counts_what_the_sampled_names_have(results):
    growth, trained = results["growth"], load_checkpoint("default")
    assert [row["names"] for row in growth] == [1_000, COUNT]
    names = distinct_names(trained, COUNT, 42, torch.device("cpu"))
    assert names[:100] == distinct_names(trained, 100, 42, torch.device("cpu"))
    assert names[:100] != distinct_names(trained, 100, 43, torch.device("cpu"))
    assert len(set(names)) == COUNT and all(0 < len(name) <= 20 for name in names)
    for row in growth:
        spans = spans_of(names[: row["names"]])
        assert row["positions"] == len(spans[2])
        assert row["nodes"] == [0, len(set(spans[1])), len(set(spans[2]))]
        assert row["windows_share"] == pytest.approx(len(set(spans[2])) / len(spans[2]))
        assert 0 < row["q1_us_per_name"] <= row["us_per_name"] <= row["q3_us_per_name"]
    assert growth[1]["windows_share"] < growth[0]["windows_share"]


def test_the_peer_is_there_or_says_that_it_is_not(done):
    done, results = done
    peer = results["peer"]
    assert peer["method"] == "pytorch-tcn"
    if peer["installed"]:
        assert peer["receptive_field"] == 1 + 2 * (1 + 2 + 4) and peer["parameters"] > results["model"]["parameters"]
        assert f"{peer['parameters']:,}" in done.stdout
    else:
        assert "not installed: pip install pytorch-tcn" in done.stdout


def test_tables_are_on_stdout_and_progress_on_stderr(done):
    done, _ = done
    assert "Equal to the float64 tree" in done.stdout and "Growth with the number of distinct names" in done.stdout
    assert "sampling" in done.stderr and "sampling" not in done.stdout
    tables = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables) and len(tables) == 7 + 4 + 4


def test_without_the_peer(monkeypatch, tmp_path, capsys, names):
    monkeypatch.setattr(score, "TCN", None)
    (tmp_path / "names.txt").write_text("\n".join(names[:200]))
    assert score.main([*SMALL[:-1], "300", "--names", str(tmp_path / "names.txt"), "--json", "-"]) == 0
    results = json.loads(capsys.readouterr().out)  # nothing but the JSON
    message = "not installed: pip install pytorch-tcn"
    assert results["peer"] == {"method": "pytorch-tcn", "installed": False, "message": message}
    assert [row["names"] for row in results["growth"]] == [300]
    score.print_tables(results)
    assert message in capsys.readouterr().out


def test_models_that_differ_end_it_with_exit_code_1_and_no_timings(monkeypatch, tmp_path, capsys, names):
    def off_by_a_little(*arguments):
        models = random_models(*arguments)
        models.conv.layers[1].conv.weight.data[0, 0, 0] += 0.1  # the tree and the folded models stay as they are
        return models

    random_models = score.random_models
    monkeypatch.setattr(score, "random_models", off_by_a_little)
    (tmp_path / "names.txt").write_text("\n".join(names[:200]))
    target = tmp_path / "score.json"
    assert score.main([*SMALL, "--names", str(tmp_path / "names.txt"), "--json", str(target)]) == 1
    assert "NOT EQUAL" in capsys.readouterr().out
    results = json.loads(target.read_text())
    assert not results["equality"]["equal"] and results["equality"]["max_abs_diff"] > 1e-4
    assert results["equality"]["max_abs_diffs"]["windows"] <= 2e-5
    assert not {"methods", "limits", "growth", "peer"} & set(results)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--names", "missing.txt"], "benchmarks.score: missing.txt: No such file"),
        (["--count", "0"], "--count: '0' is not an integer of at least 1"),
        (["--seed", "-1"], "--seed: '-1' is not an integer from 0"),
        (["--seed", str(2**63)], "is not an integer from 0 to 2**63 - 1"),
        (["--json", "no/such/folder/score.json"], "benchmarks.score: --json no/such/folder/score.json: cannot write"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        pytest.param(
            ["--device", "cuda"],
            "benchmarks.score: --device cuda: this PyTorch sees no CUDA device; run it with --device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA"),
        ),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, message, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    try:
        code = score.main([*SMALL, *arguments])
    except SystemExit as left:
        code = left.code
    out, err = capfd.readouterr()
    assert code == 2 and not out
    assert message in err and (err.startswith("usage") or err.count("\n") == 1)


def test_ctrl_c_is_exit_code_130(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(score, "run", interrupted)
    assert score.main(SMALL) == 130
    assert not capsys.readouterr().out


def test_the_peak_of_a_method_is_what_a_process_of_its_own_held(tmp_path, names):
    (tmp_path / "names.txt").write_text("\n".join(names[:3_000]))
    args = score.parse(["--names", str(tmp_path / "names.txt"), "--seed", "1"])
    with score.harness.progress_bar() as progress:
        peaks = score.peak_memory(args, ["windows"], {"windows": 8192}, torch.device("cpu"), progress)
    # One layer's activations at least: four nodes of 128 channels for each of 8,192 windows, in and out of batch norm.
    assert 8192 * 4 * 128 * 4 < peaks["windows"] < 2**30


def test_the_floors_by_hand():
    config = WaveNetConfig(vocab_size=5, n_embd=4, n_hidden=(6, 7), kernel_sizes=(3, 2))
    assert shared_multiply_adds(config, [10, 20]) == 10 * 2 * 6 * 7 + 20 * 7 * 5
    names = ["ab", "abc"]
    gathered, written = 10 * 3 * (6 * 4 + 8) + 20 * 2 * (7 * 4 + 8), 10 * 2 * 7 * 4 + 20 * 4
    assert shared_bytes(config, [10, 20], names) == gathered + written + (7 + 5 * 2) + 7 * 12 + 2 * 4
    rates = {"matmul_multiply_adds_per_second": 1000.0, "copy_bytes_per_second": 1e12}
    floor = limit(rates, config, [10, 20], names, 10.0)
    assert floor["bound_by"] == "operations" and floor["share_of_floor"] == pytest.approx(1.54 / 10)


def test_exact_scores_are_in_the_order_of_the_names():
    trained = load_checkpoint("default")
    names = ["olivia", "ava", "emma", "ian", "isabella", "mia"]
    with torch.no_grad():
        exact = exact_scores(score.reference.from_conv(trained.model), names, Vocabulary(trained.vocab.characters))
    assert exact.dtype == torch.float64
    assert torch.allclose(exact.float(), Scorer.load("default").score(names), rtol=0, atol=2e-5)
