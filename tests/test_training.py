"""Training on shared nodes is the tree's training on all windows: loss, gradients, statistics, and twenty steps."""

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from conftest import random_tree
from hypothesis import given, settings
from helpers import ALPHABET, assert_same_gradients

import reference
from wavenet_conv import ConvWaveNet, Vocabulary, WaveNetConfig, WaveNetConvError, from_tree
from wavenet_conv.training import Corpus, Recipe, Trainer, evaluate, shared_logits, split_names, total_loss

VOCAB = Vocabulary(ALPHABET)
NAMES = ["abcxyz", "", "a", "abc", "abcabcabcabc", "zyx", "abc"]


def tree_loss(tree, names):
    """The mean of -log p over all windows of `names`, run through the tree as one batch."""
    context = reference.context_of(tree)
    tokens, lengths = VOCAB.encode(names, context=context)
    windows, inside = (
        reference.windows(tokens, context),
        torch.arange(tokens.shape[1] - context + 1) <= lengths[:, None],
    )
    following = torch.cat([tokens[:, context:], tokens.new_zeros(len(names), 1)], 1)
    return F.cross_entropy(tree(windows[inside]), following[inside])


def shared_loss(conv, names, rows=None):
    corpus = Corpus(names, VOCAB, conv)
    batch = corpus.batch(torch.arange(len(names)) if rows is None else rows)
    return total_loss(conv, batch) / batch.positions


def assert_same_statistics(tree, conv, tolerance):
    norms = [layer for layer in tree.layers if isinstance(layer, reference.BatchNorm1d)]
    for layer, norm in zip(conv.layers, norms):
        assert (layer.norm.running_mean - norm.running_mean.flatten()).abs().max() < tolerance
        assert (layer.norm.running_var - norm.running_var.flatten()).abs().max() < tolerance


@settings(max_examples=60)
@given(
    kernel_sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    names=st.lists(st.text("abcxyz", max_size=12), min_size=2, max_size=8),
    seed=st.integers(0, 99),
)
def test_one_step_is_the_trees(kernel_sizes, names, seed):
    tree = random_tree(kernel_sizes, n_embd=5, n_hidden=7, seed=seed).train()
    conv = from_tree(tree).train()
    names = [*names, "abcxyz"]  # one name with a variance of its own
    expected, found = tree_loss(tree, names), shared_loss(conv, names)
    assert abs(expected - found) < 1e-10
    expected.backward()
    found.backward()
    assert_same_gradients(tree, conv)
    assert_same_statistics(tree, conv, 1e-10)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_twenty_steps_are_the_trees(names, batch_norm):
    """From the same start, with the same names a step, the two are still alike after twenty steps of SGD."""
    vocab, few = Vocabulary("abcdefghijklmnopqrstuvwxyz"), names[:600]
    tree = random_tree(n_embd=6, n_hidden=16, batch_norm=batch_norm).train()
    conv = from_tree(tree).train()
    recipe = Recipe(steps=20, batch=32, optimizer="sgd", schedule="constant", lr=0.1, weight_decay=0.0, seed=3)
    trainer = Trainer(conv, vocab, few, names[600:650], recipe)
    for _ in range(20):
        rows = trainer._rows()
        context = reference.context_of(tree)
        tokens, lengths = vocab.encode([few[row] for row in rows.tolist()], context=context)
        inside = torch.arange(tokens.shape[1] - context + 1) <= lengths[:, None]
        following = torch.cat([tokens[:, context:], tokens.new_zeros(len(rows), 1)], 1)
        loss = F.cross_entropy(tree(reference.windows(tokens, context)[inside]), following[inside])
        for parameter in tree.parameters():
            parameter.grad = None
        loss.backward()
        for parameter in tree.parameters():
            parameter.data -= 0.1 * parameter.grad
        trainer.advance()
        assert abs(trainer.losses[-1] - loss) < 1e-8
    again = from_tree(tree)
    for name, tensor in conv.state_dict().items():
        assert (tensor - again.state_dict()[name]).abs().max() < 1e-8, name


