"""Four ways to count a node in batch statistics: two are the tree's, two are what they say, and a short run."""

import json
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import exactness
from benchmarks.exactness import EXACT, WAYS, WholeNames
from wavenet_conv import ConvWaveNet, Vocabulary, WaveNetConfig
from wavenet_conv.names import read_names
from wavenet_conv.training import Corpus, Recipe, Trainer, evaluate, new_model

NAMES = read_names(Path(__file__).parents[2] / "names.txt")[::300] + ["abcdefghijklmnopqrstuvwxyz"]
VOCAB = Vocabulary("abcxyz")
FEW = ["abcxyz", "", "a", "abcabcabcabc", "zyx"]
SIZES = WaveNetConfig(len(VOCAB), 5, 7, (2, 3, 2))


def new_way(way, seed=0, dtype=torch.float64):
    """A model of a way; the weights of all ways are the same."""
    model = WAYS[way](SIZES).to(dtype)
    model.load_state_dict(new_model(SIZES, seed, dtype=dtype).state_dict())
    return model.train()


def forward(model, names):
    """Runs a model on a padded batch; returns each layer's nodes before the norm, `(batch, channels, time)`."""
    nodes = []
    hooks = [layer.conv.register_forward_hook(lambda *args: nodes.append(args[-1].detach())) for layer in model.layers]
    model(*VOCAB.encode(names, context=model.context))
    for hook in hooks:
        hook.remove()
    return nodes


def test_padded_has_the_statistics_of_batch_norm_on_all_nodes():
    model = new_way("padded")
    for layer, nodes in zip(model.layers, forward(model, FEW)):
        norm = nn.BatchNorm1d(7, dtype=torch.float64)
        norm(nodes)
        for name in ("running_mean", "running_var"):
            assert (getattr(layer.norm, name) - getattr(norm, name)).abs().max() < 1e-12


def test_plain_has_the_statistics_of_each_node_of_a_window_once():
    model, span = new_way("plain"), 1
    for layer, nodes, size in zip(model.layers, forward(model, FEW), SIZES.kernel_sizes):
        span *= size
        chosen = []
        for row, name in zip(nodes, FEW):
            starts = {t + offset for t in range(len(name) + 1) for offset in range(0, model.context, span)}
            chosen += [row[:, start] for start in sorted(starts)]
        chosen = torch.stack(chosen)
        assert len(chosen) < nodes.shape[0] * nodes.shape[2]
        assert (layer.norm.running_mean - 0.1 * chosen.mean(0)).abs().max() < 1e-12
        assert (layer.norm.running_var - 0.9 - 0.1 * chosen.var(0)).abs().max() < 1e-12


def test_all_ways_are_one_model_in_evaluation_mode():
    expected = new_way("multiplicities").eval()
    tokens, lengths = VOCAB.encode(FEW, context=expected.context)
    for way in WAYS:
        assert torch.equal(new_way(way).eval()(tokens, lengths), expected(tokens, lengths))


def trained(way, steps=6, **options):
    recipe = Recipe(steps=steps, batch_size=3, eval_every=2, seed=5, **options)
    kind = Trainer if way == "shared" else WholeNames
    trainer = kind(new_way(way), VOCAB, FEW * 2, ["abc", "xyz"], recipe)
    while not trainer.finished:
        trainer.advance()
    return trainer


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_whole_names_take_the_steps_of_shared_nodes(optimizer):
    """On the same names, with the same optimizer and schedule; other statistics take other steps."""
    found = {way: torch.stack(trained(way, optimizer=optimizer).losses) for way in WAYS}
    assert (found["multiplicities"] - found["shared"]).abs().max() < 1e-9
    for way in ("plain", "padded"):
        assert (found[way] - found["shared"]).abs().max() > 1e-6


