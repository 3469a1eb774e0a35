"""The ladder in short runs: what its rows say, what resuming keeps, and what ends a run."""

import hashlib
import importlib.util
import json
import re
from math import exp, log
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from benchmarks import ladder, networks, rungs
from benchmarks.ladder import mixture_row
from benchmarks.networks import NETWORKS
from benchmarks.rungs import Made, Parts, make
from reference.ngram import KneserNey
from wavenet_conv import Vocabulary, training
from wavenet_conv.names import read_names

NAMES = read_names(ROOT / "names.txt")[::150]
TRAIN, VALID, TEST = training.split_names(NAMES)
VOCAB = Vocabulary.from_names(NAMES)
STEPS = 600
# One of each kind; small ones in place of the networks.
MADE = ["bigram", "mlp-10-200-unscaled", "tree-68-bug", "kneser-ney-3", "kneser-ney-7", "lstm-76k", "transformer-230k"]
MADE += ["ours-fast"]
SHAPES = {
    "lstm-76k": {"width": 9, "n_embd": 4, "layers": 2},
    "transformer-230k": {"layers": 1, "heads": 2, "width": 8, "feedforward": 10},
}
ROW = dict.fromkeys(ladder.ROW, 1.0) | {"rung": "lstm-76k"}
HAS_KENLM = importlib.util.find_spec("kenlm") is not None


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The options of a short run; networks and batches are small while this is in use."""
    path = tmp_path_factory.mktemp("lists") / "names.txt"
    path.write_text("\n".join(NAMES))
    with pytest.MonkeyPatch.context() as patch:
        for name, shape in SHAPES.items():
            patch.setitem(networks.NETWORKS, name, NETWORKS[name]._replace(shape=shape))
        patch.setattr(rungs, "NAME_BATCHES", (8, 16))
        patch.setattr(rungs, "DRAW_BATCHES", (16, 64))
        patch.setattr(ladder, "QUICK_DRAWN", 40)
        yield ["--names", str(path), "--steps", str(STEPS)]


@pytest.fixture
def parts():
    return Parts(TRAIN, VALID, TEST, VOCAB, STEPS, STEPS / ladder.STEPS, 42)


@pytest.fixture(scope="module")
def results(small, tmp_path_factory):
    path, threads = tmp_path_factory.mktemp("results") / "out.json", torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert ladder.main([*small, "--rungs", *MADE, "--json", str(path)]) == 0 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    return json.loads(path.read_text())


def nats(log_probs):
    return -sum(log_probs) / len(log_probs)


def test_a_row_for_every_kind_of_rung(results):
    assert "proves nothing" in results["caveat"] and not results["equality"]["equal"]
    assert results["names"]["train"] == int(0.8 * len(NAMES)) and results["device"].endswith("1 thread")
    rows = {row["rung"]: row for row in results["rungs"]}
    assert list(rows) == MADE
    longest = max(map(len, NAMES))
    assert [row["context"] for row in rows.values()] == [1, 3, 8, 2, 6, None, longest + 1, 8]
    recipes = NETWORKS["lstm-76k"].recipe, NETWORKS["transformer-230k"].recipe, training.PRESETS["fast"][1]
    few = [recipe.steps * STEPS // ladder.STEPS for recipe in recipes]
    assert [row["steps"] for row in rows.values()] == [0, STEPS, STEPS, 0, 0, *few]
    by = ["KenLM" if HAS_KENLM else "Python", "windows", "windows", "KenLM" if HAS_KENLM else "Python", "Python"]
    assert [row["scored_by"] for row in rows.values()] == [*by, "batches", "batches", "Scorer"]
    for row in rows.values():
        assert all(0 < row[f"{part}_loss"] < 40 for part in ("train", "validation", "test"))  # unscaled starts near 27
        published = row["published_validation_loss"]
        assert row["difference"] == (None if published is None else row["validation_loss"] - published)
        for key in ("positions_per_second", "names_per_second"):
            assert 0 < row[f"q1_{key}"] <= row[key] <= row[f"q3_{key}"]
        assert row["seconds"] > 0 and row["drawn"]["distinct"] > 0
    assert {rows[name]["position_batch"] for name in SHAPES} <= {8, 16} and rows["bigram"]["position_batch"] is None
    assert rows["tree-68-bug"]["name_batch"] in (16, 64) and rows["ours-fast"]["name_batch"] is None


def test_the_references_are_the_list_and_its_validation_part(results):
    whole, part = (row["drawn"] for row in results["references"])
    assert whole["mean_length"] == sum(map(len, NAMES)) / len(NAMES) and whole["in_training"] is None
    assert part["mean_length"] == sum(map(len, VALID)) / len(VALID)
    assert part["in_training"] == sum(name in TRAIN for name in VALID) / len(VALID)


def test_losses_are_those_of_the_definitions(results, parts):
    rows, lists = {row["rung"]: row for row in results["rungs"]}, {"train": TRAIN, "validation": VALID, "test": TEST}
    for order in (3, 7):
        model = KneserNey(TRAIN, VOCAB.characters, order)
        assert rows[f"kneser-ney-{order}"]["parameters"] == len(model.probs)
        for part, names in lists.items():
            expected = nats([value for name in names for value in model.log_probs(name)])
            assert rows[f"kneser-ney-{order}"][f"{part}_loss"] == pytest.approx(expected, abs=1e-5)
    trainer = training.fit_preset("fast", VOCAB, TRAIN, VALID, steps=parts.share)
    assert rows["ours-fast"]["validation_loss"] == pytest.approx(trainer.best_loss, abs=1e-5)
    assert rows["ours-fast"]["train_loss"] == pytest.approx(training.evaluate(trainer.model, trainer.train_corpus))
    assert len({row["test_loss"] for row in rows.values()}) == len(MADE)


def test_a_mixture_is_weighed_on_one_half_and_told_of_the_other(results, parts):
    rows = {row["rung"]: row for row in results["mixtures"]}
    assert list(rows) == ["transformer-230k", "ours-fast"]
    counted = KneserNey(TRAIN, VOCAB.characters, 6)
    # On the first half the network is always right about the end and wrong about the rest, on the other uniform.
    first = set(VALID[: len(VALID) // 2])
    ours = {name: [0.01] * len(name) + [0.9] if name in first else [0.2] * (len(name) + 1) for name in VALID}
    ours |= {name: [0.3] * (len(name) + 1) for name in TEST}

    def log_probs(names):
        return torch.tensor([p for name in names for p in ours[name]], dtype=torch.float64).log()

    def loss(names, weight):
        theirs = [exp(value) for name in names for value in counted.log_probs(name)]
        mine = [p for name in names for p in ours[name]]
        return nats([log(weight * a + (1 - weight) * b) for a, b in zip(mine, theirs)])

    half, other = VALID[: len(VALID) // 2], VALID[len(VALID) // 2 :]
    made = Made({}, None, None, log_probs=log_probs)
    row = mixture_row("lstm-230k", [made], parts)
    weight = min((step / 20 for step in range(21)), key=lambda weight: loss(half, weight))
    assert row.pop("rung") == "lstm-230k" and row.pop("weights") == [weight, 1 - weight] and 0 < weight < 1
    expected = {"alone": loss(other, 1), "ngrams_alone": loss(other, 0), "other_half": loss(other, weight)}
    expected |= {"validation_loss": loss(VALID, weight), "test_loss": loss(TEST, weight)}
    assert row == pytest.approx(expected, abs=1e-5)


def test_a_mixture_of_three_is_weighed_as_one_of_two_where_two_are_equal(parts):
    uniform = Made({}, None, None, log_probs=lambda names: torch.full((positions(names),), -2.0, dtype=torch.float64))
    two, three = (mixture_row("one", [uniform] * count, parts) for count in (1, 2))
    assert sum(three.pop("weights")[:2]) == pytest.approx(two.pop("weights")[0]) and three == pytest.approx(two)
    assert {*map(tuple, ladder.weightings(3))} >= {(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 0.25, 0.25)}
    assert all(sum(weights) == pytest.approx(1) and min(weights) >= 0 for weights in ladder.weightings(3))
    assert len(list(ladder.weightings(3))) == 21 * 22 / 2


def positions(names):
    return sum(len(name) + 1 for name in names)


def test_a_mixture_makes_what_this_run_has_not_made(small, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(ladder, "make", lambda rung, parts: made.append(rung.name) or make(rung, parts))
    monkeypatch.setattr(ladder, "MIXTURES", {"both": ("ours-fast", "lstm-76k")})
    path, rest = tmp_path / "out.json", ("--rungs", "lstm-76k", "ours-fast")
    assert ladder.main([*small, "--json", str(path), *rest]) == 0 and made == ["lstm-76k", "ours-fast"]
    found = both = json.loads(path.read_text())
    found = found | {"rungs": [row for row in both["rungs"] if row["rung"] == "lstm-76k"]}
    for rungs_kept, again in ((found["rungs"], ["ours-fast", "lstm-76k"]), (both["rungs"], ["ours-fast", "lstm-76k"])):
        made.clear()
        path.write_text(json.dumps(found | {"mixtures": [], "rungs": rungs_kept}))
        assert ladder.main([*small, "--json", str(path), "--resume", *rest]) == 0 and made == again
        assert json.loads(path.read_text())["mixtures"] == found["mixtures"] != []


def test_one_name_to_validate_on_chooses_no_weights(small, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(NAMES[:10]))
    arguments = ["--names", str(tmp_path / "names.txt"), "--steps", "20", "--json", str(tmp_path / "out.json")]
    assert ladder.main([*arguments, "--rungs", "ours-fast", "ours-fast"]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["rungs"]) == 1 and found["mixtures"] == []


def without_times(rows):
    timed = re.compile("seconds|_per_second|_batch")
    return [{key: value for key, value in row.items() if not timed.search(key)} for row in rows]


def test_an_interrupted_run_is_resumed(results, small, tmp_path, monkeypatch, capsys):
    path, made = tmp_path / "out.json", []

    def until(name):
        def interrupted(rung, parts):
            if rung.name == name:
                raise KeyboardInterrupt
            made.append(rung.name)
            return make(rung, parts)

        return interrupted

    arguments = [*small, "--rungs", *MADE, "--json", str(path), "--resume"]  # without a file it begins
    for name, code in (("lstm-76k", 130), ("lstm-76k", 130), ("ours-fast", 130), ("bigram", 0)):
        monkeypatch.setattr(ladder, "make", until(name))
        before = json.loads(path.read_text())["rungs"] if path.exists() else []
        assert ladder.main(arguments) == code
        assert ("interrupted; add --resume to go on" in capsys.readouterr().err) == (code == 130)
        found = json.loads(path.read_text())
        assert found["rungs"][: len(before)] == before and found["finished"] == (code == 0)
    assert made == MADE  # each once
    assert without_times(found["rungs"]) == without_times(results["rungs"])
    assert found["mixtures"] == results["mixtures"] and found["references"] == results["references"]


def test_rungs_that_are_not_asked_for_are_kept(small, tmp_path, monkeypatch):
    arguments = [*small, "--json", str(tmp_path / "out.json"), "--resume"]
    for rung, kept in (("kneser-ney-3", ["kneser-ney-3"]), ("bigram", ["bigram", "kneser-ney-3"])):
        assert ladder.main([*arguments, "--rungs", rung]) == 0
        assert [row["rung"] for row in json.loads((tmp_path / "out.json").read_text())["rungs"]] == kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"torch": "1.0"}, f"torch 1.0 (this run: {torch.__version__})"),
        ({"device": "abacus"}, "device abacus (this run: "),
        ({"recipe": {"steps": 5, "batch": 32, "lr": 0.1, "seed": 7}}, "steps 5 (this run: 600), seed 7 (this run: 42)"),
        ({"names": {"sha256": "abc"}}, "names with SHA-256 abc (this run: "),
        ({"drawn": 9}, "drawn 9 (this run: 40)"),
        ({"rungs": [ROW | {"recipe": [{"of": "GRU"}]}]}, "another recipe of lstm-76k; run it as it was"),
        ({"rungs": [{"rung": "bigram", "recipe": None}]}, "has no results of this version of the ladder"),
        ({"rungs": [{"rung": "bigram"}]}, "has no results of this version of the ladder; name another file"),
        ({"names": None}, "has no results of this version of the ladder"),
        (None, "has no results of this version of the ladder"),
    ],
)
def test_a_file_of_another_run_is_not_resumed(changes, message, results, small, tmp_path, capsys):
    path = tmp_path / "out.json"
    path.write_text("[" if changes is None else json.dumps(results | changes))
    before = path.read_text()
    assert ladder.main([*small, "--rungs", "bigram", "--json", str(path), "--resume"]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and not printed.out and path.read_text() == before


def test_another_list_is_not_resumed(results, small, tmp_path, capsys):
    path = tmp_path / "out.json"
    path.write_text(json.dumps(results))
    (tmp_path / "names.txt").write_text("\n".join(NAMES[1:]))
    arguments = ["--steps", str(STEPS), "--json", str(path), "--resume", "--rungs", "bigram"]
    assert ladder.main(["--names", str(tmp_path / "names.txt"), *arguments]) == 2
    assert f"names with SHA-256 {results['names']['sha256']} (this run: " in capsys.readouterr().err


def test_a_full_ladder_that_misses_a_published_loss_ends_with_exit_code_1(small, monkeypatch, capsys):
    digest = hashlib.sha256(Path(small[1]).read_bytes()).hexdigest()
    monkeypatch.setattr(ladder, "STEPS", 6)
    monkeypatch.setattr(ladder, "DRAWN", 5)
    for module, setting, value, code, printed in (
        (rungs, "LR", 0.1, 0, "Not the lecture's list"),
        (ladder, "LECTURE_SHA256", digest, 1, "NOT EQUAL: max abs diff"),
        (ladder, "TOLERANCE", 10.0, 0, "Equal: max abs diff"),
    ):
        monkeypatch.setattr(module, setting, value)
        assert ladder.main([*small[:2], "--full", "--rungs", "mlp-bn"]) == code
        out = capsys.readouterr().out
        assert printed in out and "| mlp-bn |" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: '0' is not an integer from 1 to "),
        (["--rungs", "mlp-bn", "deep"], "--rungs: invalid choice: 'deep' (choose from "),
        (["--names", "few.txt"], "2 names leave nothing to validate on; give at least 10"),
        (["--names", ""], "the published losses are of the lecture's list, which is not here: run"),
        (["--resume"], "--resume: name the file to continue by --json FILE"),
    ],
)
def test_wrong_options_are_exit_code_2(arguments, message, small, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WAVENET_CONV_LECTURE_NAMES", str(tmp_path / "nothing"))
    monkeypatch.chdir(tmp_path)
    Path("few.txt").write_text("emma\nolivia\n")
    try:
        code = ladder.main([*small, *arguments])
    except SystemExit as left:
        code = left.code
    printed = capsys.readouterr()
    assert code == 2 and not printed.out and message in printed.err
