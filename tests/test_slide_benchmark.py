"""`python -m benchmarks.slide` in real processes: it counts what design and theory say, and fails as it should."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, needs_cuda, random_tree

import reference
from benchmarks import slide
from benchmarks.counting import CountingNodes, distinct_nodes, multiply_adds
from wavenet_conv import Vocabulary, fold_batch_norm, from_tree

SMALL = ["--n-embd", "4", "--n-hidden", "8", "--repeats", "20", "--quick", "--device", "cpu"]


def benchmark(*arguments):
    command = [sys.executable, "-m", "benchmarks.slide", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ)


@pytest.fixture(scope="module")
def results():
    done = benchmark(*SMALL, "--json", "-")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def windows_nodes(context, spans, outputs):
    return [context // span * outputs for span in spans]


def slid_nodes(context, spans, length):
    return [length + context + 1 - span for span in spans]


def test_it_reports_what_it_ran(results):
    assert results["torch"] == torch.__version__ and results["dtype"] == "float32" and results["device"]
    assert results["model"]["kernel_sizes"] == [2, 2, 2] and results["model"]["context"] == 8
    assert results["equality"]["equal"] and results["equality"]["max_abs_diff"] < 1e-5


def test_the_nodes_of_one_name_are_the_formulas(results):
    rows = {row["method"]: row for row in results["one_name"]}
    spans = (2, 4, 8)
    for method in ("loop", "windows", "windows_folded"):
        assert rows[method]["nodes"] == windows_nodes(8, spans, 8) == [32, 16, 8]
        assert sum(rows[method]["nodes"]) == 7 * (len("analisa") + 1)
    for method in ("slid_conv1d", "slid_unfolded", "slid"):
        assert rows[method]["nodes"] == slid_nodes(8, spans, 7) == [14, 12, 8]
        assert sum(rows[method]["nodes"]) == 3 * len("analisa") + 13
    assert rows["loop"]["launches"] > rows["windows"]["launches"] > rows["slid"]["launches"] > 0
    assert all(0 < row["q1_us"] <= row["median_us"] <= row["q3_us"] for row in rows.values())
    assert results["distinct_nodes"]["one_name"] == [8, 8, 8]


def test_the_nodes_of_the_whole_list_are_the_formulas(results, names):
    names = names[::10]
    positions = sum(len(name) + 1 for name in names)
    rows = {row["method"]: row for row in results["whole_list"]}
    assert rows["windows"]["positions"] == rows["slid"]["positions"] == positions
    assert rows["windows"]["nodes"] == [4 * positions, 2 * positions, positions]
    per_name = [slid_nodes(8, (2, 4, 8), len(name)) for name in names]
    assert rows["slid"]["nodes"] == rows["slid_conv1d"]["nodes"] == [sum(layer) for layer in zip(*per_name)]
    assert [n / rows["loop"]["positions"] for n in rows["loop"]["nodes"]] == [4, 2, 1]
    assert rows["loop"]["names"] < len(names) == rows["slid"]["names"]
    padded = ["." * 8 + name for name in names]
    spans = [{name[i : i + span] for name in padded for i in range(len(name) - span + 1)} for span in (2, 4, 8)]
    assert results["distinct_nodes"]["whole_list"] == [len(layer) for layer in spans]
    work = (4 * 2 * 4 * 8 + 2 * 2 * 8 * 8 + 2 * 8 * 8) + 8 * 27
    assert rows["windows"]["multiply_adds_per_position"] == pytest.approx(work)


def test_growth_tends_to_the_theory(results):
    assert [row["context"] for row in results["growth"]] == [8, 16, 32, 64, 128, 256, 512, 1024]
    for row in results["growth"]:
        context, (windows, slid) = row["context"], row["methods"]
        spans = [2**layer for layer in range(1, row["layers"] + 1)]
        assert slid["nodes"] == slid_nodes(context, spans, 4096 - context)
        assert windows["nodes"] == windows_nodes(context, spans, windows["positions"])
        assert row["theory_node_ratio"] == (context - 1) / row["layers"]
        assert 0.75 * row["theory_node_ratio"] < row["node_ratio"] <= row["theory_node_ratio"]
        assert row["max_abs_diff"] < 1e-5


def test_tables_on_stdout_and_json_in_a_file(tmp_path):
    target, names = tmp_path / "slide.json", tmp_path / "names.txt"
    target.write_text("what was there")
    names.write_text("".join(f"{a}{b}n\n" for a in "abcdefgh" for b in "aeiouxyz"))
    done = benchmark(*SMALL, "--names", names, "--name", "ben", "--kernel-sizes", "3,2", "--json", target)
    assert done.returncode == 0, done.stderr
    assert "One name, 'ben', 4 positions" in done.stdout and "Growth with the context" in done.stdout
    assert "whole list" in done.stderr
    results = json.loads(target.read_text())
    assert results["model"]["context"] == 6 and results["names"]["of"] == 64
    assert [row["nodes"] for row in results["one_name"]][::5] == [[8, 4], [7, 4]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["names.txt", "slide.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--names", "missing.txt"], "benchmarks.slide: missing.txt: No such file"),
        (["--name", "an4lisa"], "benchmarks.slide: --name an4lisa: the list of names has no character '4'"),
        (["--kernel-sizes", "2,0"], "--kernel-sizes: '0' is not an integer of at least 1"),
        (["--repeats", "few"], "--repeats: 'few' is not an integer of at least 1"),
        (["--json", "no/such/folder/slide.json"], "benchmarks.slide: --json no/such/folder/slide.json: cannot write"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, message):
    done = benchmark(*SMALL, *arguments)
    assert done.returncode == 2 and not done.stdout
    assert message in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.startswith("usage") or done.stderr.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none():
    done = benchmark("--device", "cuda")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == (
        "benchmarks.slide: --device cuda: this PyTorch sees no CUDA device; run it with --device cpu\n"
    )


@needs_cuda
def test_on_cuda():
    done = benchmark(*SMALL[:-2], "--device", "cuda", "--json", "-")
    assert done.returncode == 0, done.stderr
    rows = {row["method"]: row for row in json.loads(done.stdout)["one_name"]}
    assert rows["slid_graph"]["nodes"] == rows["slid"]["nodes"] == [14, 12, 8]
    assert rows["loop"]["launches"] > rows["windows"]["launches"] and rows["slid_graph"]["launches"] > 0
    assert all(0 < row["q1_us"] <= row["median_us"] <= row["q3_us"] for row in rows.values())


def test_models_that_differ_end_it_with_exit_code_1_and_no_timings(monkeypatch, capsys):
    def off_by_a_little(tree):
        conv = from_tree(tree)
        conv.layers[1].conv.weight.data[0, 0, 0] += 0.1
        return conv

    monkeypatch.setattr(slide, "from_tree", off_by_a_little)
    assert slide.main([*SMALL, "--json", "-"]) == 1
    results = json.loads(capsys.readouterr().out)
    assert not results["equality"]["equal"] and results["equality"]["max_abs_diff"] > 1e-4
    assert not {"one_name", "whole_list", "growth"} & set(results)
    assert slide.main(SMALL) == 1
    assert "NOT EQUAL" in capsys.readouterr().out


@pytest.mark.parametrize("gated", [False, True])
def test_nodes_are_counted_and_not_computed_from_a_formula(gated):
    conv = fold_batch_norm(from_tree(random_tree((3, 2), n_embd=4, n_hidden=(5, 6), gated=gated)))
    tree = reference.from_conv(conv)
    tokens = torch.randint(27, (2, 10))
    for call, nodes in (
        (lambda: conv(tokens), [16, 10]),
        (lambda: conv.forward_conv1d(tokens), [16, 10]),
        (lambda: conv(tokens[:, 4:]), [4, 2]),  # one window a name: nothing to slide
        (lambda: reference.window_logits(tree, tokens), [20, 10]),
        (lambda: reference.loop_logits(tree, tokens[:1]), [10, 5]),
        (lambda: None, [0, 0]),
    ):
        with torch.no_grad(), CountingNodes((5, 6)) as counted:
            call()
        assert counted.nodes == nodes
    if gated:  # convolution and residual of every node, skips and head of every output
        work = 16 * (3 * 4 * 10 + 5 * 4) + 10 * (2 * 4 * 12) + 10 * (5 * 4 + 6 * 4 + 4 * 4 + 4 * 27)
    else:
        work = 16 * 3 * 4 * 5 + 10 * 2 * 5 * 6 + 10 * 6 * 27
    assert multiply_adds(conv, [16, 10], 10) == work


def test_the_lectures_distinct_nodes(lecture_list):
    vocab = Vocabulary.from_names(lecture_list)
    by_length = slide.sequences_by_length(lecture_list, vocab, 8, torch.device("cpu"))
    bigrams, fourgrams, windows = distinct_nodes(by_length, (2, 2, 2))
    assert windows == 58_841 and bigrams <= 729 and 21_000 < fourgrams < 23_000