@settings(max_examples=30)
@given(
    kernel_sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    names=st.lists(st.text("abcxyz", max_size=12), min_size=1, max_size=8),
    gated=st.booleans(),
    data=st.data(),
)
def test_logits_are_the_models(kernel_sizes, names, gated, data):
    """In evaluation mode the loss of any part of a list is what `forward` says of it, both kinds of layer."""
    config = WaveNetConfig(vocab_size=len(VOCAB), n_embd=5, n_hidden=7, kernel_sizes=tuple(kernel_sizes), gated=gated)
    torch.manual_seed(0)
    conv = ConvWaveNet(config, dtype=torch.float64).eval()
    rows = data.draw(st.lists(st.integers(0, len(names) - 1), min_size=1, max_size=6))
    corpus = Corpus(names, VOCAB, conv)
    batch = corpus.batch(torch.tensor(rows))
    chosen = [names[row] for row in rows]
    tokens, lengths = VOCAB.encode(chosen, context=conv.context)
    inside = torch.arange(tokens.shape[1] - conv.context + 1) <= lengths[:, None]
    following = torch.cat([tokens[:, conv.context :], tokens.new_zeros(len(rows), 1)], 1)
    expected = F.cross_entropy(conv(tokens)[inside], following[inside], reduction="sum")
    assert abs(total_loss(conv, batch) - expected) < 1e-10
    assert batch.positions == int(lengths.sum()) + len(rows) == int(batch.counts.sum())
    windows = {("." * conv.context + n)[i : i + conv.context] for n in chosen for i in range(len(n) + 1)}
    assert len(batch.children[-1]) == len(windows)
    assert all(int(uses.sum()) % batch.positions == 0 for uses in batch.uses)
    if set(rows) == set(range(len(names))):
        assert (
            abs(evaluate(conv, corpus) * len(corpus.windows) - total_loss(conv, corpus.batch(torch.arange(len(names)))))
            < 1e-9
        )


def test_gradients_of_gated_models_are_those_of_the_slid_pass():
    config = WaveNetConfig(vocab_size=len(VOCAB), n_embd=6, n_hidden=8, kernel_sizes=(2, 3, 2), gated=True)
    torch.manual_seed(0)
    conv = ConvWaveNet(config, dtype=torch.float64).train()
    tokens, lengths = VOCAB.encode(NAMES, context=12)
    inside = torch.arange(tokens.shape[1] - 11) <= lengths[:, None]
    following = torch.cat([tokens[:, 12:], tokens.new_zeros(len(NAMES), 1)], 1)
    expected = F.cross_entropy(conv(tokens)[inside], following[inside])
    gradients = torch.autograd.grad(expected, list(conv.parameters()))
    found = shared_loss(conv, NAMES)
    for mine, theirs in zip(torch.autograd.grad(found, list(conv.parameters())), gradients):
        assert (mine - theirs).abs().max() < 1e-10
    assert sum(float(gradient.abs().sum()) for gradient in gradients) > 0.1


