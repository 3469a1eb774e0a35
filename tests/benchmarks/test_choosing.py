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
from benchmarks.ladder import tables as ladder_tables
from benchmarks.tables import print_page
from reference.ngram import KneserNey
from wavenet_conv import Scorer, Vocabulary
from wavenet_conv.checkpoint import load_checkpoint
from wavenet_conv.names import read_names
from wavenet_conv.training import PRESETS, TEACHERS, Recipe, split_names

NAMES = read_names(ROOT / "names.txt")[::150]
TRAIN, VALID, _ = split_names(NAMES)
POSITIONS = sum(len(name) + 1 for name in VALID)
VOCAB = Vocabulary.from_names(NAMES)
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "choosing-cpu.json", ROOT / "docs" / "choosing.md"
LADDER = RESULTS.with_name("ladder-cpu.json")

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
    ngrams, *networks = [row for row in results["methods"] if row["method"] != "ours-gated"]
    assert (ngrams["method"], ngrams["threads"], ngrams["context"]) == (rivals.NGRAMS, 1, 5)
    names = ("LSTM", "large LSTM", "transformer", "ours-fast", "default")
    assert [(row["method"], row["threads"]) for row in networks] == [(name, n) for name in names for n in (1, 2)]
    assert [row["context"] for row in networks] == [None] * 4 + [max(map(len, NAMES)) + 1] * 2 + [8] * 4
    assert [row["seconds"] is None for row in networks] == [True, False] * 4 + [False, True]
    assert {row["batch"] for row in networks[:6]} <= {8, 16} and results["notes"][: rivals.kenlm is not None] == []
    for row in (ngrams, *networks):
        for key in ("positions_per_second", "us"):
            assert 0 < row[f"q1_{key}"] <= row[key] <= row[f"q3_{key}"]


def test_networks_take_the_steps_of_a_short_run_or_of_their_own_recipes(results):
    model, full = results["model"], choosing.trained(None)
    assert (model["steps"], full["steps"]) == (4, PRESETS["fast"][1].steps)
    for name, network in rivals.NETWORKS.items():
        _, shape, recipe = networks.NETWORKS[network]
        assert (model[name]["steps"], full[name]["steps"]) == (4, recipe.steps)
        for found in (model[name], full[name]):
            assert shape.items() <= found.items() and found["dropout"] == recipe.dropout


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
    (gated,) = (row for row in json.loads(LADDER.read_text())["rungs"] if row["rung"] == "ours-gated")
    (found,) = (row for row in results["methods"] if row["method"] == "ours-gated")
    assert found["threads"] == 1 and found.items() - {("method", "ours-gated"), ("threads", 1)} <= gated.items()


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


class Forgetful(networks.Recurrent):
    def step(self, tokens, state):
        return super().step(tokens, tuple(torch.zeros_like(part) for part in state))


class CountingPadding(networks.Recurrent):
    def position_nats(self, tokens, lengths):
        return super().position_nats(tokens, torch.full_like(lengths, int(lengths.max())))


def backwards_alone(*args):
    """A network that reads a name from its end where it is scored alone, without packing or steps."""
    network = new_network(*args)
    network.embedding.register_forward_hook(lambda _, args, x: x.flip(1) if args[0].ndim == 2 else x)
    return network


class OtherCounts(KneserNey):
    def log_prob(self, name):
        return super().log_prob(name) - 1e-3


def other_weights(model):
    model = copy.deepcopy(model)
    model.head.bias.data[0] += 1e-2
    return fold(model)


fold, new_network = rivals.fold_batch_norm, networks.new_network
BREAKS = [
    (rivals, "Scorer", OffByALittle, "default"),
    (networks, "Recurrent", Forgetful, "LSTM"),
    (networks, "Recurrent", CountingPadding, "LSTM"),
    (networks, "new_network", backwards_alone, "LSTM"),
    (networks, "Transformer", NotANumber, "transformer"),
    (networks, "Transformer", ReadingPadding, "transformer"),
    (rivals, "fold_batch_norm", other_weights, "ours-fast"),
    pytest.param(rivals, "KneserNey", OtherCounts, rivals.NGRAMS, marks=needs_kenlm),
]


