"""The choice between rivals: what is measured, what ends a run, and the table of the page."""

import copy
import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

from benchmarks import choosing, networks, rivals
from benchmarks.tables import print_page
from reference.ngram import KneserNey
from wavenet_conv import Scorer, Vocabulary
from wavenet_conv.names import read_names
from wavenet_conv.training import PRESETS, Recipe, split_names

NAMES = read_names(ROOT / "names.txt")[::150]
TRAIN, VALID, _ = split_names(NAMES)
POSITIONS = sum(len(name) + 1 for name in VALID)
VOCAB = Vocabulary.from_names(NAMES)
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "choosing-cpu.json", ROOT / "docs" / "choosing.md"

needs_kenlm = pytest.mark.skipif(importlib.util.find_spec("kenlm") is None, reason="needs KenLM: pip install kenlm")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The options of a short run; trainings and batches are small while this is in use."""
    path = tmp_path_factory.mktemp("lists") / "names.txt"
    path.write_text("\n".join(NAMES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "QUICK_STEPS", 4)
        patch.setattr(rivals, "BATCHES", (8, 16))
        yield ["--names", str(path)]


@pytest.fixture(scope="module")
def results(small, tmp_path_factory):
    """The results of a run with two threads, as if its list were the lecture's."""
    path = tmp_path_factory.mktemp("results") / "out.json"
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        digest = choosing.hashlib.sha256(Path(small[1]).read_bytes()).hexdigest()
        patch.setattr(choosing, "LECTURE_SHA256", digest)
        torch.set_num_threads(2)
        try:
            assert choosing.main([*small, "--json", str(path)]) == 0
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(threads)
    return json.loads(path.read_text())


def test_a_row_per_method_and_number_of_threads(results):
    ngrams, *networks = [row for row in results["methods"] if "threads" in row]
    assert (ngrams["method"], ngrams["threads"], ngrams["context"]) == (rivals.NGRAMS, 1, 5)
    names = ("transformer", "ours-fast", "default")
    assert [(row["method"], row["threads"]) for row in networks] == [(name, n) for name in names for n in (1, 2)]
    assert [row["context"] for row in networks] == [max(map(len, NAMES)) + 1] * 2 + [8] * 4
    assert [row["seconds"] is None for row in networks] == [True, False, True, False, False, True]
    assert {row["batch"] for row in networks[:2]} <= {8, 16} and results["notes"][: rivals.kenlm is not None] == []
    for row in (ngrams, *networks):
        for key in ("positions_per_second", "us"):
            assert 0 < row[f"q1_{key}"] <= row[key] <= row[f"q3_{key}"]


def test_networks_take_the_steps_of_a_short_run_or_of_their_own_recipes(results):
    _, shape, recipe = networks.NETWORKS["transformer-76k"]
    model, full = results["model"], choosing.trained(None)
    assert (model["steps"], model["transformer"]["steps"]) == (4, 4)
    assert (full["steps"], full["transformer"]["steps"]) == (PRESETS["fast"][1].steps, recipe.steps)
    for found in (model, full):
        assert shape.items() <= found["transformer"].items() and found["transformer"]["dropout"] == recipe.dropout


def test_a_recipe_is_shortened_in_its_steps_alone():
    session, recipe = SimpleNamespace(args=SimpleNamespace(seed=7)), Recipe(steps=9, eval_every=2, lr=0.5)
    for steps, expected in ((None, 9), (4, 4)):
        found = rivals.shortened(recipe, steps, session)
        assert found == Recipe(steps=expected, eval_every=expected, lr=0.5, seed=7)


def test_losses_are_those_of_the_validation_part(results):
    loss_of = {row["method"]: row["validation_loss"] for row in results["methods"]}
    counted, default = KneserNey(TRAIN, VOCAB.characters, 6), Scorer.load("default")
    assert loss_of[rivals.NGRAMS] == pytest.approx(-sum(map(counted.log_prob, VALID)) / POSITIONS)
    assert loss_of["default"] == pytest.approx(-float(default.score(VALID).sum()) / POSITIONS)
    ours, _ = default.position_log_probs(VALID)
    theirs = torch.tensor([value for name in VALID for value in counted.log_probs(name)])
    mixed = -(0.6 * ours.exp() + 0.4 * theirs.exp()).log().mean()
    assert loss_of["0.6 x default + 0.4 x Kneser-Ney"] == pytest.approx(float(mixed), rel=1e-5)
    ladder = json.loads((RESULTS.parent / "ladder-cpu.json").read_text())["rungs"]
    assert loss_of["ours-gated"] in [row["validation_loss"] for row in ladder if row["context"] == 16]


def test_another_list_is_said_to_be_another(small, monkeypatch, capsys):
    monkeypatch.setattr(rivals, "kenlm", None)
    assert choosing.main(small) == 0
    printed = capsys.readouterr().out
    assert "Not the lecture's list" in printed and "KenLM is not installed" in printed and "gated" not in printed