def test_teachers_give_their_share_of_what_is_predicted(names, vocab):
    """Against the definition, window by window: what a name's own character leaves, the teachers' mean expects."""
    few, recipe = names[:40], Recipe(steps=1, batch=40, taught=0.75, optimizer="sgd", schedule="constant", lr=1e-9)
    pupil, teachers = (
        small(0).double(),
        [small(1).double().eval(), small(2, kernel_sizes=(3, 2), gated=True).double().eval()],
    )
    trainer = Trainer(pupil, vocab, few, names[40:50], recipe, teachers)
    total = positions = 0
    for name in few:
        own, expected = [], 0
        for model in (pupil, *teachers):
            tokens, _ = vocab.encode([name], context=model.context)
            with torch.no_grad():
                own.append(model.eval()(tokens)[0].softmax(1) if model is not pupil else None)
        expected = sum(own[1:]) / 2
        targets = F.one_hot(torch.cat([vocab.encode([name], context=1)[0][0, 1:], torch.zeros(1).long()]), len(vocab))
        mixed = 0.25 * targets + 0.75 * expected
        total, positions = total + mixed.sum(), positions + len(name) + 1
    batch = trainer.train.batch(torch.arange(40), 0.75)
    assert abs(batch.counts.sum() - total) < 1e-9 and abs(total - positions) < 1e-9
    by_window = {}
    for name, start, count in zip(few, trainer.train.starts.tolist(), trainer.train.outputs.tolist()):
        for place in range(count):
            by_window.setdefault(("." * 8 + name)[place : place + 8], []).append(start + place)
    assert len(by_window) == len(batch.counts)
    hard = trainer.train.batch(torch.arange(40)).counts
    soft = (batch.counts - 0.25 * hard) / 0.75
    rows = trainer.train.windows.unique(return_inverse=True)[1]
    for places in by_window.values():
        assert len({int(rows[place]) for place in places}) == 1
        expected = trainer.train.taught[places].sum(0)
        assert (soft[rows[places[0]]] - expected).abs().max() < 1e-12
    tokens, _ = vocab.encode([few[3]], context=6)
    with torch.no_grad():
        theirs = teachers[1](tokens)[0].softmax(1)
        both = (theirs + teachers[0](vocab.encode([few[3]], context=8)[0])[0].softmax(1)) / 2
    start = int(trainer.train.starts[3])
    assert (trainer.train.taught[start : start + len(few[3]) + 1] - both).abs().max() < 1e-12


def small(seed=0, **sizes):
    """A model to train, its weights drawn from `seed`."""
    torch.manual_seed(seed)
    return ConvWaveNet(WaveNetConfig(**({"n_embd": 6, "n_hidden": 16} | sizes)))


@pytest.mark.parametrize(
    "changes", [{}, {"dropout": 0.2, "average": 0.9}, {"optimizer": "sgd", "schedule": "constant"}]
)
def test_a_restored_training_ends_with_the_same_bits(names, vocab, changes):
    recipe = Recipe(**({"steps": 24, "batch": 32, "every": 6, "lr": 1e-2} | changes))

    def trained(stops):
        trainer = Trainer(small(), vocab, names[:200], names[200:260], recipe)
        while not trainer.finished:
            trainer.advance()
            if trainer.step % recipe.every == 0:
                trainer.validate()
            if trainer.step in stops:
                tensors, numbers = trainer.state()
                tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
                torch.manual_seed(77)
                trainer = Trainer(small(5), vocab, names[:200], names[200:260], recipe)
                trainer.restore(tensors, numbers)
        return trainer

    whole, broken = trained(()), trained((6, 12, 18))
    assert whole.validations == broken.validations and whole.best_loss == broken.best_loss < 3.3
    for one, other in ((whole.kept.state_dict(), broken.kept.state_dict()), (whole.best_weights, broken.best_weights)):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(torch.stack(whole.losses), torch.stack(broken.losses))


def test_it_learns_and_keeps_the_best(names, vocab):
    recipe = Recipe(steps=60, batch=64, every=10)
    trainer = Trainer(small(), vocab, names[:1000], names[1000:1200], recipe)
    while not trainer.finished:
        trainer.advance()
        if trainer.step % recipe.every == 0:
            trainer.validate()
    steps, losses = zip(*trainer.validations)
    assert steps == (10, 20, 30, 40, 50, 60) and trainer.best_loss == min(losses) < 2.7 < float(trainer.losses[0])
    best = small(1)
    best.load_state_dict(trainer.best_weights)
    assert evaluate(best, trainer.valid) == trainer.best_loss


