"""`python -m benchmarks.sample` in real processes: equality first, counts that can be counted again, failing well."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, loops

from benchmarks import sample
from wavenet_conv.checkpoint import load_checkpoint

SMALL = ["--quick", "--device", "cpu"]
METHODS = [
    *("loop", "loop_with_gradients", "windows", "windows_folded"),
    *("sample_one_by_one", "sample_one_by_one_in_pytorch", "sample", "pytorch-tcn"),
]


def benchmark(*arguments):
    command = [sys.executable, "-m", "benchmarks.sample", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ)


@pytest.fixture
def smaller(monkeypatch):
    """A benchmark of two contexts and small batches, to run in this process."""
    monkeypatch.setattr(sample, "GROWTH_LAYERS", range(3, 5))
    monkeypatch.setattr(sample, "WINDOW_BATCHES", {"cpu": (16,)})
    monkeypatch.setattr(sample, "OUR_BATCHES", {"cpu": (64,)})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    (folder / "sample.json").write_text("what was there")
    done = benchmark(*SMALL, "--json", folder / "sample.json")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir()] == ["sample.json"]
    return done, json.loads((folder / "sample.json").read_text())


@pytest.fixture(scope="module")
def results(done):
    return done[1]


@pytest.fixture(scope="module")
def rows(results):
    return {row["method"]: row for row in results["methods"]}


def test_it_reports_what_it_ran(results):
    assert list(results) == [
        *("device", "torch", "dtype", "compiled", "model", "equality", "methods", "latency", "growth", "limits"),
    ]
    assert results["compiled"] == (loops is not None)
    assert results["torch"] == torch.__version__ and results["dtype"] == "float32" and results["device"]
    assert results["model"]["kernel_sizes"] == [2, 2, 2] and results["model"]["n_hidden"] == [128] * 3
    assert results["model"]["parameters"] == 76_579


def test_equality_is_of_every_batch_and_of_long_contexts(results):
    equality = results["equality"]
    ways = [f"batch {batch:,}" for batch in (1, *sample.OUR_BATCHES["cpu"][:2])] + ["compiled"] * (loops is not None)
    assert equality["equal"] and equality["names"] == 40 and equality["characters"] > 200
    ours = [f"sample, {way}, {dtype}" for way in ways for dtype in ("float64", "float32")]
    assert equality["different_names"] == dict.fromkeys(["windows", *ours], 0)
    assert 0 < equality["max_abs_diff"] <= equality["tolerance"] == 1e-5


def test_rates_are_names_over_times(results, rows):
    assert list(rows) == METHODS
    assert rows["loop"]["times_loop"] == 1 and rows["loop"]["names"] == rows["loop_with_gradients"]["names"] == 40
    assert rows["loop"]["characters"] == rows["loop_with_gradients"]["characters"]
    for method, row in rows.items():
        if not row.get("installed", True):
            continue
        assert row["names_per_second"] == pytest.approx(row["names"] / row["median_us"] * 1e6)
        assert row["q1_names_per_second"] <= row["names_per_second"] <= row["q3_names_per_second"]
        assert row["q1_times_loop"] <= row["times_loop"] <= row["q3_times_loop"]
        assert row["characters_per_second"] / row["names_per_second"] == pytest.approx(row["characters"] / row["names"])
        assert 4 < row["characters"] / row["names"] < 10, method  # a name of the list has 7.1
        assert row["calls"] == 3 and str(row["batch"]) in row["tried_names_per_second"]
    assert rows["sample"]["names"] == max(200, 4 * rows["sample"]["batch"])


def test_latency_says_what_each_model_is(results):
    latency = {row["method"]: row for row in results["latency"]}
    assert list(latency) == ["tree", "tree_folded", "slid", "stream", "pytorch-tcn"]
    peer = latency.pop("pytorch-tcn")
    assert {row["receptive_field"] for row in latency.values()} == {8}
    assert latency["tree"]["parameters"] == latency["stream"]["parameters"] == 76_579
    # Of a layer's batch norm, gamma goes into the weights and beta becomes the bias.
    assert latency["slid"]["parameters"] == latency["tree_folded"]["parameters"] == 76_579 - 3 * 128
    if peer["installed"]:
        assert peer["receptive_field"] == 1 + 2 * (1 + 2 + 4) and peer["parameters"] > 76_579
        latency["pytorch-tcn"] = peer
    for row in latency.values():
        assert 0 < row["q1_us"] <= row["us"] <= row["q3_us"] <= row["p99_us"] and row["calls"] == 400
    assert latency["tree"]["launches"] > latency["tree_folded"]["launches"] > 0


def test_growth_counts_a_tree_against_its_layers(results):
    growth = results["growth"]
    assert [row["context"] for row in growth] == [2**layer for layer in (3, 6, 9, 12)]
    for row in growth:
        assert row["nodes_per_character"] == {"windows": row["context"] - 1, "stream": row["layers"]}
        assert row["tabulated_layers"] == 1  # 729 bigrams
        assert [method["method"] for method in row["one"]] == ["windows", "windows_folded", "stream", "sample"]
        assert [method["method"] for method in row["many"]] == ["windows_folded", "stream"]
        assert {method["batch"] for method in row["one"]} == {1} and row["many"][1]["batch"] == sample.GROWTH_BATCH
        windows, folded, stream, drawn, *many = (method["us_per_character"] for method in row["one"] + row["many"])
        assert row["times_windows"] == windows / drawn and row["times_windows_folded"] == folded / drawn
        assert row["times_windows_same_draw"] == windows / stream
        assert row["times_windows_folded_many"] == many[0] / many[1]


def test_the_limits_are_of_the_measured_times(results, rows):
    limits = results["limits"]
    rate, step, best = limits["matmul_multiply_adds_per_second"], limits["step"], limits["sample"]
    assert step["us"] == next(row["us"] for row in results["latency"] if row["method"] == "stream")
    assert step["multiply_adds"] == 2 * 128 * 128 + 128 * 27  # bigrams are in a table, products with both taps kept
    assert step["share_of_launches"] == pytest.approx(step["narrow_us"] / step["us"])
    assert best["us"] == rows["sample"]["median_us"] and best["batch"] == rows["sample"]["batch"]
    assert best["share_of_launches"] == pytest.approx(best["launches"] * limits["smallest_operator_us"] / best["us"])
    for part in (step, best):
        assert part["share_of_matmul_rate"] == pytest.approx(part["multiply_adds"] / rate * 1e6 / part["us"])
        shares = {"launches": part["share_of_launches"], "operations": part["share_of_matmul_rate"]}
        assert part["near"] == (max(shares, key=shares.get) if max(shares.values()) >= 0.5 else "neither")
    assert len(best["costliest_operators"]) == 5 and 0 < sum(best["costliest_operators"].values()) <= 1
    # Each window's own products at most, and the products of few where names begin alike.
    assert 0 < best["multiply_adds_per_character"] < 2 * 126_336


def test_tables_are_on_stdout_and_progress_on_stderr(done):
    done, results = done
    assert "Equal to the lecture's loop" in done.stdout and "Limit of a step" in done.stdout
    assert "latency" in done.stderr and "latency" not in done.stdout
    tables = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables) and len(tables) == 2 + 8 + 2 + 5 + 2 + 4
    peer = results["latency"][-1]
    assert (f"{peer['parameters']:,}" if peer["installed"] else peer["message"]) in done.stdout


def test_without_the_peer(smaller, monkeypatch, capsys):
    monkeypatch.setattr(sample, "TCN", None)
    assert sample.main([*SMALL, "--json", "-"]) == 0
    results = json.loads(capsys.readouterr().out)  # nothing but the JSON
    missing = {"method": "pytorch-tcn", "installed": False, "message": "not installed: pip install pytorch-tcn"}
    assert results["methods"][-1] == results["latency"][-1] == missing
    sample.print_tables(results)
    assert capsys.readouterr().out.count(missing["message"]) == 2


@pytest.mark.parametrize("wrong", ["one name", "a missing name", "a logit"])
def test_what_differs_ends_it_with_exit_code_1_and_no_timings(wrong, smaller, monkeypatch, tmp_path, capsys):
    def other_names(*args, **kwargs):
        names = ours(*args, **kwargs)
        if kwargs["batch"] != 64:
            return names
        return names[:39] if wrong == "a missing name" else [names[0] + "a", *names[1:]]

    class OtherStream(sample.Stream):
        def step(self, tokens):
            logits = super().step(tokens)
            logits[0, 3] = torch.nan
            return logits

    ours = sample.sample
    if wrong == "a logit":
        monkeypatch.setattr(sample, "Stream", OtherStream)
    else:
        monkeypatch.setattr(sample, "sample", other_names)
    target = tmp_path / "sample.json"
    assert sample.main([*SMALL, "--json", str(target)]) == 1
    assert "NOT EQUAL" in capsys.readouterr().out
    results = json.loads(target.read_text())
    assert not results["equality"]["equal"] and list(results)[-1] == "equality"
    different = results["equality"]["different_names"]
    assert sum(different.values()) == (0 if wrong == "a logit" else 2)  # in both dtypes
    assert {method for method, count in different.items() if count} <= {
        f"sample, batch 64, {dtype}" for dtype in ("float64", "float32")
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "--seed: '-1' is not an integer from 0"),
        (
            ["--json", "no/such/folder/sample.json"],
            "benchmarks.sample: --json no/such/folder/sample.json: cannot write",
        ),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["emma"], "unrecognized arguments: emma"),
        pytest.param(
            ["--device", "cuda"],
            "benchmarks.sample: --device cuda: this PyTorch sees no CUDA device; run it with --device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA"),
        ),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, message, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    try:
        code = sample.main([*SMALL, *arguments])
    except SystemExit as left:
        code = left.code
    out, err = capfd.readouterr()
    assert code == 2 and not out
    assert message in err and (err.startswith("usage") or err.count("\n") == 1)


def test_ctrl_c_is_exit_code_130(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "run", interrupted)
    assert sample.main(SMALL) == 130
    assert not capsys.readouterr().out


@pytest.mark.skipif(sample.TCN is None, reason="needs the peer: pip install pytorch-tcn")
def test_the_peer_streams_what_it_computes_at_once():
    peer = sample.new_peer(load_checkpoint("default").model.config, 0, torch.device("cpu"))
    tokens = torch.randint(1, 27, (1, 30), generator=torch.Generator().manual_seed(0))
    step = sample.peer_step(peer)
    with torch.no_grad():
        streamed = torch.stack([step(token) for token in tokens.t()], 1)
        assert torch.allclose(streamed, peer(tokens), rtol=0, atol=1e-6)


def test_windows_draw_a_name_on_whatever_row_it_stands():
    trained = load_checkpoint("default")
    tree = sample.reference.from_conv(trained.model).to(dtype=torch.float64)
    with torch.no_grad():
        alone = sample.sample_windows(tree, 50, 1, sample.by_inverse_cdf(7))
        assert len(alone) == 50 and all(0 not in name for name in alone)
        for batch in (7, 50, 64):
            assert sample.sample_windows(tree, 50, batch, sample.by_inverse_cdf(7)) == alone


def test_names_that_do_not_end_are_cut(monkeypatch):
    trained = load_checkpoint("default")
    tree = sample.reference.from_conv(trained.model)
    monkeypatch.setattr(sample, "LONGEST", 4)
    with torch.no_grad():
        names = sample.sample_windows(tree, 9, 4, lambda probs, names, places: torch.where(names == 3, 0, names + 1))
    assert names == [[name + 1] * 4 if name != 3 else [] for name in range(9)]
    assert sample.characters_of(names) == 8 * 4 + 1
