"""Training on shared nodes is the tree's training on all windows: batches, losses, gradients, statistics, steps."""

from __future__ import annotations

import copy
from collections import Counter

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from helpers import KINDS, MIXED, assert_same_gradients, random_tree
from hypothesis import given, settings

import reference
from wavenet_conv import Vocabulary, WaveNetConfig, from_tree
from wavenet_conv.training import Corpus, Recipe, Trainer, evaluate, new_model, predictions, shared_logits, total_loss
from wavenet_conv.training.ranks import batch_norm_over_ranks

VOCAB = Vocabulary("abcxyz")
NAMES = ["abcxyz", "", "a", "abc", "abcabcabcabc", "zyx", "abc"]

kernel_size_lists = st.lists(st.integers(1, 4), min_size=1, max_size=3)
name_lists = st.lists(st.text("abcxyz", max_size=12), min_size=2, max_size=8)


def tree_loss(tree, names, vocab=VOCAB):
    """The mean of -log p over all windows of the names, through the tree as one batch."""
    X, Y = reference.examples(names, vocab.characters, reference.context_of(tree))
    return F.cross_entropy(tree(X), Y)


def shared_loss(conv, names):
    batch = Corpus(names, VOCAB, conv).batch(torch.arange(len(names)))
    return total_loss(conv, batch) / batch.positions


def ids_in_windows(batch):
    """Per layer, lowest first, the ids of its nodes in each distinct window: `(windows, nodes per window)`."""
    ids = [torch.arange(len(batch.children[-1]))[:, None]]
    for children in reversed(batch.children[1:]):
        ids.insert(0, children[ids[0]].flatten(1))
    return ids


def tokens_of_windows(batch):
    return batch.children[0][ids_in_windows(batch)[0]].flatten(1)


def assert_close(found, expected, tolerance=1e-10):
    """All tensors of two models' `named_parameters` or `state_dict`."""
    found, expected = dict(found), dict(expected)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert (tensor - expected[name]).abs().max() < tolerance, name


@settings(max_examples=40)
@given(kernel_size_lists, st.integers(1, 2), name_lists, st.data())
def test_a_batch_is_the_windows_of_its_names(kernel_sizes, head, names, data):
    """Distinct windows, what follows each how often, and how many windows contain each node."""
    conv = new_model(WaveNetConfig(len(VOCAB), 5, 7, tuple(kernel_sizes), head_kernel_size=head), dtype=torch.float64)
    rows = data.draw(st.lists(st.integers(0, len(names) - 1), min_size=1, max_size=6))
    batch = Corpus(names, VOCAB, conv).batch(torch.tensor(rows))
    X, Y = reference.examples([names[row] for row in rows], VOCAB.characters, conv.context)
    expected = Counter((*window, token) for window, token in zip(X.tolist(), Y.tolist()))
    windows = tokens_of_windows(batch).tolist()
    found = {(*windows[i], token): int(batch.targets[i, token]) for i, token in batch.targets.nonzero().tolist()}
    assert found == expected and len(windows) == len({tuple(window) for window in X.tolist()})
    assert batch.positions == len(X)
    weights = batch.targets.sum(1, keepdim=True)
    for ids, multiplicity in zip(ids_in_windows(batch), batch.multiplicities):
        counts = torch.bincount(ids.flatten(), weights.expand_as(ids).flatten())
        assert torch.equal(counts, multiplicity[:, 0])


@settings(max_examples=30)
@given(kernel_size_lists, name_lists, st.sampled_from(KINDS))
def test_logits_are_the_models(kernel_sizes, names, kind):
    conv = from_tree(random_tree(kernel_sizes, n_embd=5, n_hidden=7, vocab_size=len(VOCAB), **kind))
    corpus = Corpus(names, VOCAB, conv)
    batch = corpus.batch(torch.arange(len(names)))
    expected = conv(tokens_of_windows(batch))[:, 0]
    assert (shared_logits(conv, batch) - expected).abs().max() < 1e-12
    mean_loss = -(expected.log_softmax(1) * batch.targets).sum() / batch.positions
    assert abs(evaluate(conv, corpus) - mean_loss) < 1e-12


@settings(max_examples=40)
@given(kernel_size_lists, name_lists, st.sampled_from(KINDS), st.integers(0, 99))
def test_loss_gradients_and_statistics_are_the_trees(kernel_sizes, names, kind, seed):
    tree = random_tree(kernel_sizes, n_embd=5, n_hidden=7, vocab_size=len(VOCAB), **kind, seed=seed).train()
    conv = from_tree(tree).train()
    names = [*names, "abcxyz"]  # one name with a variance of its own
    expected, found = tree_loss(tree, names), shared_loss(conv, names)
    assert abs(expected - found) < 1e-10
    expected.backward()
    found.backward()
    assert_close(conv.state_dict(), from_tree(tree).state_dict())  # running statistics among them
    assert_same_gradients(tree, conv)


