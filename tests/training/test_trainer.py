"""The trainer and its loop: same bits again and after an interruption, the best weights, the ways to stop, errors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from wavenet_conv import WaveNetConvError
from wavenet_conv.recipe import PRESETS, TEACHERS, Recipe, split_names, teachers_of
from wavenet_conv.training import Corpus, Trainer, evaluate, fit, fit_preset, new_model, run


@pytest.fixture
def parts(vocab, names):
    """Arguments of `fit` after the model: a vocabulary and two short lists."""
    return vocab, names[:200], names[200:260]


def assert_same(one, other):
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def copied(weights):
    return {name: tensor.clone() for name, tensor in weights.items()}


def test_it_learns_and_ends_with_the_best_weights(small, parts):
    model = small()
    trainer = fit(model, *parts, Recipe(steps=50, batch_size=64, eval_every=20, lr=0.02))
    steps, losses = zip(*trainer.validations)
    assert steps == (0, 20, 40, 50) and trainer.best_loss == min(losses) < 2.8 < float(trainer.losses[0])
    assert evaluate(model, trainer.valid_corpus) == trainer.best_loss and not model.training
    assert_same(model.state_dict(), trainer.best_weights)


def test_the_best_weights_are_kept_where_the_loss_rises_again(small, parts, monkeypatch):
    losses, weights, model = iter((4.0, 3.0, 2.0, 2.5)), [], small()
    monkeypatch.setattr("wavenet_conv.training.trainer.evaluate", lambda *_: next(losses))
    recipe = Recipe(steps=6, eval_every=2)
    trainer = fit(model, *parts, recipe, on_validation=lambda trainer: weights.append(copied(model.state_dict())))
    assert (trainer.best_step, trainer.best_loss, len(weights)) == (4, 2.0, 3)
    assert_same(model.state_dict(), weights[1])
    assert not torch.equal(model.head.weight, weights[2]["head.weight"])


def test_the_moving_average_is_what_is_validated_and_kept(small, parts):
    model, other, averages, decay = small(), small(), [], 0.8

    def average(trainer):
        weights = copied(model.state_dict())
        if averages:
            weights = {name: decay * averages[-1][name] + (1 - decay) * weights[name] for name in weights}
        averages.append(weights)
        other.load_state_dict(weights)
        assert abs(evaluate(other, trainer.valid_corpus) - trainer.validations[-1][1]) < 1e-5

    trainer = fit(model, *parts, Recipe(steps=5, eval_every=1, ema_decay=decay, lr=0.1), on_validation=average)
    for name, tensor in model.state_dict().items():
        assert (tensor - averages[trainer.best_step - 1][name]).abs().max() < 1e-5


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_trained_model_is_never_worse_afterwards(small, parts, ema_decay):
    model = small()
    before = fit(model, *parts, Recipe(steps=50, batch_size=64, eval_every=50, lr=0.02))
    trainer = fit(model, *parts, Recipe(steps=4, eval_every=2, lr=3.0, ema_decay=ema_decay))
    assert min(loss for step, loss in trainer.validations if step) > before.best_loss  # it did harm
    assert trainer.validations[0] == (0, before.best_loss) and (trainer.best_step, trainer.best_loss) == (
        0,
        before.best_loss,
    )
    assert_same(model.state_dict(), before.best_weights)


@pytest.mark.parametrize(
    "changes", [{}, {"dropout": 0.2, "ema_decay": 0.9}, {"optimizer": "sgd", "schedule": "constant"}], ids=str
)
def test_a_restored_training_ends_with_the_same_bits(small, parts, changes):
    recipe = Recipe(**({"steps": 24, "batch_size": 32, "eval_every": 6, "lr": 1e-2} | changes))
    whole, other = fit(small(), *parts, recipe), fit(small(), *parts, replace(recipe, seed=1))
    broken = Trainer(small(), *parts, recipe)
    while not broken.finished:
        states: list = []
        run(broken, on_validation=lambda trainer: states.append(saved(trainer)) or True)  # noqa: B023
        broken = Trainer(small(5), *parts, recipe)
        broken.restore(*states[0])
        assert broken.seconds == states[0][1]["seconds"] > 0
    assert whole.validations == broken.validations != other.validations and whole.best_loss == broken.best_loss < 3.3
    assert_same(whole.best_weights, broken.best_weights)
    assert torch.equal(torch.stack(whole.losses), torch.stack(broken.losses))


def saved(trainer):
    tensors, numbers = trainer.state()
    return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}, numbers


def test_ways_to_end_a_training(small, parts, monkeypatch):
    recipe = Recipe(steps=9, eval_every=3)
    assert fit(small(), *parts, recipe, seconds=0).validations[-1][0] == 3
    assert fit(small(), *parts, recipe, on_validation=lambda trainer: trainer.step == 6).step == 6
    assert fit(small(), *parts, recipe, seconds=1e9, on_validation=lambda trainer: None).step == 9
    losses = iter((4.0, 3.0, 2.5, 2.6, 2.5))
    monkeypatch.setattr("wavenet_conv.training.trainer.evaluate", lambda *_: next(losses))
    trainer = fit(small(), *parts, Recipe(steps=100, eval_every=1, patience=2))
    assert (trainer.step, trainer.best_step, trainer.best_loss) == (4, 2, 2.5)


@pytest.mark.parametrize("steps, warmup", [(1, 0.5), (3, 0.25), (9, 0.1), (2, 0.0), (1, 0.25)])
def test_the_shortest_trainings_run(small, parts, steps, warmup):
    assert math.isfinite(fit(small(), *parts, Recipe(steps=steps, warmup=warmup, batch_size=20)).best_loss)


def test_a_breakdown_names_the_step_the_rate_and_the_fix(small, parts):
    trainer = Trainer(small(), *parts, Recipe(lr=0.03, batch_size=10))
    trainer.advance()
    trainer.validate()
    with torch.no_grad():
        trainer.model.head.bias[0] = math.inf
    trainer.advance()
    trainer.advance()
    with pytest.raises(WaveNetConvError, match="at step 2: a loss is NaN or .*up to 0.03; .*--lr 0.01.*find-lr"):
        trainer.validate()
    trainer.losses[-2:] = [torch.tensor(2.0), torch.tensor(2.0)]
    with pytest.raises(WaveNetConvError, match="at step 3: a loss is NaN"):
        trainer.validate()
    assert trainer.best_step == 1 and all(tensor.isfinite().all() for tensor in trainer.best_weights.values())


def test_teachers_of_another_dtype_and_in_another_mode(small, parts):
    teacher, recipe = small(1).double().eval(), Recipe(steps=2, batch_size=20)
    taught = fit(small(), *parts, recipe, teachers=[teacher])
    assert taught.train_corpus.soft_targets.dtype == torch.float32
    assert taught.best_loss != fit(small(), *parts, recipe).best_loss
    with pytest.raises(WaveNetConvError, match="a teacher is in training mode; call .eval"):
        fit(small(), *parts, recipe, teachers=[teacher.train()])


def test_a_preset_trains_its_teachers_first_and_once(parts, monkeypatch):
    shape = {"n_embd": 4, "n_hidden": 8}
    monkeypatch.setitem(PRESETS, "wide", (shape, Recipe(steps=60, eval_every=20)))
    monkeypatch.setitem(PRESETS, "plain", (shape | {"gated": True}, Recipe(steps=40, eval_every=10)))
    monkeypatch.setitem(TEACHERS, "wide", ("plain", "plain"))
    assert [(name, recipe.seed) for name, _, recipe in teachers_of("wide", 7)] == [("plain", 8), ("plain", 9)]
    trained, steps = {}, []
    one = fit_preset("wide", *parts, seed=7, steps=0.1, trained=trained, on_validation=lambda t: steps.append(t.step))
    assert steps == [4, 4, 6] and trained.keys() == {("plain", 8), ("plain", 9)}
    by_hand = fit(new_model(one.model.config, 7), *parts, one.recipe, teachers=list(trained.values()))
    assert_same(one.model.state_dict(), by_hand.model.state_dict())
    steps.clear()
    again = fit_preset("wide", *parts, seed=7, steps=0.1, trained=trained, on_validation=lambda t: steps.append(t.step))
    assert steps == [6] and again.validations == one.validations


def test_the_lectures_split(lecture_list):
    parts = split_names(lecture_list)
    assert [sum(len(name) + 1 for name in part) for part in parts] == [182_625, 22_655, 22_866]
    assert sorted(name for part in parts for name in part) == sorted(lecture_list)


def test_recipes_and_lists_that_are_rejected(small, vocab):
    for changes, message in (
        ({"steps": 0}, "steps is 0; it must be at least 1 and below"),
        ({"lr": 0.0}, "lr is 0.0; it must be a positive number"),
        ({"optimizer": "adam"}, "optimizer is 'adam'; it must be 'adamw' or 'sgd'"),
    ):
        with pytest.raises(WaveNetConvError, match=message):
            Recipe(**changes)
    with pytest.raises(WaveNetConvError, match="nothing to learn from an empty list"):
        Corpus([], vocab, small())
    with pytest.raises(WaveNetConvError, match=r"name 1 \('b7'\): character '7' at position 1"):
        Corpus(["a", "b7"], vocab, small())