@pytest.mark.parametrize(("module", "what", "broken", "method"), BREAKS)
def test_scores_that_differ_end_a_run_with_exit_code_1_and_no_timings(
    module, what, broken, method, small, monkeypatch, tmp_path
):
    monkeypatch.setattr(module, what, broken)
    assert choosing.main([*small, "--json", str(tmp_path / "out.json")]) == 1
    found = json.loads((tmp_path / "out.json").read_text())
    assert not found["equality"]["equal"] and list(found)[-1] == "equality"
    assert not found["equality"]["max_abs_diffs"][method] <= choosing.TOLERANCE  # NaN is not


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
    results = json.loads(RESULTS.read_text())
    rows = results["methods"]
    ngrams, lstm, large, transformer, fast, default, gated = (
        [row for row in rows if row["method"] == name]
        for name in ("Kneser-Ney 6, KenLM", "LSTM", "large LSTM", "transformer", "ours-fast", "default", "ours-gated")
    )
    assert len(rows) == 12
    loss = {row["method"]: row["validation_loss"] for row in rows}
    assert 0 < loss["Kneser-Ney 6, KenLM"] - loss["ours-fast"] < 0.03  # slightly higher
    assert loss["LSTM"] < min(loss[name] for name in ("Kneser-Ney 6, KenLM", "transformer", "ours-fast"))
    assert loss["default"] - 0.05 < loss["ours-gated"] < loss["large LSTM"] < loss["default"] < loss["LSTM"]
    assert abs(loss["transformer"] - loss["ours-fast"]) < 0.02  # about the same
    seconds, us, speed = (  # the best of one thread and of all
        {
            name: best((row[key] for row in rows if row["method"] == name and row.get(key)), default=None)
            for name in loss
        }
        for key, best in (("seconds", min), ("us", min), ("positions_per_second", max))
    )
    (counted,) = ngrams
    assert counted["seconds"] < 2 < seconds["ours-fast"] < min(seconds["LSTM"], seconds["transformer"])
    assert seconds["LSTM"] < seconds["default"] and seconds["large LSTM"] < seconds["ours-gated"]
    assert us.pop("ours-gated") is None and counted["us"] < 10 and counted["us"] == min(us.values())
    assert max(us["ours-fast"], us["default"]) < min(us["LSTM"], us["large LSTM"])
    assert speed["transformer"] < speed["ours-fast"] and 0.5 < speed["default"] / speed[counted["method"]] < 3
    assert 5 * max(speed["LSTM"], speed["large LSTM"]) < min(speed["ours-fast"], speed["default"])
    assert results["model"]["LSTM"]["steps"] >= 3000
    assert lstm[0]["context"] is None
    for network in (lstm, transformer):
        assert network[0]["parameters"] == pytest.approx(fast[0]["parameters"], rel=0.03)
    assert fast[0]["parameters"] == default[0]["parameters"] and gated[0]["context"] == 2 * default[0]["context"]
    assert gated[0]["parameters"] == pytest.approx(3 * default[0]["parameters"], rel=0.05)
    assert large[0]["parameters"] == pytest.approx(gated[0]["parameters"], rel=0.05)


def test_what_the_page_says_of_the_ladder_holds_in_its_committed_run():
    ladder = json.loads(LADDER.read_text())
    rungs = {row["rung"]: row for row in ladder["rungs"]}
    loss = {name: row["validation_loss"] for name, row in rungs.items()}
    ours = [name for name in rungs if name.startswith("ours-")]
    assert min(ours, key=lambda name: loss[name]) == "ours-gated"
    assert max(loss["ours-wide"], loss["ours-gated"]) < loss["lstm-76k"]
    assert loss["lstm-76k"] < min(loss["ours-plain"], loss["ours-gated-plain"])
    assert rungs["lstm-76k"]["seconds"] < rungs["ours-wide"]["seconds"] < rungs["ours-gated"]["seconds"]
    assert rungs["ours-gated-plain"]["parameters"] == pytest.approx(3 * rungs["ours-plain"]["parameters"], rel=0.05)
    assert any(table.title.startswith("Mixed with kneser-ney-6") for table in ladder_tables(ladder))
    mixed = {row["rung"]: row["validation_loss"] for row in ladder["mixtures"]}
    assert max(loss["lstm-76k"], loss["lstm-230k"]) < min(loss["ours-plain"], loss["ours-gated-plain"])
    assert mixed["ours-gated + lstm-230k"] == min(mixed.values())
    assert mixed["lstm-230k"] < min(mixed[name] for name in mixed if name in ours)
    gains = {row["rung"]: row["alone"] - row["other_half"] for row in ladder["mixtures"]}
    assert min(gains.values()) > 0 and 0 < gains["ours-gated"] < gains["ours-gated-plain"]
    assert all(row["other_half"] < row["ngrams_alone"] for row in ladder["mixtures"])


def test_the_teachers_are_those_that_the_page_names():
    counted = {preset: recipe.ngram_share > 0 for preset, (_, recipe) in PRESETS.items()}
    assert counted["fast"] and counted["wide"] and counted["gated"]
    assert not counted["plain"] and not counted["gated-plain"] and "fast" not in TEACHERS
    assert 0 < len(TEACHERS["wide"]) < len(TEACHERS["gated"])
    assert load_checkpoint("default").notes["preset"] == "wide"


def test_the_pages_text_has_no_figures_that_a_run_could_change():
    text = re.sub(r"<!-- generated.*?<!-- end -->|```.*?```", "", PAGE.read_text(), flags=re.DOTALL)
    assert not re.search(r"\d[.,]\d|\d (times|seconds|nats)", text)
