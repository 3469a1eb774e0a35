"""The choice between rivals: what is measured, what ends a run, the transformer, and the table of the page."""

import copy
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from benchmarks import choosing, rivals
from benchmarks.tables import print_page
from benchmarks.transformer import Transformer, train
from reference.ngram import KneserNey
from wavenet_conv import Scorer, Vocabulary
from wavenet_conv.checkpoint import load_checkpoint
from wavenet_conv.names import read_names
from wavenet_conv.training import split_names

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


class NotANumber(Transformer):
    def nats(self, *args):
        return super().nats(*args) * torch.nan


class ReadingPadding(Transformer):
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
    ("Scorer", OffByALittle),
    ("Transformer", NotANumber),
    ("Transformer", ReadingPadding),
    ("fold_batch_norm", other_weights),
    pytest.param("KneserNey", OtherCounts, marks=needs_kenlm),
]


@pytest.mark.parametrize(("what", "broken"), BREAKS)
def test_scores_that_differ_end_a_run_with_exit_code_1_and_no_timings(what, broken, small, monkeypatch, tmp_path):
    monkeypatch.setattr(rivals, what, broken)
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


@pytest.fixture
def transformer():
    torch.manual_seed(1)
    with torch.no_grad():
        yield Transformer(VOCAB, 15).eval()


def test_the_transformer_is_as_large_as_the_lectures_network(transformer):
    sizes = [sum(p.numel() for p in model.parameters()) for model in (transformer, load_checkpoint("default").model)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


def test_the_transformer_reads_what_came_before_and_all_of_it(transformer):
    tokens = torch.randint(1, len(VOCAB), (1, 16))
    logits = transformer(tokens)
    for place in (0, 7, 15):
        other = tokens.clone()
        other[0, place] = 1 + other[0, place] % (len(VOCAB) - 1)
        changed = (transformer(other) - logits).abs().amax((0, 2)) > 1e-5
        assert changed.tolist() == [index >= place for index in range(16)]


def test_the_transformer_scores_every_character_and_the_end(transformer):
    names = ["emma", "", "bo", "annabella"]
    for batch_size in (1, 3, 10):
        found = transformer.score(names, batch_size)
        for name, score in zip(names, found.tolist()):
            tokens = [VOCAB.encode([name], context=1)[0][0].tolist(), 0]
            sequence = [*tokens[0], 0]
            log_probs = transformer(torch.tensor([sequence[:-1]])).log_softmax(-1)[0]
            assert score == pytest.approx(float(log_probs[range(len(name) + 1), sequence[1:]].sum()), abs=1e-4)
    assert transformer.exact_scores(names).tolist() == pytest.approx(found.tolist(), abs=1e-4)


def test_the_transformer_learns_and_a_seed_gives_the_same_bits(transformer):
    models = [Transformer(VOCAB, 15) for _ in range(2)]
    for model in models:
        torch.manual_seed(1)
        model.load_state_dict(transformer.state_dict())
        train(model, TRAIN, steps=20, seed=3)
    losses = [-float(model.score(VALID, 64).sum()) / POSITIONS for model in (transformer, *models)]
    assert losses[1] == losses[2] < losses[0] - 0.3
    for before, after in zip(transformer.parameters(), models[0].parameters()):
        assert not torch.equal(before, after)


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
