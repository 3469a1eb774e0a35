"""The rungs of the ladder are what they are said to be: their scores, their draws, their seconds and their recipes."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

import reference
from benchmarks import ladder, rungs
from benchmarks.choosing import loss_of
from benchmarks.networks import NETWORKS
from benchmarks.rungs import RUNGS, Parts, make
from reference.ngram import KneserNey
from wavenet_conv import Vocabulary, WaveNetConfig, training
from wavenet_conv.names import read_names

NAMES = read_names(ROOT / "names.txt")[::150]
TRAIN, VALID, TEST = training.split_names(NAMES)
VOCAB = Vocabulary.from_names(NAMES)
STEPS = 600


@pytest.fixture
def parts():
    return Parts(TRAIN, VALID, TEST, VOCAB, STEPS, STEPS / ladder.STEPS, 42)


@pytest.mark.parametrize("name", ["mlp-10-200-unscaled", "tree-68-bug", "tree-68"])
def test_trees_score_as_the_lecture_evaluates_them(name, parts, monkeypatch):
    trained, train = [], reference.train

    def kept(tree, *args, **options):
        train(tree, *args, **options)
        trained.append((tree, options))

    monkeypatch.setattr(reference, "train", kept)
    made, rung = make(RUNGS[name], parts), RUNGS[name]
    ((tree, options),) = trained
    assert options["drop_at"] == rung.drop_at * STEPS // ladder.STEPS
    assert (options["lr"], options["steps"], options["batch_size"]) == (0.1, STEPS, 32)
    with torch.no_grad():
        expected = reference.evaluate(tree, *reference.examples(VALID, VOCAB.characters, reference.context_of(tree)))
        assert loss_of(made.score(VALID, 64), VALID) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["lstm-76k", "transformer-230k", "ours-fast"])
def test_positions_add_up_to_scores_and_draws_come_from_the_seed(name, parts):
    made = make(RUNGS[name], parts)
    log_probs = made.log_probs(VALID).split([len(name) + 1 for name in VALID])
    assert made.log_probs(VALID).dtype == torch.float64
    torch.testing.assert_close(torch.stack([p.sum() for p in log_probs]).float(), made.score(VALID, 8).float())
    assert made.draw(30, 1, 16) == made.draw(30, 1, 16) != made.draw(30, 2, 16)
    assert made.facts["recipe"][0]["recipe"]["lr"] > 0


def test_the_bigram_model_is_the_counts_raised_by_one():
    made = make(RUNGS["bigram"], Parts(["ab", "aa"], [], [], Vocabulary("ab"), 0, 0.0, 42))
    # After `.`: a twice of 2, so 3/5 for a, 1/5 for b and for the end; after a: ., a, b once each; after b: . once.
    expected = torch.tensor([[3 / 5, 2 / 6, 2 / 4], [3 / 5, 2 / 6, 2 / 6], [1 / 5, 1 / 4, 2 / 4]]).log().sum(1)
    assert made.score(["ab", "aa", "bb"], 1) == pytest.approx(expected.tolist(), abs=1e-5)
    assert (made.facts["parameters"], made.facts["context"], made.facts["steps"]) == (9, 1, 0)


def test_python_scores_what_an_arpa_file_cannot_hold():
    parts = Parts(["a b", "b a"], [], [], Vocabulary("a b"), 0, 0.0, 42)
    made = make(RUNGS["kneser-ney-3"], parts)
    model = KneserNey(parts.train, parts.vocab.characters, 3)
    assert made.facts["scored_by"] == "Python" and made.score(["b b"], 1) == [model.log_prob("b b")]


def test_seconds_hold_those_of_teachers_that_an_earlier_rung_trained(parts, monkeypatch):
    clock, fitted = [0.0], []
    model = training.new_model(WaveNetConfig(vocab_size=len(VOCAB), n_embd=2, n_hidden=2)).eval()

    def fit_preset(preset, *, seed, trained=None, **options):
        fitted.append((preset, seed, sorted(trained or {})))
        clock[0] += 10 if trained is None else 1
        return SimpleNamespace(model=model, step=5)

    monkeypatch.setattr(rungs, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(training, "fit_preset", fit_preset)
    wide, gated = ([(name, recipe.seed) for name, _, recipe in training.teachers_of(p, 42)] for p in ("wide", "gated"))
    assert make(RUNGS["ours-wide"], parts).facts["seconds"] == 10 * len(wide) + 1
    assert make(RUNGS["ours-gated"], parts).facts["seconds"] == 10 * len(gated) + 1
    more, shared = [key for key in gated if key not in wide], len({*wide} & {*gated})
    expected = [*((*key, []) for key in wide), ("wide", 42, sorted(wide))]
    assert shared > 0 and fitted == [*expected, *((*key, []) for key in more), ("gated", 42, sorted(gated))]
    assert len(make(RUNGS["ours-wide"], parts).facts["recipe"]) == 1 + len(wide)


def test_a_recipe_is_that_of_the_code_and_the_same_in_json():
    for name in ("gru-76k", "ours-gated", "wide"):
        found = rungs.recipe_of(name, 42)
        assert json.loads(json.dumps(found)) == found and (found is None) == (name == "wide")
    (_, _, recipe), *_ = training.teachers_of("gated", 7)
    assert rungs.recipe_of("ours-gated", 7)[1]["recipe"] == asdict(recipe) != asdict(training.PRESETS["gated"][1])
    assert NETWORKS["gru-76k"].recipe == training.Recipe(**rungs.recipe_of("gru-76k", 42)[0]["recipe"])


def test_the_unscaled_start_is_far_off(parts):
    """Standard normals where the lecture scales them, so that the first losses are those of confident errors."""
    few = Parts(TRAIN, VALID, TEST, VOCAB, 1, 1 / STEPS, 42)
    scaled, unscaled = (make(RUNGS[name], few) for name in ("mlp-10-200", "mlp-10-200-unscaled"))
    losses = [
        -float(made.score(VALID, 64).detach().sum()) / sum(len(name) + 1 for name in VALID)
        for made in (scaled, unscaled)
    ]
    assert losses[0] < 4 < 10 < losses[1]