@pytest.mark.parametrize("kind", [{}, {"norm": "none"}, MIXED], ids=["tanh", "no norm", "mixed"])
def test_twenty_steps_are_the_trees(names, vocab, kind):
    """From the same start, with the same names per step, the two are still alike after twenty steps of SGD."""
    few = names[:600]
    tree = random_tree(n_embd=6, n_hidden=16, **kind).train()
    conv = from_tree(tree)
    recipe = Recipe(steps=20, batch_size=32, optimizer="sgd", schedule="constant", lr=0.1, weight_decay=0.0, seed=3)
    trainer = Trainer(conv, vocab, few, names[600:650], recipe)
    for _ in range(20):
        loss = tree_loss(tree, [few[row] for row in trainer.next_rows().tolist()], vocab)
        for parameter in tree.parameters():
            parameter.grad = None
        loss.backward()
        for parameter in tree.parameters():
            parameter.data -= 0.1 * parameter.grad
        trainer.advance()
        assert abs(trainer.losses[-1] - loss) < 1e-8
    assert_close(conv.state_dict(), from_tree(tree).state_dict(), 1e-8)


def test_teachers_give_their_share_of_the_targets(small):
    """Window by window: the name's own token, and the mean of what the teachers expect after the same prefix."""
    sizes = {"vocab_size": len(VOCAB), "dtype": torch.float64}
    teachers = [small(1, **sizes).eval(), small(2, **sizes, kernel_sizes=(3, 2), gated=True).eval()]
    student, recipe = small(0, **sizes), Recipe(steps=1, batch_size=len(NAMES), distill_weight=0.75)
    corpus = Trainer(student, VOCAB, NAMES, NAMES, recipe, teachers).train_corpus
    expected: dict[tuple, torch.Tensor] = {}
    for name in NAMES:
        parts = []
        for teacher in teachers:
            X, _ = reference.examples([name], VOCAB.characters, teacher.context)
            parts.append(teacher(X)[:, 0].softmax(1))
        X, Y = reference.examples([name], VOCAB.characters, student.context)
        mixed = 0.25 * F.one_hot(Y, len(VOCAB)) + 0.75 * sum(parts) / 2
        for window, row in zip(map(tuple, X.tolist()), mixed):
            expected[window] = expected.get(window, 0) + row
    batch = corpus.batch(torch.arange(len(NAMES)).flip(0), 0.75)
    for window, row in zip(map(tuple, tokens_of_windows(batch).tolist()), batch.targets):
        assert (row - expected.pop(window)).abs().max() < 1e-12
    assert not expected


def test_predictions_are_in_the_order_of_the_names(small, monkeypatch):
    """Also where the list is predicted in several chunks."""
    conv = small(vocab_size=len(VOCAB), dtype=torch.float64).eval()
    X, _ = reference.examples(NAMES, VOCAB.characters, conv.context)
    corpus = Corpus(NAMES, VOCAB, conv)
    monkeypatch.setattr(corpus, "chunks", lambda: Corpus.chunks(corpus, 3))
    assert (predictions(conv, corpus) - conv(X)[:, 0].softmax(1)).abs().max() < 1e-12


def test_batch_norm_over_ranks_has_the_statistics_of_all(small, monkeypatch):
    """Two ranks with the same half of a batch are one with the whole batch."""
    monkeypatch.setattr("torch.distributed.nn.functional.all_reduce", lambda part: 2 * part)
    norm = small(dtype=torch.float64).layers[0].norm.train()
    alone, x = copy.deepcopy(norm), torch.randn(9, 16, dtype=torch.float64)
    multiplicity = torch.arange(1.0, 10)[:, None].double()
    found = batch_norm_over_ranks(norm, x, multiplicity)
    expected = alone(torch.cat([x, x]), torch.cat([multiplicity, multiplicity]))
    assert (found - expected[:9]).abs().max() < 1e-12
    assert_close(norm.state_dict(), alone.state_dict(), 1e-12)
    assert torch.equal(batch_norm_over_ranks(norm.eval(), x, multiplicity), norm(x))


def test_dropout_acts_in_training_only_and_on_no_names(small):
    conv = small(vocab_size=len(VOCAB), gated=True).train()
    corpus = Corpus(NAMES, VOCAB, conv)
    empty, batch = (corpus.batch(torch.arange(count)) for count in (0, len(NAMES)))
    assert total_loss(conv, empty, 0.5) == empty.positions == 0
    torch.manual_seed(0)
    assert not torch.equal(shared_logits(conv, batch, 0.5), shared_logits(conv, batch, 0.5))
    conv.eval()
    assert torch.equal(shared_logits(conv, batch, 0.5), shared_logits(conv, batch))