class OffByALittle(Scorer):
    def score(self, *args, **options):
        return super().score(*args, **options) + 1e-3


class NotANumber(networks.Transformer):
    def exact_scores(self, *args):
        return super().exact_scores(*args) * torch.nan


class ReadingPadding(networks.Transformer):
    def forward(self, tokens):
        return super().forward(tokens) + tokens.shape[1] * self.head.weight.sum(1)


class OtherCounts(KneserNey):
    def log_prob(self, name):
        return super().log_prob(name) - 1e-3


def other_weights(model):
    model = copy.deepcopy(model)
    model.head.bias.data[0] += 1e-2
    return fold(model)


fold = rivals.fold_batch_norm
BREAKS = [
    (rivals, "Scorer", OffByALittle),
    (networks, "Transformer", NotANumber),
    (networks, "Transformer", ReadingPadding),
    (rivals, "fold_batch_norm", other_weights),
    pytest.param(rivals, "KneserNey", OtherCounts, marks=needs_kenlm),
]


@pytest.mark.parametrize(("module", "what", "broken"), BREAKS)
def test_scores_that_differ_end_a_run_with_exit_code_1_and_no_timings(
    module, what, broken, small, monkeypatch, tmp_path
):
    monkeypatch.setattr(module, what, broken)
    assert choosing.main([*small, "--json", str(tmp_path / "out.json")]) == 1
    found = json.loads((tmp_path / "out.json").read_text())
    assert not found["equality"]["equal"] and list(found)[-1] == "equality"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["emma", "olivia"], "2 names leave nothing to validate on; give at least 10"),
        (["mary ann"] * 10, "the default model does not know ' '"),
        (["zoë"] * 10, "the default model does not know 'ë'; give names of a to z"),
    ],
)
def test_lists_that_cannot_be_used_are_exit_code_2(names, message, small, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("\n".join(names), encoding="utf-8")
    assert choosing.main(["--names", str(tmp_path / "names.txt")]) == 2
    printed = capsys.readouterr()
    assert not printed.out and message in printed.err and "Traceback" not in printed.err


def test_the_list_is_the_lectures_or_this_projects(monkeypatch, tmp_path):
    monkeypatch.setenv("WAVENET_CONV_LECTURE_NAMES", str(tmp_path / "nothing"))
    assert choosing.lecture_list() == str(ROOT / "names.txt")


def cells(lines):
    """The cells of a table in Markdown, without the rule below its head."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in rows if set("".join(row)) - set("-: ")]


def test_the_page_has_the_table_of_the_committed_run(capsys):
    results = json.loads(RESULTS.read_text())
    print_page(results, choosing.tables(results))
    part = re.search(r"<!-- generated: choosing-cpu.json -->(.*?)<!-- end -->", PAGE.read_text(), re.DOTALL)
    assert part and cells(part[1].splitlines()) == cells(capsys.readouterr().out.splitlines())


def test_what_the_page_says_holds_in_the_committed_run():
    rows = json.loads(RESULTS.read_text())["methods"]
    loss = {row["method"]: row["validation_loss"] for row in rows}
    ngrams, fast, transformer, default, gated = (
        [row for row in rows if row["method"] == name]
        for name in ("Kneser-Ney 6, KenLM", "ours-fast", "transformer", "default", "ours-gated")
    )
    (counted,), made = ngrams, [row["seconds"] for row in (*fast, *transformer) if row["seconds"]]
    assert abs(counted["validation_loss"] - loss["ours-fast"]) < 0.01  # ties
    assert counted["seconds"] < 2 < made[0] < made[1]
    assert counted["us"] < 10 and counted["us"] == min(row["us"] for row in rows if "us" in row)
    speed = [max(row["positions_per_second"] for row in part) for part in (transformer, fast, default)]
    assert speed[0] < speed[1] and 0.5 < speed[2] / counted["positions_per_second"] < 3
    assert abs(loss["transformer"] - loss["ours-fast"]) < 0.02
    assert loss["default"] - 0.05 < loss["ours-gated"] < loss["default"] < counted["validation_loss"]
    assert gated[0]["context"] == 2 * default[0]["context"]
    assert gated[0]["parameters"] == pytest.approx(3 * default[0]["parameters"], rel=0.05)
    assert min(loss, key=lambda name: loss[name]) == "0.6 x default + 0.4 x Kneser-Ney"


def test_the_pages_text_has_no_figures_that_a_run_could_change():
    text = re.sub(r"<!-- generated.*?<!-- end -->|```.*?```", "", PAGE.read_text(), flags=re.DOTALL)
    assert not re.search(r"\d[.,]\d|\d (times|seconds|nats)", text)