@pytest.mark.parametrize("way", ["multiplicities", "plain", "padded"])
def test_a_batch_is_padded_to_its_own_longest_name(way):
    """And not to that of the list, which would change what `padded` counts."""
    names = ["abcabcabcabc", "x", "yz", "ab"]
    trainer = WholeNames(new_way(way), VOCAB, names, ["abc"], Recipe(batch_size=2))
    for rows in (trainer.next_rows().tolist(), [row for row in range(4) if row not in trainer.next_rows()]):
        expected = exactness.padded_loss(trainer.model, *VOCAB.encode([names[row] for row in rows], context=12))
        trainer.advance()
        assert abs(trainer.losses[-1] - expected) < 1e-12


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The options of a short run of five steps."""
    path = tmp_path_factory.mktemp("lists") / "names.txt"
    path.write_text("\n".join(NAMES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exactness, "QUICK_STEPS", 5)
        patch.setattr(exactness, "RECIPE", replace(exactness.RECIPE, batch_size=32, eval_every=2))
        yield ["--names", str(path), "--seed", "7"]


@pytest.fixture(scope="module")
def results(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "out.json"
    assert exactness.main([*small, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_only_the_exact_ways_are_the_trees(results):
    assert results["equality"]["equal"] and max(results["equality"]["max_abs_diffs"].values()) < 1e-10
    for row in results["one_step"]:
        largest = max(row["gradients"], row["statistics"])
        assert largest < 1e-10 if row["way"] in EXACT else largest > 1e-4


def test_each_way_is_trained_with_each_seed(results):
    rows = results["trainings"]
    assert [(row["way"], row["seed"]) for row in rows] == [(way, seed) for seed in (7, 8, 9) for way in WAYS]
    for row in rows:
        assert row["best_step"] in (0, 2, 4, 5) and row["seconds"] > 0
    by_way = {way: [row for row in rows if row["way"] == way] for way in WAYS}
    for exact, shared in zip(by_way["multiplicities"], by_way["shared"]):
        assert exact["train_loss"] == pytest.approx(shared["train_loss"], abs=1e-3)  # five steps in float32
    for row in results["ways"]:
        of_way = by_way[row["way"]]
        for key in exactness.MEASURED:
            values = [one[key] for one in of_way]
            found = (row[f"lowest_{key}"], row[key], row[f"highest_{key}"])
            assert found == (min(values), statistics.median(values), max(values))
        more = [a["test_loss"] - b["test_loss"] for a, b in zip(of_way, by_way["multiplicities"])]
        assert row["test_loss_more"] == statistics.median(more)


def test_a_row_has_the_losses_of_the_best_weights():
    """Of the validated ones with the lowest loss, and not the last."""
    trainer, best = trained("plain"), new_way("plain", seed=1).eval()
    trainer.best_weights, trainer.best_step, trainer.best_loss = best.state_dict(), 4, 1.25
    row = exactness.finished_row("plain", 5, 7.5, trainer, ["zax"], SimpleNamespace(vocab=VOCAB))
    losses = {
        "train_loss": evaluate(best, Corpus(FEW * 2, VOCAB, best)),
        "validation_loss": 1.25,
        "test_loss": evaluate(best, Corpus(["zax"], VOCAB, best)),
    }
    assert row == {"way": "plain", "seed": 5, "best_step": 4, "seconds": 7.5} | losses


exact_loss = exactness.shared_loss


class OffByALittle(ConvWaveNet):
    def multiplicities(self, tokens, lengths=None):
        return [count * (1 + 1e-6 * torch.arange(count.shape[-1])) for count in super().multiplicities(tokens, lengths)]


class OtherNames(WholeNames):
    def next_rows(self):
        return super().next_rows()[1:]


@pytest.mark.parametrize(
    ("what", "broken"),
    [
        ("WAYS", WAYS | {"multiplicities": OffByALittle}),
        ("WholeNames", OtherNames),
        ("shared_loss", lambda *args: exact_loss(*args) * (1 + 1e-9)),
        ("shared_loss", lambda conv, *args: exact_loss(conv, *args) + (0 * conv.embedding.weight).sqrt().sum()),
    ],
    ids=["multiplicities", "names", "shared", "a gradient is NaN"],
)
def test_what_differs_ends_a_run_with_exit_code_1_and_no_trainings(what, broken, small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(exactness, what, broken)
    assert exactness.main([*small, "--json", str(tmp_path / "out.json")]) == 1
    found = json.loads((tmp_path / "out.json").read_text())
    assert not found["equality"]["equal"] and list(found)[-1] == "equality"
    printed = capsys.readouterr().out
    assert "NOT EQUAL" in printed and "|" not in printed


def test_a_list_without_a_validation_part_is_exit_code_2(tmp_path, capsys):
    (tmp_path / "few.txt").write_text("emma\nolivia\n")
    assert exactness.main(["--names", str(tmp_path / "few.txt")]) == 2
    assert "2 names leave nothing to validate on; give at least 10" in capsys.readouterr().err