def test_patience_ends_a_training(names, vocab):
    trainer = Trainer(small(), vocab, names[:50], names[50:60], Recipe(steps=100, patience=2))
    for loss in (3.0, 2.5, 2.6, 2.5):
        assert not trainer.finished
        trainer.step += 1
        trainer.validations.append((trainer.step, loss))
        if loss < trainer.best_loss:
            trainer.best_step, trainer.best_loss = trainer.step, loss
    assert trainer.finished and trainer.best_step == 2


def test_a_breakdown_names_the_step_the_rate_and_the_mend(names, vocab):
    trainer = Trainer(small(), vocab, names[:50], names[50:60], Recipe(lr=0.03, batch=10))
    trainer.advance()
    trainer.validate()
    with torch.no_grad():
        trainer.model.head.bias[0] = math.inf
    trainer.advance()
    trainer.advance()
    with pytest.raises(
        WaveNetConvError, match="at step 2: its loss is nan.*up to 0.03.*of step 1; .*--lr 0.01.*find-lr"
    ):
        trainer.validate()
    assert trainer.best_step == 1 and all(tensor.isfinite().all() for tensor in trainer.best_weights.values())


def test_the_lectures_split(lecture_list):
    parts = split_names(lecture_list)
    assert [sum(len(name) + 1 for name in part) for part in parts] == [182_625, 22_655, 22_866]
    assert sorted(name for part in parts for name in part) == sorted(lecture_list)


@pytest.mark.parametrize("steps, warmup", [(1, 0.5), (3, 0.25), (9, 0.1), (2, 0.0), (1, 0.25)])
def test_the_shortest_trainings_run(names, vocab, steps, warmup):
    trainer = Trainer(small(), vocab, names[:50], names[50:60], Recipe(steps=steps, warmup=warmup, batch=20))
    while not trainer.finished:
        trainer.advance()
    assert math.isfinite(trainer.validate())


def test_teachers_of_another_dtype_and_in_another_mode(names, vocab):
    teacher, recipe = small(1).double().eval(), Recipe(steps=2, batch=20)
    trainer = Trainer(small(), vocab, names[:50], names[50:60], recipe, [teacher])
    trainer.advance()
    assert trainer.train.taught.dtype == torch.float32
    with pytest.raises(WaveNetConvError, match="a teacher is in training mode; call .eval"):
        Trainer(small(), vocab, names[:50], names[50:60], recipe, [teacher.train()])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_rank_without_names_has_nothing_to_add(dropout):
    conv = small(vocab_size=len(VOCAB), gated=True).train()
    batch = Corpus(NAMES, VOCAB, conv).batch(torch.arange(0))
    assert total_loss(conv, batch, dropout) == 0 and batch.positions == 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "steps is 0; it must be at least 1 and below"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and below 1"),
        ({"lr": 0.0}, "lr is 0.0; it must be a positive number"),
        ({"lr": math.nan}, "lr is nan; it must be a positive number"),
        ({"optimizer": "adam"}, "optimizer is 'adam'; it is 'adamw' or 'sgd'"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0; it must be at least 0"),
    ],
)
def test_a_recipe_that_cannot_be(changes, message):
    with pytest.raises(WaveNetConvError, match=message):
        Recipe(**changes)


def test_a_corpus_that_cannot_be(vocab):
    with pytest.raises(WaveNetConvError, match="a list of no names"):
        Corpus([], vocab, small())
    with pytest.raises(WaveNetConvError, match=r"name 1 \('b7'\): character '7' at position 1"):
        Corpus(["a", "b7"], vocab, small())


def test_dropout_acts_in_training_only():
    conv = small(vocab_size=len(VOCAB)).train()
    batch = Corpus(NAMES, VOCAB, conv).batch(torch.arange(len(NAMES)))
    torch.manual_seed(0)
    assert not torch.equal(shared_logits(conv, batch, 0.5), shared_logits(conv, batch, 0.5))
    conv.eval()
    assert torch.equal(shared_logits(conv, batch, 0.5), shared_logits(conv, batch))
