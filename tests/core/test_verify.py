"""`verify` reports what it compared and where the models differ most, and rejects what cannot be compared."""

from types import SimpleNamespace

import pytest
import torch
from helpers import ALPHABET, random_tree
from torch import nn

from wavenet_conv import Vocabulary, WaveNetConvError, fold_batch_norm, from_tree, verify

VOCAB = Vocabulary(ALPHABET)
NAMES = ["olivia", "emma", "", "a"]
SMALL = dict(n_embd=6, n_hidden=10)


class OneLogitMoved:
    """A model that is no module and moves one logit of "emma", at position 2."""

    def __init__(self, conv, by):
        self.conv, self.context, self.by = conv, conv.context, by
        self.weights = SimpleNamespace(embedding=conv.embedding.weight)  # says which device the model is on

    def __call__(self, tokens):
        logits = self.conv(tokens)
        rows = [row for row, name in enumerate(VOCAB.decode(tokens)) if name == "emma"]
        logits[rows, 2, 5] += self.by
        return logits


@pytest.mark.parametrize("fold", [False, True], ids=["conv", "folded"])
def test_report_of_equal_models_is_true(fold):
    tree = random_tree(**SMALL)
    conv = fold_batch_norm(from_tree(tree)) if fold else from_tree(tree)
    done = []
    report = verify(tree, conv, NAMES, VOCAB, on_progress=done.append)
    assert not tree.layers[-1].out.requires_grad  # runs without gradients
    assert report.equal and report and sum(done) == report.names == 4
    assert report.positions == 7 + 5 + 1 + 2 and report.argmax_differences == 0
    assert report.max_abs_diff < 1e-12 == report.tolerance
    expected = "equal: 15 positions of 4 names, float64, tolerance 1e-12 (of a logit's size above 1)\nlarg"
    assert str(report).startswith(expected)


@pytest.mark.parametrize("by", [100.0, -1e-9, torch.nan, torch.inf])
def test_report_of_different_models_names_the_worst_position(by):
    tree = random_tree(**SMALL)
    report = verify(tree, OneLogitMoved(from_tree(tree), by), NAMES, VOCAB)
    assert not report.equal and not report and report.worst == ("emma", 2)
    assert report.max_abs_diff == (pytest.approx(abs(by)) if by == by else torch.inf)
    assert by != 100 or report.argmax_differences == 1
    assert str(report).startswith("NOT EQUAL") and "in 'emma' at position 2" in str(report)


def test_tie_is_no_argmax_difference():
    tree = random_tree(**SMALL)
    head = tree.layers[-1]
    head.weight.data[:, 1], head.bias.data[1] = head.weight.data[:, 0], head.bias.data[0]
    head.bias.data[:2] += 1000
    conv = from_tree(tree)
    conv.head.bias.data[1] += 1e-12
    report = verify(tree, conv, NAMES, VOCAB)
    assert report.equal and report.argmax_differences == 0
    conv.head.bias.data[1] += 1e-3
    assert verify(tree, conv, NAMES, VOCAB).argmax_differences == report.positions


@pytest.mark.parametrize("side", ["tree", "conv", "both"])
def test_logits_that_are_not_finite_are_not_equal(side):
    tree = random_tree(**SMALL)
    conv = from_tree(tree)
    for model in {"tree": [tree.layers[-1]], "conv": [conv.head], "both": [tree.layers[-1], conv.head]}[side]:
        model.bias.data[3] = torch.nan
    report = verify(tree, conv, NAMES, VOCAB)
    assert not report.equal and report.max_abs_diff == torch.inf


@pytest.mark.parametrize("side", ["tree", "conv"])
def test_training_mode_is_rejected(side):
    tree = random_tree(**SMALL)
    conv = from_tree(tree)
    (tree if side == "tree" else conv).train()
    layers = nn.Module()  # plain layers inside a module, which `.eval()` does not reach
    layers.layers = tree.layers
    for model in (tree, layers.eval()):
        with pytest.raises(WaveNetConvError, match=f"{side} is in training mode .[BC].*call .eval"):
            verify(model, conv, NAMES, VOCAB)


def compare(other=None, names=NAMES, vocab=VOCAB):
    tree = random_tree(**SMALL)
    return verify(tree, other(tree) if other else from_tree(tree), names, vocab)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compare(names=[]), "no names to compare; give at least one"),
        (lambda: compare(lambda tree: from_tree(tree).float()), "float64 and the convolutional model torch.float32"),
        (lambda: compare(lambda tree: from_tree(random_tree(**SMALL, vocab_size=30))), r"logits of shape \(15, 27\)"),
        (lambda: compare(lambda tree: tree), "the second model is a Sequential; call verify.tree, conv"),
        (lambda: compare(lambda tree: from_tree(random_tree((3, 2), **SMALL))), r"windows of shape \(15, 6\): Flatten"),
        (lambda: compare(names=["olivia", "andé"]), "name 1 .*character 'é' at position 3"),
        (lambda: compare(names=["|"], vocab=Vocabulary(ALPHABET + "{|")), "token 28 at .* outside the vocabulary"),
    ],
)
def test_what_cannot_be_compared_is_rejected(call, message):
    with pytest.raises(WaveNetConvError, match=message):
        call()
